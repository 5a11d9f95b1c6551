"""Which matrices of a parameter tree an optimizer treats as matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_jax.sites import Site, flatten, hits, matches
from lowrank_jax.sites import sites as find_sites

MATRICES = ("dense", "conv", "embed")


def choose(
    what: str,
    tree: Any,
    targets: Sequence[str] | None = None,
    sites: Mapping[str, Site] | None = None,
    allow_other: bool = False,
) -> dict[str, Site]:
    """The sites that patterns select among the leaves of a tree, in the order of the tree.

    Args:
      what: the optimizer's name, for errors.
      targets: patterns; None: dense weights and convolutions. A pattern that names a module takes its matrices.
      sites: what is known of the tree; None: what its shapes alone tell.
      allow_other: leave out leaves that are no matrices instead of refusing a pattern that names one.

    Raises:
      ValueError: a pattern that matches nothing, or names a leaf that is no matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> list(choose("galore", {"x": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}, ["x"]))
      ['x/kernel']
    """
    found = dict(find_sites(tree) if sites is None else sites)
    present = flatten(tree)
    found = {path: site for path, site in found.items() if path in present}
    if targets is None:
        return {path: site for path, site in found.items() if site.kind in ("dense", "conv")}
    taken = set()
    for pattern in targets:
        named = hits(f"{what}(targets=[{pattern!r}])", pattern, found)
        matrices = [path for path in named if found[path].kind in MATRICES]
        others = [path for path in named if path not in matrices and (not matrices or _named(pattern, path))]
        if others and not allow_other:
            raise ValueError(
                f"{what}(targets=[{pattern!r}]): {others[0]} of shape {found[others[0]].shape} is not known to be a matrix. End the "
                "pattern in '/kernel', pass sites= for what parameters alone do not tell, or allow_other=True to leave it to the inner "
                "optimizer."
            )
        taken |= set(matrices)
    return {path: site for path, site in found.items() if path in taken}


def _named(pattern: str, path: str) -> bool:
    """Whether a pattern matches a weight itself, not only its module."""
    module = path.rpartition("/")[0]
    return matches(pattern, path) and not (module and matches(pattern, f"{module}/anything"))
