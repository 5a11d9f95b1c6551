"""LaMDA++ (ranks by spectrum, 32 on average) on the tweets.

python -m train.finetune --config=configs/minilm_tweets_lamda_pp.py
"""

from __future__ import annotations

import ml_collections

from configs.minilm_tweets import experiment


def get_config() -> ml_collections.ConfigDict:
    """Returns the experiment."""
    return experiment("lamda_pp")
