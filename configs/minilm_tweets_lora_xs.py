"""LoRA-XS on the tweets.

python -m train.finetune --config=configs/minilm_tweets_lora_xs.py
"""

from __future__ import annotations

import ml_collections

from configs.minilm_tweets import experiment


def get_config() -> ml_collections.ConfigDict:
    """Returns the experiment."""
    return experiment("lora_xs")
