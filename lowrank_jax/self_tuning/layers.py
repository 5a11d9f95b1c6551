"""Layers that respond to hyper-parameters: a second layer, gated by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

_fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within 1 / sqrt(fan_in)
_small_normal = nn.initializers.normal(0.01)


class HyperDense(nn.Module):
    """A dense layer that approximates its best response to hyper-parameters: ``s (W x + b) + (U h) * (W' x) + (V h) * b'``.

    ``W [n_in, features]``, ``b`` and the scalar ``s`` are a plain layer; ``h`` gates each output of a second one, linearly, through the
    small ``U, V [n_h, features]``. Each example has an ``h`` of its own, which is how the response is learned from perturbations. Costs
    two layers' weights and time.

    Attributes:
      features: outputs. use_bias: with ``b`` and ``b'``. dtype: of the computation, as in flax. param_dtype: of the parameters
        ``kernel``, ``bias``, ``hyper_kernel``, ``hyper_bias``, ``kernel_gate``, ``bias_gate``, ``scale``.

    Raises:
      ValueError: from the call, an ``h`` that is not ``[batch, n_h]``.

    Example:
      >>> x, h = jnp.ones((2, 3)), jnp.array([[0.0], [1.0]])
      >>> layer = HyperDense(4)
      >>> layer.apply(layer.init(jax.random.key(0), x, h), x, h).shape
      (2, 4)
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, h: jax.Array) -> jax.Array:
        """``x [batch, ..., n_in]``, ``h [batch, n_h]`` unconstrained, to ``[batch, ..., features]``."""
        return _gated(self, x, h, (x.shape[-1], self.features), jnp.matmul)


class HyperConv(nn.Module):
    """A convolution that approximates its best response to hyper-parameters: `HyperDense`, with a gate for each output channel.

    Attributes:
      features: output channels. kernel_size: of each spatial axis. strides: one for all axes, or one each. padding: ``SAME``, ``VALID``, a
        number for both sides of all axes, or a pair for each. feature_group_count, use_bias, dtype, param_dtype: as in flax.

    Raises:
      ValueError: from the call, an ``x`` without a batch, channel or one of the spatial axes; an ``h`` that is not ``[batch, n_h]``.

    Example:
      >>> x, h = jnp.ones((2, 8, 8, 3)), jnp.zeros((2, 1))
      >>> layer = HyperConv(4, (3, 3), strides=2)
      >>> layer.apply(layer.init(jax.random.key(0), x, h), x, h).shape
      (2, 4, 4, 4)
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str | int | Sequence[tuple[int, int]] = "SAME"
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, h: jax.Array) -> jax.Array:
        """``x [batch, *spatial, channels]``, ``h [batch, n_h]`` unconstrained, to ``[batch, *spatial, features]``."""
        axes = len(self.kernel_size)
        if x.ndim != axes + 2:
            raise ValueError(f"HyperConv: x of shape {list(x.shape)}; expected [batch, {axes} spatial axes, channels].")
        strides = (self.strides,) * axes if isinstance(self.strides, int) else tuple(self.strides)
        padding = [(self.padding, self.padding)] * axes if isinstance(self.padding, int) else self.padding
        last = (0, axes + 1, *range(1, axes + 1))
        numbers = jax.lax.ConvDimensionNumbers(last, (axes + 1, axes, *range(axes)), last)

        def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jax.lax.conv_general_dilated(
                x, kernel, strides, padding, dimension_numbers=numbers, feature_group_count=self.feature_group_count
            )

        shape = (*self.kernel_size, x.shape[-1] // self.feature_group_count, self.features)
        return _gated(self, x, h, shape, convolve)


def _gated(
    module: Any, x: jax.Array, h: jax.Array, shape: tuple[int, ...], product: Callable[..., jax.Array]
) -> jax.Array:
    if h.ndim != 2 or h.shape[0] != x.shape[0]:
        raise ValueError(
            f"{type(module).__name__}: h of shape {list(h.shape)}; expected [{x.shape[0]}, n_h], hyper-parameters for each example of x. "
            "Broadcast those that are the same for all, or draw them with perturb."
        )
    bound = 1 / math.sqrt(math.prod(shape[:-1]))

    def bias_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    def pair(suffix: str, init: Any, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        plain = module.param(suffix, init, shape, module.param_dtype)
        hyper = module.param(f"hyper_{suffix}", init, shape, module.param_dtype)
        gate = module.param(f"{suffix}_gate", _small_normal, (h.shape[1], module.features), module.param_dtype)
        return plain, hyper, gate

    scale = module.param("scale", nn.initializers.ones, (), module.param_dtype)
    leaves = list(pair("kernel", _fan_in_uniform, shape))
    if module.use_bias:
        leaves += pair("bias", bias_init, (module.features,))
    x, scale, *used = promote_dtype(x, scale, *leaves, dtype=module.dtype)
    # Tuned in float32, h must not widen a network in half precision.
    h = h.astype(x.dtype)
    # The gates of an example are the same at every position.
    each = lambda gates: gates.reshape(gates.shape[0], *[1] * (x.ndim - 2), module.features)  # noqa: E731
    kernel, hyper_kernel, kernel_gate = used[:3]
    y = scale * product(x, kernel) + each(h @ kernel_gate) * product(x, hyper_kernel)
    if module.use_bias:
        bias, hyper_bias, bias_gate = used[3:]
        y = y + scale * bias + each((h @ bias_gate) * hyper_bias)
    return y
