"""What the backward pass over a frozen base needs, by name, and the policies of `jax.checkpoint` that keep just that.

The gradient through a frozen weight needs the weight alone, so the wide inputs and outputs of the base's products, which the stock policies
keep, are of no use. What is needed: the inputs of what is not linear (attention, gates, norms), and what the adapters make of their inputs,
which is as narrow as the rank. From these the rest follows without any product with a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

NONLINEAR = "nonlinear_input"
"""Inputs of nonlinear functions that a product with a weight made; tagged by the models."""

NARROW = "adapter_narrow"
"""Activations inside an adapter, as wide as its rank; tagged by the forms."""


def nonlinear_input(x: jax.Array) -> jax.Array:
    """Tags an activation as `NONLINEAR`; to be used in models of your own.

    Example:
      >>> import jax.numpy as jnp
      >>> float(nonlinear_input(jnp.float32(2.0)))
      2.0
    """
    return checkpoint_name(x, NONLINEAR)


def narrow(x: jax.Array) -> jax.Array:
    """Tags an activation as `NARROW`.

    Example:
      >>> import jax.numpy as jnp
      >>> float(narrow(jnp.float32(2.0)))
      2.0
    """
    return checkpoint_name(x, NARROW)


def policy(offload: bool = False) -> Callable[..., Any]:
    """A policy for `jax.checkpoint`, `nn.remat` and `nnx.remat` over a frozen base with adapters.

    Args:
      offload: keep what the models tag in the host's memory, moved there and back while other layers compute. What is narrow stays on
        the device: it is small, and a transfer of its own costs more than it frees.

    Example:
      >>> import jax.numpy as jnp
      >>> f = jax.checkpoint(lambda x: jnp.sin(nonlinear_input(2 * x)), policy=policy())
      >>> round(float(jax.grad(f)(0.0)), 1)
      2.0
    """
    policies = jax.checkpoint_policies
    if not offload:
        return policies.save_only_these_names(NONLINEAR, NARROW)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[NARROW],
        names_which_can_be_offloaded=[NONLINEAR],
        offload_src="device",
        offload_dst="pinned_host",
    )
