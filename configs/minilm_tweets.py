"""Sentiment of tweets with MiniLM, with any method of the library.

python -m train.finetune --config=configs/minilm_tweets.py:dora

all-MiniLM-L6-v2 reads 12,000 tweets of three classes with its mean-pooled states and a linear classifier; every method adapts the
six linear weights of each layer, and the classifier is trained in full. Accuracy is of 2,000 tweets held back. bench/methods.py runs
the recipes side by side.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

import ml_collections

from train.config import ConfigError, base, rule

LINEAR = r"encoder/.*/(query|key|value|output|intermediate)"
HEAD = "classifier"


class Recipe(NamedTuple):
    """What to train and how fast.

    Attributes:
      learning_rate: of the method's leaves. fields: of the method. method: its name; "": the recipe's. pattern: what it adapts.
    """

    learning_rate: float
    fields: dict[str, Any]
    method: str = ""
    pattern: str = LINEAR


RECIPES = {
    "full": Recipe(1e-4, {}),
    "lora": Recipe(1e-3, {"rank": 16}),
    "rslora": Recipe(1e-3, {"rank": 16, "alpha": 4.0, "rank_stabilised": True}, "lora"),
    "lora_plus": Recipe(5e-4, {"rank": 16, "plus": 4.0}, "lora"),
    "pissa": Recipe(5e-4, {"rank": 16}),
    "lora_xs": Recipe(4e-3, {"rank": 32}),
    "lamda": Recipe(2e-3, {"rank": 32}),
    "lamda_pp": Recipe(2e-3, {"rank": 32}),
    "adalora": Recipe(4e-3, {"rank": 12, "alpha": 96.0}),
    "allora": Recipe(1e-3, {"rank": 16}),
    "bottleneck": Recipe(1e-3, {"width": 15}),
    "colora": Recipe(1e-3, {"rank": 16}),
    "conformer_adapter": Recipe(1e-3, {"width": 10}),
    "corda": Recipe(5e-4, {"rank": 16}),
    "dora": Recipe(1e-3, {"rank": 15}),
    "dylora": Recipe(2e-3, {"rank": 16, "frozen": False}),
    "flora": Recipe(3e-4, {"rank": 15}),
    "hydra": Recipe(1e-3, {"rank": 8}),
    "intrinsic": Recipe(1e-2, {"dimension": 5000}),
    "ia3": Recipe(1e-2, {}),
    "increlora": Recipe(4e-3, {"rank": 12, "alpha": 48.0, "top": 3}),
    "loldu": Recipe(3e-3, {"rank": 256}),
    "lora_ga": Recipe(1e-4, {"rank": 16, "alpha": 16.0}),
    "lora_sb": Recipe(2e-3, {"rank": 32, "rate": 1e-4}),
    "mos": Recipe(2e-3, {"rank": 16, "budget": 4}),
    "mosa": Recipe(2e-3, {"width": 15, "scale": 1.0}),
    "nola": Recipe(1e-2, {"rank": 8, "bases": 128}),
    "one_bit": Recipe(2e-3, {"rank": 16}),
    "pego": Recipe(1e-3, {"rank": 4, "group": 4, "preserve": 1e-4, "diversify": 1e-4}),
    "petalface": Recipe(1e-3, {"rank": 8, "quality": 0.5}),
    "randlora": Recipe(3e-4, {"rank": 32}),
    "s2_lora": Recipe(4e-3, {"rank": 32}),
    "sara": Recipe(5e-4, {"fraction": 0.0625}),
    "spiel": Recipe(2e-3, {"density": 0.0625}),
    "subspace_update": Recipe(2e-3, {"rank": 16}),
    "sltrain": Recipe(1e-3, {"rank": 8, "density": 0.03, "init": "finetune"}),
    "sora": Recipe(2e-3, {"rank": 15, "alpha": 30.0, "threshold": 1e-3}),
    "svfit": Recipe(1e-2, {"rank": 256}),
    "vera": Recipe(2e-2, {"rank": 256}),
    "vida": Recipe(1e-3, {"rank": 1, "high_rank": 15, "init": "kaiming"}),
    "zero_i2v": Recipe(1e-3, {"width": 15}),
    # The commonest words: ids of this vocabulary fall with frequency.
    "trainable_tokens": Recipe(1e-3, {"token_indices": tuple(range(999, 1999))}, pattern=r".*/word_embeddings"),
}


def get_config(name: str = "lamda") -> ml_collections.ConfigDict:
    """Returns the experiment with one recipe."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.3)
        raise ConfigError(
            f"configs/minilm_tweets.py has no recipe {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} It has {', '.join(RECIPES)}."
        )
    return experiment(name)


def experiment(name: str, pattern: str = "") -> ml_collections.ConfigDict:
    """The experiment with one recipe; ``pattern``: what its method adapts instead."""
    recipe = RECIPES[name]
    config = base()
    config.name = f"minilm_tweets_{name}"
    config.model.source, config.model.pooling = "minilm", "mean"
    config.data.name, config.data.max_length, config.data.limit = "tweets", 48, 12_000
    config.adapter = rule(recipe.method or name, pattern or recipe.pattern, **recipe.fields)
    config.head = rule("full", HEAD, learning_rate=1e-3)
    config.steps, config.batch_size, config.eval_batch_size = 300, 32, 100
    config.learning_rate = recipe.learning_rate
    config.eval_every, config.checkpoint_every = 100, 50
    return config
