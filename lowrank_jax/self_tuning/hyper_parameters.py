"""Hyper-parameters that are tuned without constraints, used within their ranges, and perturbed for each example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Range(NamedTuple):
    """Where a hyper-parameter lies: above ``low``, below ``high``, rounded down to an integer or not."""

    low: float = -math.inf
    high: float = math.inf
    integer: bool = False


def constrain(h: jax.Array, ranges: Sequence[Range]) -> jax.Array:
    """Hyper-parameters as they are used, from the unconstrained ones that are tuned: a sigmoid or softplus into each range.

    Args:
      h: ``[..., n_h]``. ranges: of each, ``n_h``.

    Raises:
      ValueError: another number of ranges; a range without inside.

    Example:
      >>> constrain(jnp.zeros(3), [Range(0.0, 0.5), Range(), Range(0.0, 5.0, integer=True)]).tolist()
      [0.25, 0.0, 2.0]
    """
    _check_ranges("constrain", h, ranges)
    return jnp.stack([_into(h[..., n], bounds) for n, bounds in enumerate(ranges)], -1)


def unconstrain(values: jax.Array, ranges: Sequence[Range]) -> jax.Array:
    """Inverse of `constrain`, before rounding: start an integer in the middle, 4.5 for 4.

    Raises:
      ValueError: a value at the end of its range or beyond; and as `constrain`.

    Example:
      >>> unconstrain(jnp.array([0.45, 2.0]), [Range(0.0, 0.9), Range()]).tolist()
      [0.0, 2.0]
    """
    _check_ranges("unconstrain", values, ranges)
    out = []
    for n, (low, high, _) in enumerate(ranges):
        x = values[..., n]
        if not isinstance(x, jax.core.Tracer) and not bool(((low < x) & (x < high)).all()):
            raise ValueError(f"unconstrain: value {n} is {x}, expected above {low} and below {high}.")
        if math.isfinite(low) and math.isfinite(high):
            out.append(jnp.log(x - low) - jnp.log(high - x))
        elif math.isfinite(low):
            out.append(_inverse_softplus(x - low))
        else:
            out.append(_inverse_softplus(high - x) if math.isfinite(high) else x)
    return jnp.stack(out, -1)


class HyperParameters(NamedTuple):
    """Attributes: value: unconstrained, ``[n_h]``. raw_scale: ``[n_h]``, whose softplus is the deviation of the perturbations."""

    value: jax.Array
    raw_scale: jax.Array


def hyper_parameters(value: jax.Array, scale: jax.Array | float = 0.5) -> HyperParameters:
    """Hyper-parameters at their start.

    Args:
      value: unconstrained, ``[n_h]``, see `unconstrain`. scale: deviation of the perturbations, one or ``[n_h]``.

    Raises:
      ValueError: a scale that is not above 0.

    Example:
      >>> round(float(jax.nn.softplus(hyper_parameters(jnp.zeros(1), 0.5).raw_scale[0])), 4)
      0.5
    """
    value = jnp.asarray(value, jnp.float32)
    scales = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), value.shape)
    if not bool((scales > 0).all()):
        raise ValueError(f"hyper_parameters(scale={scale}): expected numbers above 0.")
    return HyperParameters(value, _inverse_softplus(scales))


def perturb(key: jax.Array, hyper: HyperParameters, batch_size: int) -> jax.Array:
    """``value + softplus(raw_scale) * normal``, drawn for each example on its own: ``[batch_size, n_h]``.

    Example:
      >>> perturb(jax.random.key(0), hyper_parameters(jnp.zeros(2)), 8).shape
      (8, 2)
    """
    return hyper.value + jax.nn.softplus(hyper.raw_scale) * jax.random.normal(key, (batch_size, *hyper.value.shape))


def entropy(hyper: HyperParameters) -> jax.Array:
    """Of the distribution of the perturbations, in nats: the sum of ``log(softplus(raw_scale) sqrt(2 pi e))``.

    Example:
      >>> round(float(entropy(hyper_parameters(jnp.zeros(1), 1.0))), 4)
      1.4189
    """
    return jnp.sum(jnp.log(jax.nn.softplus(hyper.raw_scale)) + 0.5 * math.log(2 * math.pi * math.e))


def _into(x: jax.Array, bounds: Range) -> jax.Array:
    low, high, integer = bounds
    if math.isfinite(low) and math.isfinite(high):
        x = low + (high - low) * jax.nn.sigmoid(x)
        # A sigmoid that has rounded to 1 is at the end, which is not in the range of the integers.
        return jnp.minimum(jnp.floor(x), math.ceil(high) - 1) if integer else x
    if math.isfinite(low):
        x = low + jax.nn.softplus(x)
    elif math.isfinite(high):
        x = high - jax.nn.softplus(x)
    return jnp.floor(x) if integer else x


def _inverse_softplus(x: jax.Array) -> jax.Array:
    return x + jnp.log(-jnp.expm1(-x))  # of log(exp(x) - 1) the exponential overflows


def _check_ranges(what: str, h: jax.Array, ranges: Sequence[Range]) -> None:
    if h.shape[-1:] != (len(ranges),):
        raise ValueError(
            f"{what}: {h.shape[-1] if h.ndim else 0} hyper-parameters and {len(ranges)} ranges; give one for each."
        )
    for bounds in ranges:
        if not bounds.low < bounds.high:
            raise ValueError(f"{what}: {bounds} has nothing inside; expected low below high.")
