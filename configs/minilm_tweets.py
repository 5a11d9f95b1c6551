"""Sentiment of tweets with MiniLM: what the configurations minilm_tweets_*.py share.

all-MiniLM-L6-v2 reads 12,000 tweets of three classes with its mean-pooled states and a linear classifier; every method adapts the
six linear weights of each layer, and the classifier is trained in full. Accuracy is of 2,000 tweets held back.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from train.config import base, rule

LINEAR = r"encoder/.*/(query|key|value|output|intermediate)"
HEAD = "classifier"


def experiment(method: str, learning_rate: float, pattern: str = LINEAR, **fields: Any) -> ml_collections.ConfigDict:
    """The experiment with one method.

    Args:
      learning_rate: of the adapter; the classifier has one of its own. pattern: what the method adapts. fields: of the method.
    """
    config = base()
    config.name = f"minilm_tweets_{method}"
    config.model.source, config.model.pooling = "minilm", "mean"
    config.data.name, config.data.max_length, config.data.limit = "tweets", 48, 12_000
    config.adapter = rule(method, pattern, **fields)
    config.head = rule("full", HEAD, learning_rate=1e-3)
    config.steps, config.batch_size, config.eval_batch_size = 300, 32, 100
    config.learning_rate = learning_rate
    config.eval_every, config.checkpoint_every = 100, 50
    return config
