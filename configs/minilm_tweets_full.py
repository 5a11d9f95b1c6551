"""Full fine-tuning of MiniLM's layers on the tweets, the embedding tables frozen.

python -m train.finetune --config=configs/minilm_tweets_full.py
"""

from __future__ import annotations

import ml_collections

from configs.minilm_tweets import experiment


def get_config() -> ml_collections.ConfigDict:
    """Returns the experiment."""
    return experiment("full", pattern=r"encoder/.*")
