"""What a program multiplies: the shapes of its products, through scans, remats and calls."""

from __future__ import annotations

from typing import Any

from jax.extend import core

_PRODUCTS = ("dot_general", "conv_general_dilated", "scatter-add", "scatter_add")


def gradient_shapes(jaxpr: Any) -> set[tuple[int, ...]]:
    """The sorted shapes of all results of matmuls, convolutions and scattered additions: a dense gradient is one of those.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> f = lambda w, x: jnp.sum((x @ w) ** 2)
      >>> sorted(gradient_shapes(jax.make_jaxpr(jax.grad(f))(jnp.ones((3, 4)), jnp.ones((2, 3))).jaxpr))
      [(2, 4), (3, 4)]
    """
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in _PRODUCTS:
            found |= {tuple(sorted(v.aval.shape)) for v in equation.outvars}
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = part.jaxpr if isinstance(part, core.ClosedJaxpr) else part
                if hasattr(inner, "eqns"):
                    found |= gradient_shapes(inner)
    return found
