"""Every method of the library on one task: what it reaches, what it trains, what it costs.

    python -m bench.methods                                  # one seed, 60 steps, about an hour on two cores
    python -m bench.methods --methods lora,dora              # some of them
    python -m bench.methods --size full --glue DIR           # three seeds, a grid of learning rates, tweets and RTE; where a GPU is at hand

all-MiniLM-L6-v2, mean-pooled, adapters on the six linear weights of each layer, with the recipes of configs/minilm_tweets.py. Columns:
accuracy on held-out examples; parameters trained at the start and at the end (the classifier left out); temporary memory of the
compiled step beyond its arguments, as XLA plans it; time of a step over the frozen floor, median of interleaved rounds on one
batch of 32 x 48 tokens (floor: the base's forward and the backward of its activations); bytes of the saved adapter, after
`lowrank_jax.compact`; seconds to make it, compilation included. Every finished row is kept in results/methods.jsonl and not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lr
from bench.classify import MAX_LENGTH, Trainer, base, batch_of_full_width, data, head_count
from bench.common import RESULTS, interleaved, machine, table, write_json
from configs.minilm_tweets import RECIPES
from lowrank_jax.checkpoint import base_reference, save_adapter

LOG = RESULTS / "methods.jsonl"
SIZES: dict[str, dict[str, Any]] = {
    "small": {"steps": 60, "seeds": (0,), "factors": (1.0,), "grid_steps": 0, "tasks": ("tweets",), "limit": 1000},
    "full": {
        "steps": 300, "seeds": (0, 1, 2), "factors": (0.25, 0.5, 1.0, 2.0, 4.0), "grid_steps": 100, "tasks": ("tweets", "glue/rte"),
        "limit": None,
    },
}  # fmt: skip


@functools.cache
def floor(labels: int) -> Any:
    """The base's forward and the backward of its activations."""
    model, params, _ = base(labels)
    batch = batch_of_full_width(labels)

    def loss(nudge: jax.Array, params: Any) -> jax.Array:
        def add(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = next_fun(*args, **kwargs)
            words = context.module.name == "word_embeddings" and context.method_name == "__call__"
            return y + nudge if words else y

        with nn.intercept_methods(add):
            logits = model.apply({"params": params}, batch["tokens"], attention_mask=batch["mask"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    nudge = jnp.zeros((32, MAX_LENGTH, model.config.hidden_size))
    run = jax.jit(jax.value_and_grad(loss))
    return lambda: run(nudge, params)


def costs(trainer: Trainer, rounds: int = 5) -> dict[str, Any]:
    """Memory, time, bytes and init time of a method's step."""
    labels = trainer.train(0).num_labels
    params, train, frozen, state = trainer.start(100, 0)
    batch = batch_of_full_width(labels)
    rest = (frozen, params, batch, 1e-4, 100, jax.random.key(0))
    compiled = trainer.step.lower(train, state, *rest).compile()
    memory = compiled.memory_analysis()
    held = [(train, state)]

    def step() -> Any:
        train, state, loss = trainer.step(*held.pop(), *rest)
        held.append((train, state))
        return loss

    seconds = interleaved({"floor": floor(labels), "step": step}, rounds)
    ratios = [a / b for a, b in zip(seconds["step"], seconds["floor"], strict=True)]
    return {
        "temporaries": memory.temp_size_in_bytes,
        "over_floor": statistics.median(ratios),
        "init_seconds": trainer.init_seconds,
    }


def saved_bytes(params: Any, adapters: lr.Adapters) -> int:
    """What the adapter takes on disk when training is over."""
    finished = lr.compact(adapters.replace(folded=False))
    with tempfile.TemporaryDirectory() as directory:
        out = save_adapter(f"{directory}/adapter", finished, base_reference("base", {}))
        return sum(file.stat().st_size for file in out.iterdir())


def measure(name: str, task: str, size: dict[str, Any], glue: str | None) -> dict[str, Any]:
    """One row."""
    recipe = RECIPES[name]
    loader = functools.partial(data, task, "train", limit=None, glue=glue)
    method = lr.build(recipe.method or name, recipe.fields)
    trainer = Trainer(method, lambda seed: loader(seed=seed), lambda: tuned(task, size, glue), recipe.pattern)
    row: dict[str, Any] = {"method": name, "task": task, **costs(trainer)}
    judged = data(task, "validation", 0, 1000, glue)
    rates = [recipe.learning_rate * factor for factor in size["factors"]]
    best = rates[0]
    if len(rates) > 1:
        grid = {r: trainer.accuracy(*trainer.run(size["grid_steps"], r, 0)[:2], judged)[0] for r in rates}
        best = max(grid, key=lambda r: grid[r])
        row["grid"] = {f"{r:g}": value for r, value in grid.items()}
    final = data(task, "test", 0, size["limit"], glue) if task == "tweets" else judged
    runs = []
    for seed in size["seeds"]:
        params, adapters, _ = trainer.run(size["steps"], best, seed)
        runs.append(trainer.accuracy(params, adapters, final)[0])
    head = head_count(trainer.train(0).num_labels)
    return row | {
        "rate": best, "steps": size["steps"], "seeds": len(runs), "accuracy": statistics.mean(runs),
        "std": statistics.stdev(runs) if len(runs) > 1 else None, "start": trainer.plan.count(0, size["steps"]) - head,
        "end": trainer.plan.count(size["steps"] - 1, size["steps"]) - head, "bytes": saved_bytes(params, adapters),
    }  # fmt: skip


def tuned(task: str, size: dict[str, Any], glue: str | None) -> Any:
    """The base after full fine-tuning on the task, for methods that compare with it."""
    trainer = Trainer(lr.full(), lambda seed: data(task, "train", seed, None, glue))
    params, adapters, _ = trainer.run(size["steps"], RECIPES["full"].learning_rate, 0)
    return lr.merge(params, adapters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(RECIPES))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--glue", help="a directory with RTE/train.tsv and RTE/dev.tsv")
    options = parser.parse_args()
    size = SIZES[options.size]
    lines = LOG.read_text().splitlines() if LOG.exists() else []
    done = {(r["method"], r["task"], r["steps"], r["seeds"]): r for r in map(json.loads, lines)}
    for task in size["tasks"]:
        rows = []
        for name in options.methods.split(","):
            key = (name, task, size["steps"], len(size["seeds"]))
            if key not in done:
                began = time.perf_counter()
                done[key] = {**measure(name, task, size, options.glue), "machine": machine()["device"]}
                RESULTS.mkdir(exist_ok=True)
                with LOG.open("a") as log:
                    log.write(json.dumps(done[key]) + "\n")
                print(f"{name:16s} {done[key]['accuracy']:.3f}  ({time.perf_counter() - began:.0f} s)", flush=True)
            rows.append(done[key])
        show(rows, task, size)
        write_json(f"methods_{task.replace('/', '_')}_{options.size}", {"size": options.size, "rows": rows})


def show(rows: list[dict[str, Any]], task: str, size: dict[str, Any]) -> None:
    """The table, best accuracy first."""
    lora = next((r["over_floor"] for r in rows if r["method"] == "lora"), None)
    shown = [
        (r["method"], f"{100 * r['accuracy']:.1f}" + (f" ± {100 * r['std']:.1f}" if r["std"] is not None else ""),
         f"{r['start']:,}", f"{r['end']:,}", f"{r['temporaries'] / 2**20:.0f}", f"{r['over_floor']:.2f}",
         f"{r['over_floor'] / lora:.2f}" if lora else "", f"{r['bytes'] / 2**10:,.0f}", f"{r['init_seconds']:.1f}")
        for r in sorted(rows, key=lambda r: -r["accuracy"])
    ]  # fmt: skip
    table(("method", "accuracy", "trained at the start", "at the end", "temporaries MiB", "step over floor", "over LoRA", "saved KiB",
           "init s"), shown, f"{task}, {size['steps']} steps of 32, {len(size['seeds'])} seed(s)")  # fmt: skip


if __name__ == "__main__":
    main()
