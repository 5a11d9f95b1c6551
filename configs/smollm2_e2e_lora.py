r"""LoRA on SmolLM2-135M-Instruct and E2E NLG (train.txt, valid.txt and test.txt, lines of data||text).

python -m train.finetune --config=configs/smollm2_e2e_lora.py --config.data.directory=e2e/

Without a directory the data set is fetched by name, which gives the cleaned edition: its scores compare with no paper on the original. The
whole run, three epochs, takes an accelerator and has not been made. Shortened for two CPU cores, and trained on the validation split,

python -m train.finetune --config=configs/smollm2_e2e_lora.py --config.data.directory=e2e/ --config.data.train_split=validation \
    --config.data.eval_split=test --config.epochs=0 --config.steps=60 --config.batch_size=4 --config.accumulate=1 \
    --config.data.max_length=128 --config.data.eval_limit=200

gave (jax 0.10.2, seed 0) loss 1.3542, perplexity 3.874 on 200 test examples, in 2 min 58 s.
"""

from __future__ import annotations

import ml_collections

from configs.smollm2 import experiment


def get_config() -> ml_collections.ConfigDict:
    """Returns the experiment."""
    return experiment("e2e", "lora", learning_rate=5e-4, rank=16, alpha=16.0)
