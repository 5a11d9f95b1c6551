"""LaMDA on the tweets.

python -m train.finetune --config=configs/minilm_tweets_lamda.py
"""

from __future__ import annotations

import ml_collections

from configs.minilm_tweets import experiment


def get_config() -> ml_collections.ConfigDict:
    """Returns the experiment."""
    return experiment("lamda", learning_rate=2e-3, rank=32)
