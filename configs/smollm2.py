"""What the configurations smollm2_*.py share: SmolLM2-135M-Instruct with adapters on all linear weights of each layer."""

from __future__ import annotations

from typing import Any

import ml_collections

from train.config import base, rule

LINEAR = r"layers/.*_proj"


def experiment(data: str, method: str, learning_rate: float, **fields: Any) -> ml_collections.ConfigDict:
    """One method on one data set, from a directory of the user (--config.data.directory=...) or fetched by name.

    Args:
      data: 'gsm8k' or 'e2e'. learning_rate: of the adapter. fields: of the method.
    """
    config = base()
    config.name, config.task = f"smollm2_{data}_{method}", "causal_lm"
    config.model.source = "smollm2"
    config.data.name, config.data.pack = data, True
    config.data.max_length = {"gsm8k": 512, "e2e": 256}[data]
    config.data.eval_split = {"gsm8k": "test", "e2e": "validation"}[data]
    config.adapter = rule(method, LINEAR, **fields)
    config.epochs, config.batch_size, config.eval_batch_size, config.accumulate = 3.0, 16, 8, 2
    config.learning_rate = learning_rate
    config.eval_every, config.checkpoint_every = 200, 100
    return config
