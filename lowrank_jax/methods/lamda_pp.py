"""LaMDA++: LaMDA with ranks allocated from the normalised spectra of the pre-trained weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from lowrank_jax import linalg
from lowrank_jax.checks import check_choice
from lowrank_jax.methods.allocation import Budget, Compare, site_ranks
from lowrank_jax.methods.base import Given, Method, method
from lowrank_jax.methods.lamda import lamda
from lowrank_jax.sites import Site


@method
def lamda_pp(
    rank: int = 32,
    candidates: Sequence[int] | None = None,
    budget: Budget = "rank",
    compare: Compare = "shape",
    alpha: float | None = None,
    dropout: float = 0.0,
    freeze: float = 0.3,
    core: Literal["identity", "balanced", "sigma"] = "identity",
    svd: Literal["randomized", "exact"] = "randomized",
) -> Method:
    """LaMDA++: LaMDA with an adaptive rank for each layer (arXiv 2406.12832).

    A weight whose leading ``rank`` directions hold a smaller share of its energy, ``sum_{i<=rank} sig_i^2 / sum_i sig_i^2``, has a
    flatter spectrum and gets a larger rank: ranks are proportional to what is left out, ``1 - share``. The share does not change
    when a weight is scaled. Ranks are chosen when the plan is made, from the weights only. The paper's exact score and map are
    not published in its code: this allocation is a reconstruction. Count: ``sum of r_l^2`` once ``b`` is frozen.

    Args:
      rank: the mean rank, which defines the budget: what plain LaMDA of this rank everywhere would use.
      candidates: the ranks to choose from; None: every rank from rank/4 to 2 rank. Few candidates mean few shapes to compile.
      budget: what is held: ``rank``: the sum of r, spent exactly (with every rank allowed); ``core``: the sum of r^2;
        ``parameters``: the sum of r (n_in + n_out). The latter two are never exceeded.
      compare: ``shape`` compares (and budgets) weights of equal shape among themselves, because the share at a fixed rank depends
        on the dimension; ``all`` compares everything with everything.
      alpha, dropout, freeze, core, svd: as in `lamda`; alpha None keeps s = 1 whatever the rank.

    Example:
      >>> import jax.numpy as jnp, lowrank_jax as lr
      >>> steep, flat = jnp.diag(0.5 ** jnp.arange(16.0)), jnp.eye(16)
      >>> plan = lr.plan({"s": {"kernel": steep}, "f": {"kernel": flat}}, {".*": lr.lamda_pp(rank=4)})
      >>> {entry.site.path: dict(entry.method.config)["rank"] for entry in plan.entries}
      {'f/kernel': 7, 's/kernel': 1}
    """
    check_choice("lamda_pp", "budget", budget, ("rank", "core", "parameters"))
    check_choice("lamda_pp", "compare", compare, ("shape", "all"))
    if rank < 1:
        raise ValueError(f"lamda_pp(rank={rank}): expected a mean rank of at least 1.")
    fields: dict[str, Any] = {"alpha": alpha, "dropout": dropout, "freeze": freeze, "core": core, "svd": svd}
    uniform = lamda(rank=rank, **fields)

    def choose(sites: Mapping[str, Site], given: Mapping[str, Given]) -> dict[str, Method]:
        shares = {
            path: linalg.captured_energy(
                given[path].need("kernel"), min(rank, site.max_rank), key=jax.random.key(0), method="randomized"
            )
            for path, site in sites.items()
        }
        ranks = site_ranks(
            sites, {path: 1 - share for path, share in shares.items()}, rank, budget, compare, candidates
        )
        return {path: lamda(rank=own, **fields) for path, own in ranks.items()}

    return Method(uniform.form, uniform.leaves, uniform.init, uniform.expand, anchor=uniform.anchor,
                  transform=uniform.transform, allocate=choose, needs=frozenset({"kernel"}))  # fmt: skip
