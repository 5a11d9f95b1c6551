"""Tweets: every method on the same data with the same budget of tuning.

    python -m bench.tweets                    # six methods and LaMDA's variants, about an hour and a half on two cores
    python -m bench.tweets --methods lamda,lora --seeds 1

all-MiniLM-L6-v2, mean-pooled, adapters on the six linear weights of each layer and a trained classifier head; 3 classes of
tweets. For each method a grid of learning rates on a short run, judged on the validation split; then the best of them
for three seeds on the full run, judged on 4,000 examples of the test split. Every finished run is kept in results/tweets.jsonl,
and a run that is there already is not made again: the command may be stopped and started.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lr
from bench.common import RESULTS, machine, table, write_json
from lowrank_jax import assets, models
from lowrank_jax.models.tokenizer import load_tokenizer
from train.data import load as load_data

METHODS: dict[str, lr.Method] = {
    "full": lr.full(),
    "lora": lr.lora(rank=16),
    "pissa": lr.pissa(rank=16),
    "lora_xs": lr.lora_xs(rank=32),
    "lamda": lr.lamda(rank=32),
    "lamda_pp": lr.lamda_pp(rank=32),
    "lamda/balanced": lr.lamda(rank=32, core="balanced"),
    "lamda/sigma": lr.lamda(rank=32, core="sigma"),
    "lamda/svd_zero": lr.lamda(rank=32, init="svd_zero"),
    "lamda/official_code": lr.lamda(rank=32, init="official_code"),
}
LINEAR = r".*/(query|key|value|attention/output|mlp/intermediate|mlp/output)"
HEAD_RATE = 2e-3
HEAD_COUNT = 384 * 3 + 3  # trained by every method alike
LOG = RESULTS / "tweets.jsonl"


@functools.cache
def base() -> tuple[Any, Any, Any]:
    """The pretrained model with a fresh head, its parameters and its tokenizer."""
    folder = assets.fetch("minilm")
    loaded = models.load(folder, task="classify", num_labels=3, classifier_pooling="mean", scan_layers=True)
    return loaded.model, loaded.params, load_tokenizer(folder)


def cosine(steps: Any) -> Any:
    """Linear warmup over the first tenth, then half a cosine to zero; ``steps`` may be traced."""
    return lambda count: jnp.minimum(count / (0.1 * steps), 0.5 + 0.5 * jnp.cos(jnp.pi * (count / steps - 0.1) / 0.9))


@functools.cache
def data(split: str, seed: int, limit: int | None) -> Any:
    return load_data("tweets", split, base()[2], batch_size=32, max_length=48, seed=seed, limit=limit)


class Trainer:
    """One method's compiled steps for every learning rate, seed and length of run: these are arguments, so nothing compiles twice."""

    def __init__(self, name: str):
        self.method = METHODS[name]
        model, params, _ = base()
        self.plan = lr.plan(params, {LINEAR: self.method, "classifier": lr.full()})

        def optimizer(steps: Any) -> Any:
            adam = optax.chain(
                optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_schedule(cosine(steps))
            )
            return lr.optim.with_methods(adam, self.plan, steps)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(train: Any, state: Any, frozen: Any, params: Any, batch: Any, rate: Any, steps: Any) -> Any:
            def loss_of(train: Any) -> Any:
                logits = lr.linen.apply(
                    model, params, lr.join(train, frozen), batch["tokens"], attention_mask=batch["mask"]
                )
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

            loss, gradients = jax.value_and_grad(loss_of)(train)
            updates, state = optimizer(steps).update(gradients, state, train)
            updates = {
                path: jax.tree.map(lambda u, p=path: -u * (HEAD_RATE if "classifier" in p else rate), leaves)
                for path, leaves in updates.items()
            }
            return optax.apply_updates(train, updates), state, loss

        @jax.jit
        def predict(params: Any, adapters: Any, batch: Any) -> Any:
            return lr.linen.apply(model, params, adapters, batch["tokens"], attention_mask=batch["mask"]).argmax(-1)

        self._step, self._predict, self._optimizer = step, predict, optimizer

    def run(self, steps: int, rate: float, seed: int, split: str, limit: int | None) -> dict[str, Any]:
        """Trains once and evaluates on a split."""
        _, params, _ = base()
        started = time.time()
        original = lr.init(jax.random.key(seed), params, self.plan)
        params, adapters = lr.fold(params, original)
        train, frozen = lr.partition(adapters, 0, steps)
        tx = self._optimizer(steps)
        state = tx.init(train)
        batches = data("train", seed, None).iterator()
        phases = self.plan.phases(steps)
        for step in range(steps):
            if step and step in phases:
                train, frozen = lr.partition(lr.join(train, frozen), step, steps)
                state = lr.optim.carry_state(tx, state, train)
            train, state, loss = self._step(train, state, frozen, params, next(batches), rate, steps)
        adapters = lr.join(train, frozen)
        right = seen = 0
        for batch in data(split, 0, limit).evaluation_batches():
            valid = batch.pop("valid")
            right += int(((self._predict(params, adapters, batch) == batch["label"]) & valid).sum())
            seen += int(valid.sum())
        return {
            "accuracy": right / seen,
            "examples": seen,
            "loss": float(loss),
            "seconds": round(time.time() - started, 1),
        }


