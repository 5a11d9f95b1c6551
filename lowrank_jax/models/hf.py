"""Loading published weights in the Hugging Face layout: config.json and safetensors.

One parameter at a time goes from the mapped file to its place on the devices: the host holds the one being assembled and nothing
else, whatever the layout and the sharding.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from lowrank_jax.files import json_object
from lowrank_jax.models import hf_map
from lowrank_jax.models.configs import BertConfig, from_hf
from lowrank_jax.models.tensors import LazyTensor, open_safetensors
from lowrank_jax.models.trees import Config, build, param_shapes
from lowrank_jax.quantize import quantize as quantise
from lowrank_jax.unread import Unread, place, read

ShardingFn = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]

# Weights at the top of the repository only: sub-folders hold exports to other frameworks.
_WANTED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
)


class CheckpointError(ValueError):
    """A checkpoint does not hold the tensors that its configuration promises."""


class Loaded(NamedTuple):
    """A model with its published weights.

    Attributes:
      model: the Linen module; `model.apply({"params": params}, tokens)`.
      params: nested dict of arrays of `config.param_dtype`, or of what `load` was asked to hold instead.
      config: what was read, with the overrides of the caller.
      tokenizer_file: the checkpoint's tokenizer.json, or None if it has none.
      architecture: such as 'bert' or 'qwen3'.
      directory: where the files are.
      fresh: paths of the parameters of a head that the checkpoint lacks and that were initialised at random.
      ignored: tensors that were left unread knowingly: buffers, tied copies, heads of other tasks.
    """

    model: nn.Module
    params: dict[str, Any]
    config: Config
    tokenizer_file: pathlib.Path | None
    architecture: str
    directory: pathlib.Path
    fresh: tuple[str, ...]
    ignored: tuple[str, ...]


def load(
    path_or_name: str | os.PathLike[str],
    *,
    task: str | None = None,
    num_labels: int | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: str = "none",
    sharding: ShardingFn | None = None,
    quantize: Mapping[str, str] | None = None,
    block: int = 64,
    unread: bool = False,
    revision: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Loaded:
    """Loads a checkpoint from a directory, or from the Hugging Face hub by name.

    Args:
      path_or_name: a directory with config.json and safetensors, or a name such as 'roberta-base'.
      task: 'encoder', 'classify', 'mlm' or 'causal_lm'; by default what config.json names.
      num_labels: classes of the 'classify' head; if it differs from the checkpoint's, the head is made afresh.
      dtype: type of the activations.
      param_dtype: type of the parameters; pass bfloat16 to keep a large model as it is published.
      scan_layers: stack the layers for `nn.scan`.
      remat: see `ModelConfig`.
      sharding: gives the sharding of a parameter from its path (joined by '/') and shape; None leaves it to JAX.
      quantize, block: as in `lowrank_jax.quantize`; each weight is quantised as it is read, a stack layer by layer.
      unread: leave the weights in their files, as `lowrank_jax.unread.Unread`, for `lowrank_jax.init`, `fold` and `quantize`.
      revision: branch, tag or commit on the hub.
      seed: for a head that the checkpoint lacks.
      **overrides: further fields of the configuration, such as classifier_pooling="mean".

    Raises:
      ModelConfigError: the architecture, or something its config.json asks for, is not supported.
      CheckpointError: a tensor is missing, unexpected, or of the wrong shape or type.
      ValueError: a quantisation that does not fit the model.
      FileNotFoundError: the directory lacks a file.
      ConnectionError: it is no directory, and the hub could not give it.

    Example:
      >>> import tempfile
      >>> from lowrank_jax.models import BertConfig, save
      >>> config = BertConfig.tiny()
      >>> params = build(config).init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
      >>> where = save(params, config, tempfile.mkdtemp())
      >>> load(where, task="classify", num_labels=3).fresh
      ('classifier/bias', 'classifier/kernel')
    """
    directory = _directory(path_or_name, revision)
    hf = _read_config(directory)
    overrides |= {"dtype": dtype, "param_dtype": param_dtype, "scan_layers": scan_layers, "remat": remat}
    config = _configure(hf, task, num_labels, overrides)
    tensors = {hf_map.canonical(name): tensor for name, tensor in _open(directory).items()}
    check_depth(directory, config, tensors)
    if isinstance(config, BertConfig) and config.task == "encoder" and "use_pooler" not in overrides:
        config = dataclasses.replace(config, use_pooler="pooler.dense.weight" in tensors)

    shapes = traverse_util.flatten_dict(param_shapes(config), sep="/")
    table = hf_map.entries(config)
    fresh = _fresh(config, table, shapes, tensors, num_labels is not None)
    wanted = {name for entry in table if entry.path not in fresh for name in entry.names}
    unwanted = sorted(set(tensors) - wanted)
    unexpected = [name for name in unwanted if not hf_map.ignorable(config, name) and name not in _names(table, fresh)]
    if unexpected:
        raise CheckpointError(
            f"{directory}: tensors {unexpected[:5]} ({len(unexpected)} in all) belong to no parameter of a "
            f"{config.architecture} model with task {config.task!r}; is config.json that of these weights?"
        )
    _check(directory, table, fresh, shapes, tensors)

    key = jax.random.key(seed)
    flat: dict[str, Any] = {}
    for i, entry in enumerate(table):
        shape, path = shapes[entry.path].shape, entry.path
        where = None if sharding is None else sharding(path, shape)
        if path in fresh:
            flat[path] = place(_initial(config, path, shape, jax.random.fold_in(key, i)), where)
        else:
            flat[path] = still(entry, tensors, shape, param_dtype, where)
    tokenizer = directory / "tokenizer.json"
    return Loaded(
        model=build(config),
        params=held(traverse_util.unflatten_dict(flat, sep="/"), quantize, block, unread),
        config=config,
        tokenizer_file=tokenizer if tokenizer.is_file() else None,
        architecture=config.architecture,
        directory=directory,
        fresh=tuple(sorted(fresh)),
        ignored=tuple(unwanted),
    )


def _directory(path_or_name: str | os.PathLike[str], revision: str | None) -> pathlib.Path:
    local = pathlib.Path(path_or_name)
    if local.is_dir():
        return local
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(str(path_or_name), revision=revision, allow_patterns=list(_WANTED))
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{path_or_name}: neither a directory nor a name on the Hugging Face hub") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{path_or_name}: not a directory, and the Hugging Face hub could not give it ({type(error).__name__}). "
            "Check the name and the network, or download the files elsewhere and pass their directory."
        ) from error
    return pathlib.Path(found)


def _read_config(directory: pathlib.Path) -> Mapping[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a checkpoint directory needs a config.json")
    try:
        return json_object(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} {error}; fetch it again") from error


def _configure(hf: Mapping[str, Any], task: str | None, num_labels: int | None, overrides: Mapping[str, Any]) -> Config:
    changes = dict(overrides)
    if hf.get("model_type") in ("bert", "roberta"):
        changes |= {} if task is None else {"task": task}
        changes |= {} if num_labels is None else {"num_labels": num_labels}
        # The head that the file names may be one that the given task replaces.
        return from_hf({**hf, "architectures": []} if task is not None else hf, **changes)
    if task not in (None, "causal_lm") or num_labels is not None:
        raise CheckpointError(
            f"task={task!r}, num_labels={num_labels}: a {hf.get('model_type')!r} model has only 'causal_lm'"
        )
    return from_hf(hf, **changes)


def _open(directory: pathlib.Path) -> Mapping[str, LazyTensor]:
    pickled = sorted(file.name for file in directory.glob("*.bin"))
    if pickled and not any(directory.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{directory}: the weights are pickled ({pickled[0]}), which can run code and is never read here; "
            "convert them to safetensors with transformers' save_pretrained"
        )
    return open_safetensors(directory)


def _names(table: list[hf_map.Entry], paths: set[str]) -> set[str]:
    return {name for entry in table if entry.path in paths for name in entry.names}


def _fresh(
    config: Config,
    table: list[hf_map.Entry],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Mapping[str, LazyTensor],
    relabel: bool,
) -> set[str]:
    """Paths of head parameters to initialise: absent from the file, or a classifier of another number of classes."""
    fresh = set()
    for entry in table:
        if not hf_map.may_be_fresh(entry.path):
            continue
        tensor = tensors.get(entry.names[0])
        classes = shapes[entry.path].shape[-1:] == (getattr(config, "num_labels", None),)
        if tensor is None or (relabel and classes and _shape(entry, tensor) != shapes[entry.path].shape):
            fresh.add(entry.path)
    return fresh


def _shape(entry: hf_map.Entry, tensor: LazyTensor) -> tuple[int, ...]:
    return tensor.shape[::-1] if entry.transpose else tensor.shape


def check_depth(file: pathlib.Path, config: Config, tensors: Mapping[str, LazyTensor]) -> None:
    """Raises a CheckpointError for more layers than there are tensors, before anything is made for each of them."""
    if config.num_hidden_layers > len(tensors):
        raise CheckpointError(
            f"{file}: {config.num_hidden_layers} layers are announced, but there are {len(tensors)} tensors; is a shard absent?"
        )


def _check(
    directory: pathlib.Path,
    table: list[hf_map.Entry],
    fresh: set[str],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Mapping[str, LazyTensor],
) -> None:
    """Refuses a checkpoint with a missing, misshapen or non-floating tensor before any is read."""
    for entry in table:
        if entry.path in fresh:
            continue
        expected = shapes[entry.path].shape[int(entry.stacked) + (entry.experts > 0) :]
        for name in entry.names:
            if name not in tensors:
                raise CheckpointError(
                    f"{directory}: tensor {name!r}, parameter {entry.path!r}, is missing; is a shard absent?"
                )
            found, kind = _shape(entry, tensors[name]), tensors[name].dtype
            if found != expected:
                raise CheckpointError(
                    f"{tensors[name].file}: tensor {name!r} gives shape {found} for parameter {entry.path!r}, "
                    f"expected {expected}; is config.json that of these weights?"
                )
            if not jnp.issubdtype(kind, jnp.floating):
                raise CheckpointError(f"{tensors[name].file}: tensor {name!r} has type {kind}, expected floating point")


def still(
    entry: hf_map.Entry, tensors: Mapping[str, LazyTensor], shape: tuple[int, ...], dtype: Any, where: Any
) -> Unread:
    """A parameter that is still in its file."""

    def one(name: str) -> np.ndarray:
        return tensors[name].read().T if entry.transpose else tensors[name].read()

    def reader(names: tuple[str, ...]) -> Callable[[], np.ndarray]:
        return lambda: np.stack([one(name) for name in names]) if entry.experts else one(names[0])

    size = entry.experts or 1
    layers = [entry.names[i : i + size] for i in range(0, len(entry.names), size)]
    return Unread(shape, dtype, [reader(names) for names in layers], entry.stacked, where)


def held(params: Any, quantize: Mapping[str, str] | None, block: int, unread: bool) -> Any:
    """Unread parameters as `load` is asked to give them."""
    if unread and quantize is not None:
        raise ValueError("load: unread=True reads nothing, so there is nothing to quantize; give one of the two.")
    if quantize is not None:
        return quantise(params, quantize, block=block)
    return params if unread else read(params)


def _initial(config: Config, path: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    if path.endswith("/kernel"):
        return config.initializer_range * jax.random.normal(key, shape, config.param_dtype)
    return (jnp.ones if path.endswith("/scale") else jnp.zeros)(shape, config.param_dtype)
