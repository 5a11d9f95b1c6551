"""The configuration of a run: every field with its default, and the checks made before anything is computed.

A config file returns `base()` with some fields changed. Any field can be given on the command line: --config.adapter.rank=16.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

import lowrank_jax as lr
from lowrank_jax.quantized import KINDS
from lowrank_jax.shard import AXES, ROWS

TASKS = ("classification", "causal_lm")
DTYPES = ("float32", "bfloat16")
# Fields of a rule that are not fields of its method.
_RULE = ("pattern", "method", "learning_rate", "layers")


class ConfigError(ValueError):
    """A field that does not exist or holds a value that makes no sense."""


def base() -> ml_collections.ConfigDict:
    """Returns a configuration with every field at its default.

    Fields:
      name: of the run; task: 'classification' or 'causal_lm'; seed: of the adapters, the order of the data, and dropout.
      workdir: where everything is written; '' means runs/<name>.
      model: source (an asset such as 'minilm', a directory, a GGUF file, or a name on the hub), pooling of a classifier ('' as
        published, 'cls', 'mean'), dtype of the activations, param_dtype of the base, scan_layers, remat ('none', 'full', 'dots',
        'adapter', 'adapter_offload' or a policy of jax.checkpoint_policies), dropout (whether the model's own dropout is on in training),
        attention ('' leaves it to JAX, 'xla', 'cudnn', or 'splash': a causal_lm on one TPU), loss_chunk (tokens a shard of the batch
        whose logits exist at once, causal_lm only; 0: all), capacity_factor (places an expert of a mixture keeps for tokens, as a
        multiple of an even share; 0: for all, exact but at the cost of all experts), quantize ('' or what the kernels of all layers are
        held in, 'int8' or 'nf4'), quantize_block (numbers that share a scale).
      data: see `train.data.load`; eval_limit and limit take the first so many examples, test_split '' means no test.
      adapter, head: a rule each, see `rule`; None leaves it out. more: further rules by name. exclude: patterns to leave alone.
      allow_dense: let a weight that cannot be intercepted be adapted by a dense update.
      steps: updates in all, or 0 and epochs instead. batch_size: rows an update; accumulate: the number of microbatches that
        an update is computed in. eval_batch_size: rows of an evaluation batch.
      learning_rate, warmup (share of the run), decay ('cosine', 'linear' or 'constant'), final (share of the rate at the end),
        weight_decay (matrices only), b1, b2, eps, clip (global norm of the trained leaves' gradient, 0: none).
      log_every, eval_every, checkpoint_every: in updates; 0: at the end only. keep: checkpoints kept beside the best.
      patience: evaluations without improvement before the run stops; 0: never. best: keep the best evaluation's adapter as
        the result, not the last.
      generate: examples of the evaluation split to answer by generation (exact match), causal_lm only; max_new_tokens: of each.
      statistics: batches (training batches read before the run by methods that start from data), tuned (the adapter directory of a full
        fine-tuning run, for methods that allocate ranks by contribution).
      fold: move anchors into a copy of the base, so that they cost nothing in training.
      mesh: sizes of the axes 'data', 'fsdp', 'tensor' and 'expert'; their product is the number of devices used. Rows of a batch are
        dealt out over all but 'tensor', weights over 'fsdp' and 'tensor', experts of a mixture over 'expert' as well.

    Example:
      >>> base().mesh.to_dict()
      {'data': 1, 'expert': 1, 'fsdp': 1, 'tensor': 1}
    """
    config = ml_collections.ConfigDict()
    config.name = "run"
    config.task = "classification"
    config.seed = 0
    config.workdir = ""
    config.model = ml_collections.ConfigDict(
        {"source": "minilm", "pooling": "", "dtype": "float32", "param_dtype": "float32", "scan_layers": True,
         "remat": "none", "dropout": False, "attention": "", "loss_chunk": 1024, "capacity_factor": 0.0,
         "quantize": "", "quantize_block": 64}
    )  # fmt: skip
    config.data = ml_collections.ConfigDict(
        {"name": "tweets", "directory": "", "train_split": "train", "eval_split": "validation", "test_split": "",
         "max_length": 64, "limit": 0, "eval_limit": 0, "pack": False, "chat": False}
    )  # fmt: skip
    config.adapter = placeholder(ml_collections.ConfigDict)
    config.head = placeholder(ml_collections.ConfigDict)
    config.more = ml_collections.ConfigDict()
    config.exclude = ()
    config.allow_dense = False
    config.steps = 0
    config.epochs = 0.0
    config.batch_size = 32
    config.accumulate = 1
    config.eval_batch_size = 64
    config.learning_rate = 1e-3
    config.warmup = 0.06
    config.decay = "cosine"
    config.final = 0.0
    config.weight_decay = 0.0
    config.b1, config.b2, config.eps = 0.9, 0.999, 1e-8
    config.clip = 1.0
    config.log_every = 10
    config.eval_every = 0
    config.checkpoint_every = 0
    config.keep = 2
    config.patience = 0
    config.best = True
    config.generate = 0
    config.max_new_tokens = 256
    config.statistics = ml_collections.ConfigDict({"batches": 8, "tuned": ""})
    config.fold = True
    config.mesh = ml_collections.ConfigDict(dict.fromkeys(AXES, 1))
    return config


def rule(method: str, pattern: str, *, learning_rate: float = 0.0, layers: tuple[int, ...] = (), **fields: Any) -> Any:
    """One rule of the plan as plain data, with every field of its method, so that each can be given on the command line.

    Args:
      method: a name in `lowrank_jax.methods.names()`. pattern: a regular expression on paths, see `lowrank_jax.plan`.
      learning_rate: of the leaves of these weights; 0: the run's. layers: restrict to these; (): all.
      fields: of the method.

    Raises:
      ConfigError: an unknown method or field.

    Example:
      >>> rule("lora", ".*/query", rank=4).rank
      4
    """
    config = dict(_method(method, fields, method).config)
    out = ml_collections.ConfigDict(
        {"method": method, "pattern": pattern, "learning_rate": learning_rate, "layers": tuple(layers)}
    )
    for name, value in config.items():
        if value is not None:
            out[name] = value
        elif name in ("alpha",):
            out[name] = placeholder(float)
    return out


def rules(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The rules of a configuration, by name: 'adapter', 'head' and those of `more`."""
    found = {name: config[name] for name in ("adapter", "head") if config[name] is not None}
    return found | dict(config.more)


def plan_rules(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The argument ``rules`` of `lowrank_jax.plan`.

    Raises:
      ConfigError: no rule, two with one pattern, an unknown method or field.
    """
    made: dict[str, Any] = {}
    for name, one in rules(config).items():
        if one.get("pattern") is None or one.get("method") is None:
            raise ConfigError(
                f"config.{name}: a rule needs `pattern` and `method`; write train.config.rule('lora', '.*/query')."
            )
        fields = {k: v for k, v in one.items() if k not in _RULE and v is not None}
        method = _method(one.method, fields, f"config.{name}")
        if one.pattern in made:
            raise ConfigError(f"config.{name}.pattern={one.pattern!r} is the pattern of another rule too.")
        made[one.pattern] = lr.on_layers(method, one.layers) if one.get("layers") else method
    if not made:
        raise ConfigError("config.adapter, config.head and config.more hold no rule: nothing would be trained.")
    return made


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ConfigError that names the first field with a value that makes no sense."""
    choices = {"task": TASKS, "decay": ("cosine", "linear", "constant")}
    for name, allowed in choices.items():
        require(config[name] in allowed, name, config[name], f"one of {', '.join(allowed)}")
    for name in ("dtype", "param_dtype"):
        require(config.model[name] in DTYPES, f"model.{name}", config.model[name], f"one of {', '.join(DTYPES)}")
    attention = config.model.attention
    require(attention in ("", "xla", "cudnn", "splash"), "model.attention", attention, "'', 'xla', 'cudnn' or 'splash'")
    one = config.task == "causal_lm" and max(config.mesh.values()) == 1
    require(
        attention != "splash" or one, "model.attention", attention, "not 'splash' unless a causal_lm runs on one device"
    )
    require(
        config.model.loss_chunk >= 0, "model.loss_chunk", config.model.loss_chunk, "a number of tokens, or 0 for all"
    )
    kind = config.model.quantize
    require(kind in ("", *KINDS), "model.quantize", kind, f"'' or one of {', '.join(KINDS)}")
    require((config.steps > 0) != (config.epochs > 0), "steps", config.steps, "either steps or epochs above 0")
    for name in ("batch_size", "accumulate", "eval_batch_size", "log_every", "keep"):
        require(config[name] >= 1, name, config[name], "at least 1")
    for name in ("eval_every", "checkpoint_every", "patience", "generate", "weight_decay", "clip"):
        require(config[name] >= 0, name, config[name], "at least 0")
    require(config.learning_rate > 0, "learning_rate", config.learning_rate, "above 0")
    require(0 <= config.warmup < 1, "warmup", config.warmup, "a share of the run in [0, 1)")
    require(config.statistics.batches >= 1, "statistics.batches", config.statistics.batches, "at least 1")
    check_mesh(config)
    require(
        not config.generate or config.task == "causal_lm", "generate", config.generate, "0 unless task is causal_lm"
    )
    for pattern, rule in plan_rules(config).items():
        method = rule if isinstance(rule, lr.Method) else rule.method
        whole = method.allocate is not None or bool(method.needs - {"kernel"})
        require(
            not (kind and whole),
            "model.quantize",
            kind,
            f"'', as {method.name} ({pattern!r}) reads all of the dense base at once",
        )


def model_fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """How the model computes, as fields of its own configuration."""
    fields: dict[str, Any] = {"attention_implementation": config.model.attention or None}
    if config.task == "causal_lm":
        fields["loss_chunk"] = config.model.loss_chunk * row_shards(config)
    if factor := config.model.capacity_factor:
        require(config.task == "causal_lm", "model.capacity_factor", factor, "0 in a classification")
        fields["capacity_factor"] = factor
    return fields


def row_shards(config: ml_collections.ConfigDict) -> int:
    """Over how many parts of the mesh the rows of a batch are dealt out."""
    return math.prod(config.mesh[axis] for axis in ROWS)


def check_mesh(config: ml_collections.ConfigDict) -> None:
    """Raises a ConfigError unless the rows of a batch can be dealt out to microbatches and devices."""
    rows, shards = config.batch_size // config.accumulate, row_shards(config)
    require(
        config.batch_size % config.accumulate == 0, "accumulate", config.accumulate, f"a divisor of batch_size={config.batch_size}"
    )  # fmt: skip
    require(min(config.mesh.values()) >= 1, "mesh", config.mesh.to_dict(), "sizes of at least 1")
    needed = f"a multiple of accumulate x {' x '.join(f'mesh.{axis}' for axis in ROWS)} = {shards * config.accumulate}"
    require(rows % shards == 0, "batch_size", config.batch_size, needed)
    require(config.eval_batch_size % shards == 0, "eval_batch_size", config.eval_batch_size, f"a multiple of {shards}")


def workdir(config: ml_collections.ConfigDict) -> pathlib.Path:
    """The directory of the run."""
    return pathlib.Path(config.workdir or f"runs/{config.name}").absolute()


def to_json(config: ml_collections.ConfigDict) -> str:
    """The configuration as JSON; `from_json` reads it back."""
    return config.to_json_best_effort(sort_keys=True)


def from_json(text: str) -> ml_collections.ConfigDict:
    """Inverse of `to_json`; fields that an older version of the project did not have get their defaults."""
    config = base()
    config.unlock()
    _update(config, json.loads(text))
    return config


def _update(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            if not isinstance(config.get(name), ml_collections.ConfigDict):
                config[name] = ml_collections.ConfigDict()
            _update(config[name], value)
        elif isinstance(value, list):
            config[name] = tuple(value)
        elif value is not None or name not in config:
            config[name] = value


def _method(name: str, fields: Mapping[str, Any], where: str) -> lr.Method:
    try:
        return lr.build(name, fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def require(fits: bool, field: str, value: Any, expected: str) -> None:
    """Raises a ConfigError that names the field, its value and what was expected, unless it fits."""
    if not fits:
        raise ConfigError(f"config.{field}={value!r}: expected {expected}.")
