"""Tokens per second: our training step, google-tunix's trainer with qwix's LoRA, full fine-tuning and the frozen floor.

    pip install -e '.[bench]' && pip install --no-deps -r bench/tunix.txt      # best in an environment of its own
    python -m bench.throughput                                                 # some four minutes on two quiet cores
    python -m bench.throughput --cost-of-layers                                # as much again

A Llama with random weights, the same in all, on the same batches of random tokens, float32, AdamW with clipping and a cosine schedule.
All take turns in one process, an update each, fed from the host and waited for; a ratio is the median over rounds of the quotient of two
updates of the same round. Ours is `train.step.Stepper` with the defaults of `train.finetune` (layers scanned), and without the scan. The
peer is tunix's Llama with qwix's LoRA, updated by what its `PeftTrainer` compiles (graph cached, its own loss and attention, layers never
scanned), a second time with the loss that ours computes, which is cheaper. The floor is that of bench/step_time.py. That all start at the
same loss is checked. Without tunix the peer is left out.

With --cost-of-layers instead: what layers cost, at a small width. The median update, the line through it, and the first update, which
is tracing and compiling.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bench.common import interleaved, table, write_json
from bench.contenders import FLOOR, PEERS, SEED, Batch, Contender, batches, everyone, model_of, ours, peer, weights

SHAPES = {"256 wide, 2 x 128": (256, 2, 128), "512 wide, 2 x 128": (512, 2, 128), "256 wide, 8 x 128": (256, 8, 128)}
LAYERS = (2, 4, 8, 16)
PEER = next(iter(PEERS), None)


def fed(contender: Contender, data: list[Batch]) -> Callable[[], Any]:
    """An update on the next batch."""
    endless = itertools.cycle(data)
    return lambda: contender.update(next(endless))


def quotient(seconds: dict[str, list[float]], one: str | None, other: str) -> float | None:
    """Median over rounds of what one takes over what the other takes."""
    return one and statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def speed(shape: str, layers: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of the first table for a shape."""
    width, rows, length = SHAPES[shape]
    config = model_of(width, layers)
    data = batches(config, rows, length)
    found = everyone(config, data[0])
    print(f"{shape}: compiling, then {rounds} rounds of {len(found)} updates", flush=True)
    losses = {}
    for name, contender in found.items():
        total, weight = contender.update(data[0])
        losses[name] = float(total) / float(weight)
    assert max(losses.values()) - min(losses.values()) < 1e-4, losses
    seconds = interleaved({name: fed(contender, data) for name, contender in found.items()}, rounds)
    return [
        {
            "shape": shape, "layers": layers, "step": name, "ms": 1000 * statistics.median(times),
            "tokens_per_second": rows * length / statistics.median(times), "gflop": found[name].products / 1e9,
            "over_floor": quotient(seconds, name, FLOOR), "peer_over": quotient(seconds, PEER, name),
            "full_over": quotient(seconds, "full", name), "first_loss": losses[name],
        }
        for name, times in seconds.items()
    ]  # fmt: skip


def cost_of_layers(width: int, rounds: int, compiles: int) -> list[dict[str, Any]]:
    """The rows of the second table: by the number of layers, the median update and the shortest of several first updates."""
    makers = {"LoRA r=16": ours, "LaMDA r=32, last phase": ours} | ({PEER: peer} if PEER else {})
    first: dict[tuple[str, int], list[float]] = {}
    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    for turn, count in itertools.product(range(compiles), LAYERS):
        config = model_of(width, count)
        params, data = weights(config), batches(config, 2, 128)
        for name, make in makers.items():
            contender = make(config, params, name, data[0])
            began = time.perf_counter()
            jax.block_until_ready(contender.update(data[0]))
            first.setdefault((name, count), []).append(time.perf_counter() - began)
            calls[name, count] = fed(contender, data)
        print(f"{count} layers compiled, {turn + 1} of {compiles} times", flush=True)
    seconds = interleaved(calls, rounds)
    rows = []
    for name in makers:
        ms = [1000 * statistics.median(seconds[name, count]) for count in LAYERS]
        slope, rest = (float(x) for x in np.polyfit(LAYERS, ms, 1))
        off = max(abs(m / (slope * count + rest) - 1) for m, count in zip(ms, LAYERS, strict=True))
        rows.append({
            "step": name, "layers": LAYERS, "ms": ms, "ms_a_layer": slope, "ms_of_the_rest": rest, "off_the_line": off,
            "first_update_seconds": [min(first[name, count]) for count in LAYERS],
        })  # fmt: skip
    return rows


def show_speed(rows: list[dict[str, Any]], title: str) -> None:
    """The first table."""
    ratio = lambda x: "" if x is None else f"{x:.2f}"  # noqa: E731
    columns = (
        "shape",
        "step",
        "ms",
        "tokens/s",
        "products, GFLOP",
        "time over the floor",
        "speed over the peer",
        "speed over full",
    )
    table(
        columns,
        [(r["shape"], r["step"], f"{r['ms']:.1f}", f"{r['tokens_per_second']:,.0f}", f"{r['gflop']:.2f}",
          ratio(r["over_floor"]), ratio(r["peer_over"]), ratio(r["full_over"])) for r in rows],
        title,
    )  # fmt: skip


def show_layers(rows: list[dict[str, Any]], title: str) -> None:
    """The second table."""
    columns = (
        "step",
        *(f"ms, {n} layers" for n in LAYERS),
        "ms a layer",
        "the rest",
        "off the line",
        "first update, s",
    )
    table(
        columns,
        [(r["step"], *(f"{m:.1f}" for m in r["ms"]), f"{r['ms_a_layer']:.2f}", f"{r['ms_of_the_rest']:.2f}",
          f"{r['off_the_line']:.1%}", ", ".join(f"{s:.1f}" for s in r["first_update_seconds"])) for r in rows],
        title,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cost-of-layers", action="store_true")
    parser.add_argument("--layers", type=int, default=4, help="without --cost-of-layers")
    parser.add_argument("--width", type=int, default=128, help="with --cost-of-layers")
    parser.add_argument("--compiles", type=int, default=2, help="with --cost-of-layers")
    options = parser.parse_args()
    peers = {name: importlib.metadata.version(name) for name in ("google-tunix", "qwix")} if PEERS else {}
    about = {"seed": SEED, "rounds": options.rounds, "peers": peers}
    if options.cost_of_layers:
        rows = cost_of_layers(options.width, options.rounds, options.compiles)
        show_layers(rows, f"The cost of layers, width {options.width}, 2 x 128 tokens")
        write_json("throughput_layers", {**about, "width": options.width, "rows": rows})
    else:
        rows = [row for shape in SHAPES for row in speed(shape, options.layers, options.rounds)]
        show_speed(rows, f"{options.layers} layers, float32, {options.rounds} rounds")
        write_json("throughput", {**about, "rows": rows})


if __name__ == "__main__":
    main()
