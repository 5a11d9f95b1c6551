"""Sites as plain data, for JSON; what is read is checked in full before any of it is believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from lowrank_jax.sites import Kind, Site, describe

_AXES = ("batch", "inputs", "outputs", "scanned")


def to_data(site: Site) -> dict[str, Any]:
    """A site without its path, dtype and layout; `from_data` is the inverse.

    Example:
      >>> import numpy as np
      >>> to_data(describe("x/kernel", np.zeros((2, 3)), "dense", inputs=(0,), outputs=(1,)))["inputs"]
      [0]
    """
    axes = {role: list(getattr(site, role)) for role in _AXES}
    return {"kind": site.kind, "shape": list(site.shape), **axes, "factored": site.factored}


def from_data(path: str, data: Any, leaf: Any) -> Site:
    """The site that `to_data` described, of a weight of this model.

    Args:
      leaf: the weight, or anything with its ``shape`` and ``dtype``.

    Raises:
      ValueError: another shape, or no description of such a site; names what is wrong.
    """
    ndim = len(leaf.shape)
    if not isinstance(data, Mapping) or not {"kind", "shape", "factored", *_AXES} <= set(data):
        raise ValueError(
            f"{path}: {str(data)[:80]!r} describes no site; expected kind, shape, factored, {', '.join(_AXES)}."
        )
    if data["kind"] not in get_args(Kind) or not isinstance(data["factored"], bool):
        found = f"kind={str(data['kind'])[:80]!r}, factored={str(data['factored'])[:80]!r}"
        raise ValueError(f"{path}: {found}; expected a kind of {', '.join(get_args(Kind))}, and true or false.")
    if not is_numbers(data["shape"]) or tuple(data["shape"]) != tuple(leaf.shape):
        raise ValueError(
            f"{path}: the adapter was made for a weight of shape {_short(data['shape'])}, this model's has {tuple(leaf.shape)}. "
            "Load it on the model it was trained on."
        )
    axes = {role: tuple(data[role]) if is_numbers(data[role]) else (-1,) for role in _AXES}
    roles = sorted(axes["batch"] + axes["inputs"] + axes["outputs"])
    whole = roles == list(range(ndim)) and (data["kind"] == "param" or (axes["inputs"] and axes["outputs"]))
    if (
        not (whole or (data["kind"] == "param" and not roles))
        or axes["scanned"] != axes["batch"][: len(axes["scanned"])]
    ):
        given = {role: _short(data[role]) for role in _AXES}
        raise ValueError(f"{path}: axes {given} of a {data['kind']} weight of {ndim} axes; expected each of them once.")
    return describe(path, leaf, data["kind"], factored=data["factored"], **axes)


def is_numbers(value: Any) -> bool:
    """Whether a value is a list of integers.

    Example:
      >>> is_numbers([0, 1]), is_numbers([True])
      (True, False)
    """
    return isinstance(value, list | tuple) and all(type(n) is int for n in value)


def _short(value: Any) -> Any:
    return tuple(value) if is_numbers(value) and len(value) < 10 else f"{str(value)[:80]!r}"
