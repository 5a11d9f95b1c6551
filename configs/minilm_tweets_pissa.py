"""PiSSA on the tweets.

python -m train.finetune --config=configs/minilm_tweets_pissa.py
"""

from __future__ import annotations

import ml_collections

from configs.minilm_tweets import experiment


def get_config() -> ml_collections.ConfigDict:
    """Returns the experiment."""
    return experiment("pissa")
