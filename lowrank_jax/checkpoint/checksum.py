"""A checksum of arrays that does not depend on where their parts lie: it is added up in integers, on the devices."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SALTS = (0x9E3779B9, 0x85EBCA6B)


def checksum(leaves: Mapping[str, Any]) -> str:
    """64 bits, in hex, over ``{path: array}``: every element's bits and place, and every path, dtype and shape.

    It finds damage, not malice. The same on any mesh and any number of processes, all of which have to call.

    Example:
      >>> checksum({"w": jnp.arange(3)}) == checksum({"w": jnp.arange(3)}), checksum({"w": jnp.arange(3)}) == checksum({"w": jnp.ones(3)})
      (True, False)
    """
    sums = {path: _sums(leaf) for path, leaf in leaves.items()}
    total = hashlib.sha256()
    for path in sorted(sums):
        leaf = leaves[path]
        total.update(f"{path}:{leaf.dtype.name}:{tuple(leaf.shape)}:{np.asarray(sums[path]).tolist()};".encode())
    return total.hexdigest()[:16]


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    """Two sums modulo 2^32 of the elements' bits, weighed by odd numbers that their places decide: uint32 ``[2]``.

    One changed element changes both sums, as an odd factor loses nothing modulo a power of two.
    """
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = jax.lax.bitcast_convert_type(x, np.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    salted = [(_mixed(place + jnp.uint32(salt)) | 1) * _mixed(bits ^ jnp.uint32(salt)) for salt in _SALTS]
    return jnp.stack([jnp.sum(terms, dtype=jnp.uint32) for terms in salted])


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 under which neighbours part: multiplications and shifts."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
