"""Loading a Llama model from a GGUF file into the parameter tree that safetensors weights would give."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from lowrank_jax.models import hf, hf_map
from lowrank_jax.models.configs import from_hf
from lowrank_jax.models.gguf import as_hf_tensors, hf_config, open_gguf
from lowrank_jax.models.trees import build, param_shapes


def load_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: str = "none",
    sharding: hf.ShardingFn | None = None,
    quantize: Mapping[str, str] | None = None,
    block: int = 64,
    unread: bool = False,
) -> hf.Loaded:
    """Loads a model from a GGUF file, decoding one parameter at a time.

    Quantised weights become plain numbers again and keep their rounding: fine-tuning starts from what the
        file holds,
    and singular values of such weights have a floor of rounding noise.

    Args:
        path: the file.
        dtype: type of the activations.
        param_dtype: type of the parameters.
        scan_layers: stack the layers for `nn.scan`.
        remat: see `ModelConfig`.
        sharding: gives the sharding of a parameter from its path (joined by '/') and shape; None leaves it to
            JAX.
        quantize, block, unread: as in `lowrank_jax.models.load`; what the file rounded is rounded again.

    Raises:
        FileNotFoundError: no such file.
        CorruptFileError: the bytes contradict themselves.
        NotImplementedError: an architecture or a tensor type that is not read here.
        CheckpointError: a tensor is missing or of the wrong shape.

    Example:
        >>> from lowrank_jax import assets
        >>> load_gguf(assets.fetch("smollm2")).config.hidden_size  # doctest: +SKIP
        576
    """
    gguf = open_gguf(path)
    config = from_hf(hf_config(gguf), dtype=dtype, param_dtype=param_dtype, scan_layers=scan_layers, remat=remat)
    tensors = {hf_map.canonical(name): tensor for name, tensor in as_hf_tensors(gguf).items()}
    hf.check_depth(gguf.file, config, tensors)
    table = hf_map.entries(config)
    unexpected = sorted(set(tensors) - {name for entry in table for name in entry.names})
    if unexpected:
        raise hf.CheckpointError(f"{path}: tensors {unexpected[:5]} belong to no parameter of a Llama model.")
    shapes = traverse_util.flatten_dict(param_shapes(config), sep="/")
    hf._check(gguf.file, table, set(), shapes, tensors)
    flat = {}
    for entry in table:
        shape = shapes[entry.path].shape
        where = None if sharding is None else sharding(entry.path, shape)
        flat[entry.path] = hf.still(entry, tensors, shape, param_dtype, where)
    return hf.Loaded(
        model=build(config),
        params=hf.held(traverse_util.unflatten_dict(flat, sep="/"), quantize, block, unread),
        config=config,
        tokenizer_file=None,
        architecture=config.architecture,
        directory=gguf.file.parent,
        fresh=(),
        ignored=(),
    )
