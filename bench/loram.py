"""LoRAM on the tweets: LoRA trained on a pruned MiniLM, used on the whole one.

    python -m bench.loram                    # some four minutes on two cores
    python -m bench.loram --keep 0.25

A share of the inner features of each MLP is kept, those with the largest weights. A LoRA and a classifier are trained on the small model;
the LoRA is then laid back into the whole one. Beside it stands the same LoRA trained on the whole model. Columns: parameters of the model
that is trained on, temporary memory of a step, accuracy on 4,000 tweets of the test split where it was trained and in the whole model.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import lowrank_jax as lr
from bench.classify import Trainer, base, batch_of_full_width, data
from bench.common import table, write_json
from lowrank_jax.models import build

MLP = r".*/mlp"


def train_tweets(seed: int) -> Any:
    """The training split in the order of a seed."""
    return data("tweets", "train", seed, None)


def row(name: str, trainer: Trainer, steps: int, rate: float, params: Any) -> tuple[dict[str, Any], lr.Adapters]:
    """Trains once; what it took and reached where it was trained."""
    started, train, frozen, state = trainer.start(steps, 0)
    rest = (frozen, started, batch_of_full_width(3), rate, steps, jax.random.key(0))
    memory = trainer.step.lower(train, state, *rest).compile().memory_analysis()
    folded, adapters, _ = trainer.run(steps, rate, 0)
    there, _ = trainer.accuracy(folded, adapters, data("tweets", "test", 0, 4000))
    size = sum(x.size for x in jax.tree.leaves(params))
    return {"trained on": name, "parameters": size, "temporaries": memory.temp_size_in_bytes, "there": there}, adapters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    model, params, _ = base()
    sites = lr.linen.sites(model, params, jnp.zeros((1, 4), jnp.int32))
    kept = lr.loram.choose(jax.random.key(0), params, {MLP: lr.loram.features(options.keep)}, "magnitude", sites)
    features = int(model.config.intermediate_size * options.keep)
    pruned = (build(dataclasses.replace(model.config, intermediate_size=features)), lr.loram.prune(params, kept))
    method = lr.lora(rank=16)
    small, whole = Trainer(method, train_tweets, model_and_params=pruned), Trainer(method, train_tweets)
    cut, adapters = row(f"{options.keep:.0%} of the features", small, options.steps, options.rate, pruned[1])
    uncut, _ = row("the whole model", whole, options.steps, options.rate, params)
    recovered = lr.loram.recover(adapters, kept, params)
    cut["in the whole"] = whole.accuracy(params, recovered, data("tweets", "test", 0, 4000))[0]
    uncut["in the whole"] = uncut["there"]
    rows = [cut, uncut]
    table(
        ("trained on", "parameters", "temporaries MiB", "accuracy there", "in the whole model"),
        [(r["trained on"], f"{r['parameters']:,}", f"{r['temporaries'] / 2**20:.0f}", f"{100 * r['there']:.1f}",
          f"{100 * r['in the whole']:.1f}") for r in rows],
        f"Tweets, LoRA r=16, {options.steps} steps of 32, one seed",
    )  # fmt: skip
    write_json("loram", {"keep": options.keep, "steps": options.steps, "rate": options.rate, "rows": rows})


if __name__ == "__main__":
    main()
