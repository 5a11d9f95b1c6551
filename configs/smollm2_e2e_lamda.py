"""LaMDA on SmolLM2-135M-Instruct and E2E NLG (train.txt, valid.txt and test.txt, lines of data||text).

python -m train.finetune --config=configs/smollm2_e2e_lamda.py --config.data.directory=e2e/

Without a directory the data set is fetched by name, which gives the cleaned edition: its scores compare with no paper on the original.
"""

from __future__ import annotations

import ml_collections

from configs.smollm2 import experiment


def get_config() -> ml_collections.ConfigDict:
    """Returns the experiment."""
    return experiment("e2e", "lamda", learning_rate=2e-3, rank=32)
