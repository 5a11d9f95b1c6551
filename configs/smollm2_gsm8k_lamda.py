r"""LaMDA on SmolLM2-135M-Instruct and GSM8K (train.jsonl and test.jsonl of grade-school-math).

python -m train.finetune --config=configs/smollm2_gsm8k_lamda.py --config.data.directory=gsm8k/

Without a directory the data set is fetched by name. The whole run, three epochs, takes an accelerator and has not been made. Shortened for
two CPU cores,

python -m train.finetune --config=configs/smollm2_gsm8k_lamda.py --config.data.directory=gsm8k/ --config.epochs=0 --config.steps=60 \
    --config.batch_size=4 --config.accumulate=1 --config.data.max_length=256 --config.data.eval_limit=200 --config.generate=20

gave (jax 0.10.2, seed 0) loss 0.8737, perplexity 2.396 on 200 test questions and 1 of 20 answers right, in 9 min of a busy machine.
"""

from __future__ import annotations

import ml_collections

from configs.smollm2 import experiment


def get_config() -> ml_collections.ConfigDict:
    """Returns the experiment."""
    config = experiment("gsm8k", "lamda", learning_rate=2e-3, rank=32)
    config.generate = 100  # answered at the end, compared behind "####"
    return config