def done() -> dict[tuple, dict[str, Any]]:
    """Finished runs by what they were."""
    lines = LOG.read_text().splitlines() if LOG.exists() else []
    return {(r["method"], r["steps"], r["rate"], r["seed"]): r for r in map(json.loads, lines)}


def one(
    name: str, steps: int, rate: float, seed: int, split: str, limit: int, trainers: dict[Any, Trainer]
) -> dict[str, Any]:
    """A run, from the log if it is there."""
    key = (name, steps, rate, seed)
    if key in done():
        return done()[key]
    if name not in trainers:
        trainers[name] = Trainer(name)
    trainer = trainers[name]
    result = {"method": name, "steps": steps, "rate": rate, "seed": seed, "split": split} | trainer.run(
        steps, rate, seed, split, limit
    )
    RESULTS.mkdir(exist_ok=True)
    with LOG.open("a") as log:
        log.write(json.dumps(result) + "\n")
    print(
        f"{name:20s} steps {steps} rate {rate:g} seed {seed}: {result['accuracy']:.4f} ({result['seconds']} s)",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--grid-steps", type=int, default=50)
    parser.add_argument("--rates", default="1.25e-4,5e-4,2e-3,8e-3")
    options = parser.parse_args()
    rates = [float(rate) for rate in options.rates.split(",")]
    rows = {}
    for name in options.methods.split(","):
        trainers: dict[str, Trainer] = {}
        grid = {
            rate: one(name, options.grid_steps, rate, 0, "validation", 1000, trainers)["accuracy"] for rate in rates
        }
        best = max(grid, key=lambda rate: grid[rate])
        runs = [
            one(name, options.steps, best, seed, "test", 4000, trainers)["accuracy"] for seed in range(options.seeds)
        ]
        plan = lr.plan(base()[1], {LINEAR: METHODS[name], "classifier": lr.full()})
        rows[name] = {
            "rate": best,
            "grid": {f"{rate:g}": value for rate, value in grid.items()},
            "mean": statistics.mean(runs),
            "std": statistics.stdev(runs) if len(runs) > 1 else 0.0,
            "start": plan.count(0, options.steps) - HEAD_COUNT,
            "end": plan.count(options.steps - 1, options.steps) - HEAD_COUNT,
        }
    lora = rows.get("lora", {}).get("end")
    shown = [
        (name, f"{100 * r['mean']:.2f} ± {100 * r['std']:.2f}", f"{r['rate']:g}", f"{r['start']:,}", f"{r['end']:,}",
         f"{lora / r['end']:.1f}x" if lora else "")
        for name, r in sorted(rows.items(), key=lambda kv: -kv[1]["mean"])
    ]  # fmt: skip
    table(("method", "test accuracy", "rate", "trainable at start", "at the end", "fewer than LoRA"), shown,
          f"Tweets, {options.steps} steps of 32, {options.seeds} seeds; the head's {HEAD_COUNT:,} parameters left out")  # fmt: skip
    write_json(
        "tweets", {"steps": options.steps, "grid_steps": options.grid_steps, "seeds": options.seeds, "rows": rows}
    )
    print(machine())


if __name__ == "__main__":
    main()
