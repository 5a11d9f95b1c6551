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
    "full": (5e-5, {}),
    "lora": (1e-3, {"rank": 16}),
    "rslora": (1e-3, {"method": "lora", "rank": 16, "alpha": 4.0, "rank_stabilised": True}),
    "lora_plus": (5e-4, {"method": "lora", "rank": 16, "plus": 4.0}),
    "pissa": (5e-4, {"rank": 16}),
    "lora_xs": (4e-3, {"rank": 32}),
    "lamda": (2e-3, {"rank": 32}),
    "lamda_pp": (2e-3, {"rank": 32}),
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
