"""Full fine-tuning of MiniLM's layers on the tweets, the embedding tables frozen.

python -m train.finetune --config=configs/minilm_tweets_full.py

Result of full fine-tuning in bench/tweets.py (the linear weights only, 150 steps at 1.25e-4, three seeds, 4,000 test tweets): accuracy
0.770 +- 0.013.
"""

from __future__ import annotations

import ml_collections

from configs.minilm_tweets import experiment


def get_config() -> ml_collections.ConfigDict:
    """Returns the experiment."""
    return experiment("full", pattern=r"encoder/.*")
