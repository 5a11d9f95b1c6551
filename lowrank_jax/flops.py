"""Floating-point operations of a function's products, loops in full, by its own account: nothing is compiled or run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count(function: Callable[..., Any], *args: Any) -> float:
    """Operations of every matrix product and convolution in one call, over all devices; a multiplication and an addition are two.

    Elementwise operations are left out, as in the count of a model's FLOPs that utilisation goes by. A scan counts as often as it runs,
    a ``while_loop`` once, of a ``cond`` the dearest branch, of a Pallas kernel every step of its grid.

    Args:
      args: trees of arrays or ShapeDtypeStructs.

    Example:
      >>> x = jax.ShapeDtypeStruct((8, 8), "float32")
      >>> count(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=3), x)
      3072.0
    """
    return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot(equation)
        elif name == "ragged_dot_general":
            total += _ragged(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "scan":
            total += params["length"] * _of(params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_of(branch.jaxpr) for branch in params["branches"])
        elif name == "pallas_call":
            total += math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int)) * _of(
                params["jaxpr"]
            )
        elif name == "shard_map":  # its body is one device's
            total += params["mesh"].size * _of(params["jaxpr"])
        else:
            total += sum(map(_of, _inner(params)))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation calls, each once: jit, remat, custom derivatives, while, shard_map."""
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _ragged(equation: Any) -> float:
    """Every row meets the matrix of its own group only."""
    numbers = equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (contracted, right_contracted), (batch, right_batch) = numbers
    left, right = (operand.aval.shape for operand in equation.invars[:2])
    groups = equation.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
    rest = [size for axis, size in enumerate(right) if axis not in (*right_contracted, *right_batch, *groups)]
    return 2.0 * math.prod(left) * math.prod(rest)


def _convolution(equation: Any) -> float:
    """A kernel's input axis is as wide as one group's."""
    spec, kernel = equation.params["dimension_numbers"].rhs_spec, equation.invars[1].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[axis] for axis in spec[1:])
