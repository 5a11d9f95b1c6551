"""Finding GaLore's subspace in real gradients: the randomised range finder against the exact decomposition.

    python -m bench.refresh_time              # SmolLM2-135M on BBC News, 4 x 128 tokens; about five minutes on two cores
    python -m bench.refresh_time --wide       # a layer of Llama-7B's width, untrained, on 16 x 128 tokens, at ranks up to 1024; ten minutes

For each weight and rank: seconds a matrix by either method, compiled beforehand and with the number of power iterations a refresh takes;
the gradient's energy in the subspace over what the exact subspace holds, for the worst of the layers looked at; and the fewest power
iterations that reach 0.99 in each layer, with how much faster the range finder is with as many. A single layer of Llama-7B's width has
random weights, as at the start of pre-training: its tokens are real, its directions not learned.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.common import table, write_json
from bench.galore_step import loss_of
from lowrank_jax import assets, linalg, models
from lowrank_jax.models.gguf_load import load_gguf
from lowrank_jax.models.tokenizer import load_tokenizer
from lowrank_jax.optim.subspace import REFRESH_ITERATIONS
from lowrank_jax.sites import flatten
from train import data

FASTER, ENERGY = 8, 0.99
MOST_ITERATIONS = 8


def tokens_of(rows: int, length: int) -> tuple[jax.Array, int]:
    """Running text as tokens of SmolLM2, and the size of its vocabulary."""
    tokenizer = load_tokenizer(assets.fetch("smollm2"))
    loader = data.load("bbc_text", "train", tokenizer, batch_size=rows, max_length=length)
    return jnp.asarray(loader.training_batch(0)["tokens"]), tokenizer.vocab_size


def gradients(model: Any, params: Any, tokens: jax.Array, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """Of the weights whose paths end in one of the names, by path."""
    loss, found = jax.jit(jax.value_and_grad(lambda params: loss_of(model, params, None, tokens)))(params)
    print(f"loss {float(loss):.3f} on {tokens.shape[0]} x {tokens.shape[1]} tokens", flush=True)
    return {path: g for path, g in flatten(found).items() if path.endswith(tuple(f"{name}/kernel" for name in names))}


def timed(call: Callable[..., Any], g: jax.Array, runs: int) -> tuple[Any, float]:
    """The result, and the median of the seconds a matrix of ``g [layers, n_in, n_out]``."""
    compiled, times, result = jax.jit(call).lower(g).compile(), [], None
    for _ in range(runs):
        began = time.perf_counter()
        result = jax.block_until_ready(compiled(g))
        times.append((time.perf_counter() - began) / g.shape[0])
    return result, statistics.median(times)


@jax.jit
def energy(g: jax.Array, directions: jax.Array) -> jax.Array:
    """``[layers]``: squares of the coordinates of ``g`` in a subspace of its rows' axis."""
    return (jnp.matmul(jnp.swapaxes(directions, -1, -2), g, precision="highest") ** 2).sum((-2, -1))


def compare(path: str, g: jax.Array, ranks: list[int], runs: int) -> list[dict[str, Any]]:
    """A row for each rank of one stack of gradients."""
    shape = g.shape[-2:]
    g = jnp.swapaxes(g, -1, -2) if shape[0] > shape[1] else g  # The shorter side is the one that is projected.
    (whole, _, _), exact = timed(lambda g: linalg.svd(g, min(shape), method="exact"), g, max(1, runs // 3))
    rows = []
    for rank in ranks:
        best = energy(g, whole[..., :rank])

        def find(g: jax.Array, iterations: int, rank: int = rank) -> jax.Array:
            return linalg.directions(jax.random.key(1), g, rank, power_iterations=iterations)

        def share(found: jax.Array, best: jax.Array = best) -> jax.Array:
            return energy(g, found) / best

        found, seconds = timed(lambda g: find(g, REFRESH_ITERATIONS), g, runs)
        shares = share(found)
        tried = (n for n in range(MOST_ITERATIONS + 1) if share(jax.jit(find, static_argnums=1)(g, n)).min() >= ENERGY)
        enough = next(tried, None)
        at_goal = None if enough is None else timed(lambda g, n=enough, find=find: find(g, n), g, runs)[1]
        rows.append({
            "weight": path.removesuffix("/kernel"), "shape": shape, "layers": g.shape[0], "rank": rank,
            "exact_seconds": exact, "randomized_seconds": seconds, "faster": exact / seconds, "energy_worst": float(shares.min()),
            "energy_mean": float(shares.mean()), "held_by_exact": float((best / (g**2).sum((-2, -1))).mean()),
            "iterations_enough": enough, "faster_with_enough": None if at_goal is None else exact / at_goal,
        })  # fmt: skip
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def smollm2(rows: int, every: int) -> dict[str, jax.Array]:
    """Gradients of every so many layers of SmolLM2-135M, ``[layers, n_in, n_out]``."""
    loaded = load_gguf(assets.fetch("smollm2"), scan_layers=True)
    names = ("q_proj", "o_proj", "k_proj", "gate_proj", "down_proj")
    found = gradients(loaded.model, loaded.params, tokens_of(rows, 128)[0], names)
    return {path: g[::every] for path, g in found.items()}


def wide(rows: int) -> dict[str, jax.Array]:
    """The gradient of an MLP matrix in a model that is one layer of Llama-7B's shapes."""
    tokens, vocabulary = tokens_of(rows, 128)
    config = models.llama2_7b(num_hidden_layers=1, vocab_size=vocabulary, scan_layers=True)
    model = models.build(config)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:1])["params"]
    return gradients(model, params, tokens, ("gate_proj",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--rows", type=int, help="of 128 tokens")
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--every", type=int, default=6, help="one layer in so many is looked at")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    ranks = options.ranks or ([128, 512, 1024] if options.wide else [64, 128])
    found = wide(options.rows or 16) if options.wide else smollm2(options.rows or 4, options.every)
    rows = [row for path, g in found.items() for row in compare(path, g, ranks, 1 if options.wide else options.runs)]
    shown = [
        (r["weight"], "x".join(map(str, r["shape"])), r["rank"], f"{r['exact_seconds']:.3f}", f"{r['randomized_seconds']:.3f}",
         f"{r['faster']:.1f}x", f"{r['energy_worst']:.4f}", f"{r['held_by_exact']:.3f}", r["iterations_enough"],
         f"{r['faster_with_enough'] or 0:.1f}x", "yes" if r["faster"] >= FASTER and r["energy_worst"] >= ENERGY else "no")
        for r in rows
    ]  # fmt: skip
    columns = ("weight", "shape", "rank", "exact s", "randomized s", "faster", "energy over exact", "exact holds",
               f"iterations for {ENERGY}", "faster with them", "goal")  # fmt: skip
    table(columns, shown, f"Seconds a matrix; goal: {FASTER} times faster at {ENERGY} of the exact subspace's energy")
    write_json(
        "refresh_time_wide" if options.wide else "refresh_time", {"iterations": REFRESH_ITERATIONS, "rows": rows}
    )


if __name__ == "__main__":
    main()
