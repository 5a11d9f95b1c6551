"""A Llama from scratch, with any way to learn it: at a size that two cores train in a few minutes, or those of the GaLore paper.

python -m train.pretrain --config=configs/pretrain.py:galore
python -m train.pretrain --config=configs/pretrain.py:60m/galore --config.data.name=text --config.data.directory=corpus/
python -m train.pretrain --config=configs/pretrain.py:350m/galore_8bit --config.data.name=tfds:lm1b

Without a size: four layers of width 128 on BBC News, 5 MB of articles, with a vocabulary of 2,048 trained on them. bench/pretrain.py runs
the recipes side by side. With a size: shapes, ranks, rates and row length of the paper, which trains 60m for 10,000 updates, 130m for
20,000, 350m for 60,000, 1b for 100,000 and 7b for 150,000; none of these has been run here.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

import ml_collections

from lowrank_jax.models.llama_sizes import GALORE_RANKS
from train.pretraining.config import ConfigError, base, method


class Recipe(NamedTuple):
    """How to learn.

    Attributes:
      learning_rate: at the small size. paper_rate: at the paper's. method: a name in train.pretraining.methods; fields: of it; ranked:
        whether its rank is set, a quarter of the width (the paper's at the paper's sizes).
    """

    learning_rate: float
    paper_rate: float
    method: str
    fields: dict[str, Any] = {}
    ranked: bool = False


RECIPES = {
    "adamw": Recipe(4e-3, 1e-3, "adamw"),
    "adamw_8bit": Recipe(4e-3, 1e-3, "adamw_8bit"),
    "galore": Recipe(2e-2, 1e-2, "galore", {}, True),
    "galore_8bit": Recipe(2e-2, 1e-2, "galore", {"bits8": True}, True),
    "dual_galore": Recipe(2e-2, 1e-2, "dual_galore", {}, True),
    "frugal": Recipe(4e-3, 1e-3, "frugal"),
    "lisa": Recipe(4e-3, 1e-3, "lisa"),
    "sltrain": Recipe(8e-3, 3e-3, "sltrain", {}, True),
    "lora": Recipe(8e-3, 3e-3, "lora", {}, True),
    "relora": Recipe(8e-3, 3e-3, "relora", {}, True),
}

_STEPS = {"60m": 10_000, "130m": 20_000, "350m": 60_000, "1b": 100_000, "7b": 150_000}


def get_config(which: str = "galore") -> ml_collections.ConfigDict:
    """Returns the experiment of a recipe, ``SIZE/RECIPE`` or ``RECIPE``.

    Raises:
      ConfigError: an unknown recipe or size.
    """
    size, _, name = which.rpartition("/")
    if name not in RECIPES or size not in ("", *_STEPS):
        near = difflib.get_close_matches(which, RECIPES, 1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"no recipe is called {which!r}.{hint} There are {', '.join(RECIPES)}, alone or after one of {', '.join(_STEPS)} and a slash."
        )
    recipe, config = RECIPES[name], base()
    config.name = f"pretrain_{which.replace('/', '_')}"
    rank = GALORE_RANKS[size] if size else 32
    config.method = method(recipe.method, **recipe.fields, **({"rank": rank} if recipe.ranked else {}))
    config.learning_rate = recipe.paper_rate if size else recipe.learning_rate
    if size:
        _paper(config, size)
    else:
        _small(config)
    return config


def _small(config: ml_collections.ConfigDict) -> None:
    config.model.hidden_size, config.model.intermediate_size, config.model.layers, config.model.heads = 128, 344, 4, 4
    config.tokenizer.vocab_size = 2048
    config.data.max_length, config.data.eval_limit = 128, 40
    config.batch_size, config.eval_batch_size, config.steps = 8, 32, 400
    config.eval_every, config.checkpoint_every = 100, 100
    if "refresh_every" in config.method:
        config.method.refresh_every = 50


def _paper(config: ml_collections.ConfigDict, size: str) -> None:
    config.model.size, config.model.dtype, config.model.param_dtype, config.model.remat = (
        size,
        "bfloat16",
        "bfloat16",
        "full",
    )
    config.tokenizer.vocab_size = 32_000
    config.data.max_length = 256
    config.batch_size, config.accumulate, config.steps = 512, 8, _STEPS[size]
    config.eval_every, config.checkpoint_every = 1000, 1000
    if size == "7b":
        config.learning_rate /= 2
        if "refresh_every" in config.method:
            config.method.refresh_every = 500
