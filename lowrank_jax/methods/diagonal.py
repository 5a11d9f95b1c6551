"""What methods have in common that train the diagonal of a decomposition of the weight and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.forms.low_rank import a_leaf, b_leaf
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_rank
from lowrank_jax.sites import Site

Decompose = Callable[[jax.Array, Site, Given], tuple[jax.Array, jax.Array, jax.Array]]


def trained_diagonal(name: str, rank: int, scale: float, decompose: Decompose) -> Method:
    """A method with ``a [n_in, r]`` and ``b [r, n_out]`` frozen and ``e [r]`` trained; the first ``e`` is a frozen anchor.

    Args:
      decompose: ``(key, site, given) -> a, e, b``, whose product ``a diag(e) b`` is the part of the weight that ``e`` stands for.
    """

    def leaves(site: Site) -> dict[str, Leaf]:
        check_rank(name, rank, site)
        return {
            "a": a_leaf(site, rank, trains=None),
            "b": b_leaf(site, rank, trains=None),
            "e": Leaf((rank,), ("rank",)),
            "e0": Leaf((rank,), ("rank",), trains=None, anchor=True),
        }

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        a, e, b = decompose(key, site, given)
        return {"a": a, "b": b, "e": e, "e0": e}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> LowRank:
        # The factors are common to both: the update is exactly zero at init.
        change = leaves["e"] - leaves["e0"] if "e0" in leaves else leaves["e"]
        return LowRank(leaves["a"], leaves["b"], change, scale=scale)

    def anchor(site: Site, leaves: Mapping[str, jax.Array]) -> LowRank:
        return LowRank(leaves["a"], leaves["b"], leaves["e0"], scale=scale)

    return Method(LowRank, leaves, init, expand, anchor=anchor, needs=frozenset({"kernel"}))
