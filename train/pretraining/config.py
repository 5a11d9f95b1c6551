"""The configuration of a pre-training run. A config file returns `base()` with some fields changed."""

from __future__ import annotations

import inspect
from typing import Any

import ml_collections

from lowrank_jax.shard import AXES
from train.config import DTYPES, ConfigError, check_mesh, require
from train.pretraining.methods import METHODS

SIZES = ("60m", "130m", "350m", "1b", "7b")


def base() -> ml_collections.ConfigDict:
    """Returns a configuration with every field at its default.

    Fields:
      name: of the run; seed: of the weights, the order of the data and what methods draw; workdir: '' means runs/<name>.
      model: size (of the GaLore paper: '60m', '130m', '350m', '1b', '7b'), hidden_size, intermediate_size, layers, heads (0: the
        size's), init_std (of all matrices), dtype of the activations, param_dtype, scan_layers, remat (as in train.config).
      tokenizer: source (an asset, a directory, a GGUF file or a hub name; '' trains one on the corpus), vocab_size of the trained one.
      data: name ('text' with a directory or file, 'bbc_text', 'tfds:...'; see `train.data.load`), directory, train_split, eval_split,
        max_length (tokens of a row), eval_limit (documents; 0: all).
      method: from `method`.
      layerwise: update each layer as soon as its gradient is known, so that no more than one layer's exists (see
        `lowrank_jax.optim.layerwise_update`); for adamw, adamw_8bit, galore and frugal. A loss that is not finite then stops the run
        before a weight is touched, a gradient after it; what a method draws at random is the same for every layer.
      steps, batch_size, accumulate, eval_batch_size, learning_rate, warmup, decay, final, weight_decay (matrices only), b1, b2, eps,
        clip (global norm, 0: none), log_every, eval_every, checkpoint_every, keep, mesh: as in train.config.

    Example:
      >>> base().model.size, base().method.name
      ('60m', 'adamw')
    """
    config = ml_collections.ConfigDict()
    config.name, config.workdir, config.seed = "pretrain", "", 0
    config.model = ml_collections.ConfigDict(
        {"size": "60m", "hidden_size": 0, "intermediate_size": 0, "layers": 0, "heads": 0, "init_std": 0.02,
         "dtype": "float32", "param_dtype": "float32", "scan_layers": True, "remat": "none"}
    )  # fmt: skip
    config.tokenizer = ml_collections.ConfigDict({"source": "", "vocab_size": 4096})
    config.data = ml_collections.ConfigDict(
        {"name": "bbc_text", "directory": "", "train_split": "train", "eval_split": "validation", "max_length": 256,
         "eval_limit": 0}
    )  # fmt: skip
    config.method = method("adamw")
    config.layerwise = False
    config.steps = 1000
    config.batch_size, config.accumulate, config.eval_batch_size = 16, 1, 16
    config.learning_rate, config.warmup, config.decay, config.final = 1e-3, 0.1, "cosine", 0.1
    config.weight_decay, config.b1, config.b2, config.eps, config.clip = 0.0, 0.9, 0.999, 1e-8, 0.0
    config.log_every, config.eval_every, config.checkpoint_every, config.keep = 10, 0, 0, 2
    config.mesh = ml_collections.ConfigDict(dict.fromkeys(AXES, 1))
    return config


def method(name: str, **fields: Any) -> ml_collections.ConfigDict:
    """A method of `train.pretraining.methods` as plain data, with every field, so that each can be given on the command line.

    Raises:
      ConfigError: an unknown method or field.

    Example:
      >>> method("galore", rank=64).scale
      0.25
    """
    require(name in METHODS, "method.name", name, f"one of {', '.join(METHODS)}")
    known = {
        field: parameter.default
        for field, parameter in inspect.signature(METHODS[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for field in fields:
        require(field in known, f"method.{field}", fields[field], f"a field of {name}: {', '.join(known) or 'none'}")
    return ml_collections.ConfigDict({"name": name} | known | fields)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ConfigError that names the first field with a value that makes no sense."""
    require(config.model.size in SIZES, "model.size", config.model.size, f"one of {', '.join(SIZES)}")
    for name in ("dtype", "param_dtype"):
        require(config.model[name] in DTYPES, f"model.{name}", config.model[name], f"one of {', '.join(DTYPES)}")
    for name in ("steps", "batch_size", "accumulate", "eval_batch_size", "log_every", "keep"):
        require(config[name] >= 1, name, config[name], "at least 1")
    for name in ("eval_every", "checkpoint_every", "weight_decay", "clip"):
        require(config[name] >= 0, name, config[name], "at least 0")
    require(config.learning_rate > 0, "learning_rate", config.learning_rate, "above 0")
    require(0 <= config.warmup < 1, "warmup", config.warmup, "a share of the run in [0, 1)")
    require(config.decay in ("cosine", "linear", "constant"), "decay", config.decay, "cosine, linear or constant")
    heads, width = config.model.heads, config.model.hidden_size
    require(not heads or not width or width % heads == 0, "model.heads", heads, f"a divisor of hidden_size={width}")
    if config.layerwise:
        for name, value in (("accumulate", 1), ("clip", 0.0)):
            require(
                config[name] == value,
                name,
                config[name],
                f"{value} with layerwise, which has no gradient of the whole model",
            )
        require(config.model.scan_layers, "model.scan_layers", False, "True with layerwise")
    check_mesh(config)
    fields = {k: v for k, v in config.method.items() if k != "name"}
    method(config.method.name, **fields)


__all__ = ["ConfigError", "base", "check", "method"]
