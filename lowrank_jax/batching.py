"""Functions of one matrix as functions of stacks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def over_batch(of_one: Callable[..., Any], axes: int, in_axes: Any = 0) -> Callable[..., Any]:
    """``of_one`` mapped over the leading ``axes`` axes of its arguments; ``in_axes`` as in ``jax.vmap``.

    Example:
      >>> import jax.numpy as jnp
      >>> over_batch(jnp.diag, 2)(jnp.ones((4, 5, 3))).shape
      (4, 5, 3, 3)
    """
    for _ in range(axes):
        of_one = jax.vmap(of_one, in_axes=in_axes)
    return of_one
