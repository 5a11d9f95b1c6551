"""Several adapters of one base combined into one: weighted sums, and merges of task vectors that interfere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import jax

from lowrank_jax.adapters import Adapters, check_params
from lowrank_jax.checks import check_choice
from lowrank_jax.combining.combine_site import Member, Recipe, combine_site, least_magnitude
from lowrank_jax.convert.conversion import Conversion, check_plain
from lowrank_jax.convert.factors import Rank, check_target
from lowrank_jax.sites import flatten

_PRUNES = ("ties", "dare", "dare_ties", "magnitude_prune")
_METHODS = ("sum", "svd", "linear", *_PRUNES)


def combine(
    adapters: Sequence[Adapters],
    weights: Sequence[float],
    method: Literal["sum", "svd", "linear", "ties", "dare", "dare_ties", "magnitude_prune"] = "sum",
    *,
    params: Any = None,
    rank: Rank = None,
    density: float | None = None,
    key: jax.Array | None = None,
    sign: Literal["total", "frequency"] = "total",
    scope: Literal["model", "matrix"] = "model",
    svd: Literal["exact", "randomized"] = "exact",
) -> Conversion:
    """Adapters of one base as one adapter that acts like a combination of them.

    The updates of the weights are combined, not the factors: ``D_i`` below is what adapter i adds to a weight. That is well defined
    for every method with a dense update, whatever the ranks, and equals the merge of merged models (task arithmetic, arXiv
    2212.04089). Weights may be negative. A site that one adapter alone changes, with weight 1 and unpruned, keeps its method and
    its bits.

    - ``sum``: ``sum_i w_i D_i``. Low-rank updates are joined side by side, exactly, and ranks add up ("cat" in PEFT).
    - ``svd``: the sum, cut to ``rank``; None: the largest rank among the adapters.
    - ``linear``: what PEFT calls so: both factors are summed, ``(sum_i sgn_i r_i a_i) (sum_i r_i b_i)`` with ``r_i = sqrt|w_i s_i|``. This
      is not the sum, having cross terms ``a_i b_j``; it keeps the rank. For equal ranks, and for parity only.
    - ``ties``: trim each ``w_i D_i`` to ``density``, elect a sign for each entry, average the entries that agree (arXiv 2306.01708). The
      weights come before the election, so a negative one votes for the opposite; PEFT elects before it weighs.
    - ``dare``: drop entries at random, rescale the rest by ``1 / density``, sum (arXiv 2311.03099); ``dare_ties``: then elect and average.
    - ``magnitude_prune``: trim each to ``density``, sum.

    PEFT's ``ties``, ``dare_linear``, ``dare_ties`` and ``magnitude_prune`` do this to each factor, which prunes something else than the
    update; the ones here are its ``*_svd`` kinds. Runs on the host, one matrix of a stack at a time.

    Args:
      adapters: unfolded; their sites, methods and ranks may differ. weights: one for each.
      params: the base, where an update depends on the weight (DoRA, full, bottlenecks) or the result is a full weight.
      rank: None: exact: a LoRA where all is summed and low-rank, elsewhere a full weight (`full`); otherwise as in `to_lora`.
        Biases and norms stay full.
      density: the share of entries that is kept; for the pruning methods. key: for the two that draw.
      sign: whose sign is elected: that of the ``total``, or of the greater number (``frequency``).
      scope: what competes for being kept by magnitude: the whole ``model``, as in the paper, which takes host memory for one adapter's
        dense update, or each ``matrix`` for itself, as in PEFT.
      svd: as in `to_lora`.

    Returns:
      The adapter, and the error that cutting to ``rank`` made at each weight.

    Raises:
      ValueError: bad options, an option the method does not use, folded or stacked adapters, adapters of other models.
      UnsupportedError: a nonlinear update, or one of a bias inside an adapter, that would have to be combined.

    Example:
      >>> import jax.numpy as jnp, lowrank_jax as lr
      >>> base = {"layer": {"kernel": jnp.ones((8, 6))}}
      >>> make = lambda rank: lr.init(jax.random.key(rank), base, lr.plan(base, {"layer": lr.lora(rank=rank)}))
      >>> both, error = lr.combine([make(1), make(2)], [0.7, -0.3])
      >>> str(both.plan.entries[0].method)[:11], error
      ('lora(rank=3', {'layer/kernel': 0.0})
    """
    recipe = Recipe(method, density, key, sign, scope, rank, svd)
    _check(adapters, weights, recipe)
    flat = None if params is None else flatten(params)
    for one in adapters if flat is not None else ():
        check_params(flat, one.plan)  # type: ignore[arg-type]
    members = [
        Member(n, one, weight, least_magnitude(one, recipe, flat))
        for n, (one, weight) in enumerate(zip(adapters, weights, strict=True))
        if weight != 0
    ]
    keeps = rank is None and not recipe.prunes
    if keeps and len(members) == 1 and members[0].weight == 1:
        return Conversion(members[0].adapters, dict.fromkeys(members[0].adapters.plan.by_path, 0.0))
    entries, sites, errors = [], {}, {}
    for path in dict.fromkeys(path for member in members for path in member.adapters.plan.by_path):
        here = [member for member in members if path in member.adapters.plan.by_path]
        entry, leaves, error = here[0].adapters.plan.by_path[path], here[0].adapters.sites[path], 0.0
        # Leaves shared between sites go with all of their sites or not at all.
        if not (keeps and len(here) == 1 and here[0].weight == 1 and entry.method.shared is None):
            entry, leaves, error = combine_site(path, here, recipe, flat)
        entries.append(entry)
        sites[path], errors[path] = leaves, error
    return Conversion(Adapters(sites, {}, replace(adapters[0].plan, entries=tuple(entries))), errors)


def _check(adapters: Sequence[Adapters], weights: Sequence[float], recipe: Recipe) -> None:
    check_choice("combine", "method", recipe.method, _METHODS)
    check_choice("combine", "sign", recipe.sign, ("total", "frequency"))
    check_choice("combine", "scope", recipe.scope, ("model", "matrix"))
    check_target(recipe.rank)
    for one in adapters:
        check_plain("combine", one)
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"combine: {len(adapters)} adapters and {len(weights)} weights; give one weight for each.")
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise ValueError(f"combine: weights={list(weights)}: expected finite numbers, not all of them 0.")
    prunes = recipe.method in _PRUNES
    if prunes != (recipe.density is not None):
        raise ValueError(
            f"combine: density= is for {', '.join(_PRUNES)}, and they need it; {recipe.method!r} got {recipe.density}."
        )
    if recipe.density is not None and not 0 < recipe.density <= 1:
        raise ValueError(f"combine(density={recipe.density}): expected a share in (0, 1].")
    if recipe.method.startswith("dare") != (recipe.key is not None):
        raise ValueError("combine: key= is for 'dare' and 'dare_ties', which draw what they drop, and for them only.")
    if recipe.sign != "total" and not recipe.elects:
        raise ValueError(f"combine: sign= is for 'ties' and 'dare_ties'; {recipe.method!r} elects no sign.")
