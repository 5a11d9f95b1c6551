"""LaMDA on SmolLM2-135M-Instruct and GSM8K (train.jsonl and test.jsonl of grade-school-math).

python -m train.finetune --config=configs/smollm2_gsm8k_lamda.py --config.data.directory=gsm8k/

Without a directory the data set is fetched by name.
"""

from __future__ import annotations

import ml_collections

from configs.smollm2 import experiment


def get_config() -> ml_collections.ConfigDict:
    """Returns the experiment."""
    config = experiment("gsm8k", "lamda", learning_rate=2e-3, rank=32)
    config.generate = 100  # answered at the end, compared behind "####"
    return config
