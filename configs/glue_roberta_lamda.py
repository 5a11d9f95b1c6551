"""LaMDA on RoBERTa-base and a GLUE task; needs the network for the model and, without --config.data.directory, for the task.

python -m train.finetune --config=configs/glue_roberta_lamda.py:sst2
"""

from __future__ import annotations

import ml_collections

from train.config import base, rule


def get_config(task: str = "sst2") -> ml_collections.ConfigDict:
    """Returns the experiment on a GLUE task: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte."""
    config = base()
    config.name = f"glue_{task}_roberta_lamda"
    config.model.source = "roberta-base"
    config.data.name, config.data.max_length = f"glue/{task}", 128
    config.data.eval_split = "validation"
    config.adapter = rule("lamda", r"encoder/.*/(query|key|value|output|intermediate)", rank=32)
    config.head = rule("full", "classifier/.*", learning_rate=1e-3)
    config.epochs, config.batch_size, config.eval_batch_size = 5.0, 32, 64
    config.learning_rate = 1e-3
    config.eval_every, config.checkpoint_every, config.patience = 500, 250, 5
    return config
