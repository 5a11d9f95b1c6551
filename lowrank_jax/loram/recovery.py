"""A LoRA of the small model on the whole one, and back."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters import Adapters
from lowrank_jax.forms import UnsupportedError
from lowrank_jax.loram.units import Kept, along, take
from lowrank_jax.methods.base import Leaves
from lowrank_jax.plan import Entry, from_config
from lowrank_jax.sites import Site


def recover(
    adapters: Adapters,
    kept: Mapping[str, Kept],
    params: Any,
    fill: Literal["zero", "normal"] = "zero",
    key: jax.Array | None = None,
) -> Adapters:
    """A LoRA of the small model as one of the whole model.

    Args:
      adapters: trained on ``prune(params, kept)``. params: of the whole model.
      fill: what stands in ``a`` for inputs that were cut: ``zero``, or ``normal`` with deviation 1/r, as the release can (the update then
        acts on them too). ``b`` is zero for outputs that were cut.
      key: for ``normal``.

    Raises:
      UnsupportedError: another method than lora on a weight that was cut (a head trained in full stays as it is).
      ValueError: an adapter or parameters of another model; no key.
    """
    if fill not in ("zero", "normal") or (fill == "normal") != (key is not None):
        raise ValueError(f"recover(fill={fill!r}): expected 'zero', or 'normal' with a key.")

    def place(leaf: jax.Array, where: np.ndarray, size: int, axis: int, noise: jax.Array | float) -> jax.Array:
        batch = where.shape[:-1]
        source = np.full((*batch, size), -1)
        np.put_along_axis(source, where, np.broadcast_to(np.arange(where.shape[-1]), where.shape), -1)
        is_kept = along(source >= 0, axis)
        return jnp.where(is_kept, take(leaf, np.maximum(source, 0), axis), noise).astype(leaf.dtype)

    def of_entry(entry: Entry, one: Kept, leaves: Leaves) -> Leaves:
        a, b = leaves["a"], leaves["b"]
        inputs, outputs = _of_layers(entry, one)
        if inputs is not None:
            shape = (*a.shape[:-2], one.site.n_in, a.shape[-1])
            noise: jax.Array | float = 0.0
            if key is not None:
                own = jax.random.fold_in(key, np.uint32(zlib.crc32(entry.site.path.encode())))
                noise = jax.random.normal(own, shape) / a.shape[-1]
            a = place(a, inputs, one.site.n_in, -2, noise)
        return {"a": a, "b": b if outputs is None else place(b, outputs, one.site.n_out, -1, 0.0)}

    return _moved(adapters, kept, params, of_entry, lambda one: (one.small, one.site))


def shrink(adapters: Adapters, kept: Mapping[str, Kept], params: Any) -> Adapters:
    """A LoRA of the whole model cut down to the small one, whose parameters are given: undoes `recover`.

    Raises:
      UnsupportedError: another method than lora on a weight that is cut. ValueError: an adapter or parameters of another model.
    """

    def of_entry(entry: Entry, one: Kept, leaves: Leaves) -> Leaves:
        inputs, outputs = _of_layers(entry, one)
        return {"a": take(leaves["a"], inputs, -2), "b": take(leaves["b"], outputs, -1)}

    return _moved(adapters, kept, params, of_entry, lambda one: (one.site, one.small))


def _of_layers(entry: Entry, one: Kept) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The positions at the layers that an entry adapts."""
    rows = slice(None) if entry.layers is None else np.asarray(entry.layers)
    inputs, outputs = (None if p is None else p if p.ndim == 1 else p[rows] for p in (one.inputs, one.outputs))
    return inputs, outputs


def _moved(
    adapters: Adapters,
    kept: Mapping[str, Kept],
    params: Any,
    of_entry: Callable[[Entry, Kept, Leaves], Leaves],
    change: Callable[[Kept], tuple[Site, Site]],
) -> Adapters:
    """The adapter on the model of the other size; ``change``: a weight's site now and then."""
    if adapters.stacked is not None:
        raise ValueError("LoRAM takes one adapter; pick one of the stack with lowrank_jax.take.")
    config, sites = adapters.plan.to_config(), dict(adapters.sites)
    for item, entry in zip(config, adapters.plan.entries, strict=True):
        path = entry.site.path
        if path not in kept:  # as large as it was: a head trained in full, say
            continue
        if entry.method.name != "lora":
            raise UnsupportedError(f"{path}: LoRAM is for lora, not for {entry.method.name}.")
        now, then = change(kept[path])
        if entry.site.shape != now.shape:
            raise ValueError(
                f"{path}: the adapter is for a weight of shape {entry.site.shape}, but what is kept was chosen for {now.shape}."
            )
        item["site"]["shape"] = list(then.shape)
        sites[path] = of_entry(entry, kept[path], adapters.sites[path])
    return Adapters(sites, adapters.shared, from_config(params, config))
