"""The base that a run computes with: as loaded, or quantised while it is read, with the adapter's anchors folded in or beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import ml_collections

import lowrank_jax as lr
from lowrank_jax.checkpoint import Base
from lowrank_jax.quantized import is_quantized
from lowrank_jax.sites import flatten

_LAYERS = r"(.*/)?layers(_\d+)?/.*"  # embeddings and heads stay dense


def rules(config: ml_collections.ConfigDict) -> Mapping[str, str] | None:
    """The argument ``rules`` of `lowrank_jax.quantize`: the kernels of all layers; None: nothing is quantised."""
    return {_LAYERS: config.model.quantize} if config.model.quantize else None


def alone(config: ml_collections.ConfigDict, params: Any) -> Any:
    """The base without an adapter, from loaded parameters."""
    how = rules(config)
    return params if how is None else lr.quantize(params, how, block=config.model.quantize_block)


def under(config: ml_collections.ConfigDict, params: Any, adapters: lr.Adapters) -> tuple[Any, lr.Adapters]:
    """The base from loaded parameters, and an unfolded adapter as it acts on it.

    Where the base is quantised and anchors are folded, what is rounded is what the anchors leave (QPiSSA, Q-LaMDA).
    """
    if not config.fold:
        return alone(config, params), adapters
    return lr.fold(params, adapters, quantize=rules(config), block=config.model.quantize_block)


def reference(config: ml_collections.ConfigDict, base: Base) -> Base:
    """The reference of a run's base: that of the weights it is loaded from, and how they are quantised."""
    if not config.model.quantize:
        return base
    how = f"{config.model.quantize} in blocks of {config.model.quantize_block}"
    return Base(f"{base.name} ({how})", hashlib.sha256(f"{base.hash}:{how}".encode()).hexdigest())


def for_generation(model: nn.Module, params: Any, adapters: lr.Adapters | None) -> tuple[Callable[..., Any], Any]:
    """The arguments ``apply`` and ``params`` of `lowrank_jax.models.generate`: merged, or beside a base that merging would make dense."""
    if adapters is None:
        return model.apply, params
    if not any(map(is_quantized, flatten(params).values())):
        return model.apply, lr.merge(params, adapters)

    def apply(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return lr.linen.apply(model, *variables["params"], *args, **kwargs)

    return apply, (params, adapters)
