"""Saving a model as a Hugging Face directory that transformers loads."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from lowrank_jax.files import write_directory
from lowrank_jax.models import hf_map
from lowrank_jax.models.tensors import INDEX_NAME, save_safetensors
from lowrank_jax.models.trees import Config, param_shapes

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


def save(
    params: Mapping[str, Any],
    config: Config,
    out_dir: str | os.PathLike[str],
    *,
    dtype: Any = None,
    max_shard_size: int = 5_000_000_000,
    tokenizer_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes config.json and model.safetensors; the directory appears only when it is complete.

    Args:
      params: the parameters of `build(config)`, in its layout; the host holds one shard of them at a time.
      config: decides architecture, head and names.
      out_dir: the directory to make; it may exist if it is empty.
      dtype: type of the stored tensors; by default that of each parameter.
      max_shard_size: bytes of tensors in one file; above it there are several and an index.
      tokenizer_from: a directory whose tokenizer files are copied.
      overwrite: replace a directory that is not empty.

    Returns:
      The directory.

    Raises:
      FileExistsError: out_dir is not empty and `overwrite` is False.
      ModelConfigError: the architecture cannot express the configuration.
      ValueError: params are not those of the configuration (merge or take off adapters first).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_jax.models import LlamaConfig, build
      >>> config = LlamaConfig.tiny()
      >>> params = build(config).init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
      >>> import tempfile
      >>> sorted(p.name for p in save(params, config, tempfile.mkdtemp()).iterdir())
      ['config.json', 'model.safetensors']
    """
    out = pathlib.Path(out_dir)
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another directory or pass overwrite=True")
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    _check(flat, config)
    stored = {path: np.dtype(leaf.dtype if dtype is None else dtype) for path, leaf in flat.items()}
    content = config.to_hf()
    # transformers 4 reads the one, 5 the other.
    content["dtype"] = content["torch_dtype"] = np.result_type(*set(stored.values())).name

    def fill(folder: pathlib.Path) -> None:
        (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        _write_weights(folder, flat, stored, config, max_shard_size)
        if tokenizer_from is not None:
            for name in _TOKENIZER_FILES:
                if (pathlib.Path(tokenizer_from) / name).is_file():
                    shutil.copyfile(pathlib.Path(tokenizer_from) / name, folder / name)

    write_directory(out, fill)
    return out


def _check(flat: Mapping[str, Any], config: Config) -> None:
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(param_shapes(config), sep="/").items()}
    for path in sorted(set(shapes) ^ set(flat)):
        problem = "is missing from params" if path in shapes else "is no parameter of this configuration"
        raise ValueError(f"{path!r} {problem}; expected those of build(config), with adapters merged or taken off")
    for path, shape in shapes.items():
        if flat[path].shape != shape:
            raise ValueError(f"{path!r} has shape {flat[path].shape}, expected {shape} by the configuration")


def _write_weights(
    directory: pathlib.Path,
    flat: Mapping[str, Any],
    stored: Mapping[str, np.dtype],
    config: Config,
    max_shard_size: int,
) -> None:
    # (name, entry, its number there) of every tensor, cut into runs that fit a file.
    shards: list[list[tuple[str, hf_map.Entry, int]]] = [[]]
    room, total = max_shard_size, 0
    for entry in hf_map.entries(config):
        size = int(np.prod(flat[entry.path].shape)) * stored[entry.path].itemsize // len(entry.names)
        for i, name in enumerate(entry.names):
            if size > room and shards[-1]:
                shards.append([])
                room = max_shard_size
            shards[-1].append((hf_map.hf_name(config, name), entry, i))
            room, total = room - size, total + size

    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, entry, i in shard:
            leaf = flat[entry.path]
            layer, expert = divmod(i, entry.experts or 1)
            leaf = leaf[layer] if entry.stacked else leaf
            array = np.asarray(leaf[expert] if entry.experts else leaf, stored[entry.path])
            tensors[name] = array.T if entry.transpose else array
            weight_map[name] = file
        save_safetensors(directory / file, tensors, {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
