"""The experiment of test_kill: its argument is the directory where model and data are, or will be."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))


def get_config(root: str) -> Any:
    """Returns the experiment."""
    import tiny

    config = tiny.config(pathlib.Path(root), "lamda", freeze=0.5, dropout=0.1)
    config.steps, config.checkpoint_every, config.eval_every, config.log_every = 60, 5, 20, 1
    config.batch_size, config.accumulate, config.weight_decay = 8, 2, 0.01
    return config
