"""Sentiment of tweets with MiniLM, with any method of the library.

python -m train.finetune --config=configs/minilm_tweets.py:dora

all-MiniLM-L6-v2 reads 12,000 tweets of three classes with its mean-pooled states and a linear classifier; every method adapts the
six linear weights of each layer, and the classifier is trained in full. Accuracy is of 2,000 tweets held back. bench/methods.py runs
the recipes side by side.
"""

from __future__ import annotations

import difflib
from typing import Any

import ml_collections

from train.config import ConfigError, base, rule

LINEAR = r"encoder/.*/(query|key|value|output|intermediate)"
HEAD = "classifier"

# Learning rate and fields of each method (``method`` where the recipe's name is another).
RECIPES: dict[str, tuple[float, dict[str, Any]]] = {
    "full": (1e-4, {}),
    "lora": (1e-3, {"rank": 16}),
    "rslora": (1e-3, {"method": "lora", "rank": 16, "alpha": 4.0, "rank_stabilised": True}),
    "lora_plus": (5e-4, {"method": "lora", "rank": 16, "plus": 4.0}),
    "pissa": (5e-4, {"rank": 16}),
    "lora_xs": (4e-3, {"rank": 32}),
    "lamda": (2e-3, {"rank": 32}),
    "lamda_pp": (2e-3, {"rank": 32}),
    "adalora": (4e-3, {"rank": 12, "alpha": 96.0}),
    "allora": (1e-3, {"rank": 16}),
    "bottleneck": (1e-3, {"width": 15}),
    "colora": (1e-3, {"rank": 16}),
    "conformer_adapter": (1e-3, {"width": 10}),
    "corda": (5e-4, {"rank": 16}),
    "dora": (1e-3, {"rank": 15}),
    "dylora": (2e-3, {"rank": 16, "frozen": False}),
    "flora": (3e-4, {"rank": 15}),
    "hydra": (1e-3, {"rank": 8}),
    "ia3": (1e-2, {}),
    "increlora": (4e-3, {"rank": 12, "alpha": 48.0, "top": 3}),
    "loldu": (3e-3, {"rank": 256}),
    "lora_ga": (1e-4, {"rank": 16, "alpha": 16.0}),
    "lora_sb": (2e-3, {"rank": 32, "rate": 1e-4}),
    "mos": (2e-3, {"rank": 16, "budget": 4}),
    "mosa": (2e-3, {"width": 15, "scale": 1.0}),
    "nola": (1e-2, {"rank": 8, "bases": 128}),
    "one_bit": (2e-3, {"rank": 16}),
    "pego": (1e-3, {"rank": 4, "group": 4, "preserve": 1e-4, "diversify": 1e-4}),
    "petalface": (1e-3, {"rank": 8, "quality": 0.5}),
    "randlora": (2e-3, {"rank": 32}),
    "s2_lora": (4e-3, {"rank": 32}),
    "sara": (5e-4, {"fraction": 0.0625}),
    "sltrain": (1e-3, {"rank": 8, "density": 0.03, "init": "finetune"}),
    "sora": (2e-3, {"rank": 15, "alpha": 30.0, "threshold": 1e-3}),
    "svfit": (1e-2, {"rank": 256}),
    "vera": (2e-2, {"rank": 256}),
    "vida": (1e-3, {"rank": 1, "high_rank": 15, "init": "kaiming"}),
    "zero_i2v": (1e-3, {"width": 15}),
}


def get_config(name: str = "lamda") -> ml_collections.ConfigDict:
    """Returns the experiment with one recipe."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.3)
        raise ConfigError(
            f"configs/minilm_tweets.py has no recipe {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} It has {', '.join(RECIPES)}."
        )
    return experiment(name)


def experiment(name: str, pattern: str = LINEAR) -> ml_collections.ConfigDict:
    """The experiment with one recipe; ``pattern``: what its method adapts."""
    learning_rate, fields = RECIPES[name]
    config = base()
    config.name = f"minilm_tweets_{name}"
    config.model.source, config.model.pooling = "minilm", "mean"
    config.data.name, config.data.max_length, config.data.limit = "tweets", 48, 12_000
    method = fields.get("method", name)
    config.adapter = rule(method, pattern, **{k: v for k, v in fields.items() if k != "method"})
    config.head = rule("full", HEAD, learning_rate=1e-3)
    config.steps, config.batch_size, config.eval_batch_size = 300, 32, 100
    config.learning_rate = learning_rate
    config.eval_every, config.checkpoint_every = 100, 50
    return config
