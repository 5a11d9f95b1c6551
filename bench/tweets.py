"""Tweets: every method on the same data with the same budget of tuning.

    python -m bench.tweets                    # six methods and LaMDA's variants, about an hour and a half on two cores
    python -m bench.tweets --methods lamda,lora --steps 300    # some of them, longer; twenty minutes more

all-MiniLM-L6-v2, mean-pooled, adapters on the six linear weights of each layer and a trained classifier head; 3 classes of
tweets. For each method a grid of learning rates on a short run, judged on the validation split; then the best of them
for three seeds on the full run, judged on 4,000 examples of the test split. Every finished run is kept in results/tweets.jsonl,
and a run that is there already is not made again: the command may be stopped and started. results/tweets.json is written by the whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import lowrank_jax as lr
from bench.classify import Trainer, base, data, head_count
from bench.common import RESULTS, machine, table, write_json
from configs.minilm_tweets import LINEAR

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
    "lamda/freeze_0.9": lr.lamda(rank=32, freeze=0.9),  # what the early freezing costs
}
HEAD_COUNT = head_count()  # trained by every method alike
LOG = RESULTS / "tweets.jsonl"


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
        trainers[name] = Trainer(METHODS[name], lambda seed: data("tweets", "train", seed, None))
    trainer = trainers[name]
    started = time.time()
    params, adapters, loss = trainer.run(steps, rate, seed)
    accuracy, examples = trainer.accuracy(params, adapters, data("tweets", split, 0, limit))
    result = {"method": name, "steps": steps, "rate": rate, "seed": seed, "split": split, "accuracy": accuracy,
              "examples": examples, "loss": loss, "seconds": round(time.time() - started, 1)}  # fmt: skip
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
    parser.add_argument("--methods", default="", help="separated by commas; all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--grid-steps", type=int, default=50)
    parser.add_argument("--rates", default="1.25e-4,5e-4,2e-3,8e-3")
    options = parser.parse_args()
    rates = [float(rate) for rate in options.rates.split(",")]
    rows = {}
    for name in options.methods.split(",") if options.methods else METHODS:
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
    print(machine())
    if not options.methods:
        write_json(
            "tweets", {"steps": options.steps, "grid_steps": options.grid_steps, "seeds": options.seeds, "rows": rows}
        )


if __name__ == "__main__":
    main()
