"""GaLore: any optax transform, run in a low-rank subspace of each matrix's gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_jax import linalg
from lowrank_jax.optim.subspace import Bases, Side, leading, project, project_back, projected_size, sides, turn
from lowrank_jax.optim.targets import choose
from lowrank_jax.sites import Site, flatten, with_leaves

OnRefresh = Literal["keep", "reset", "rotate"]


class Projected(NamedTuple):
    """The state of one weight: its subspace, and the inner transform's state on what is projected."""

    bases: Bases
    inner: Any


class GaloreState(NamedTuple):
    """Attributes: count: updates made, int32. projected: ``{path: Projected}``. rest: the inner state of every other leaf."""

    count: jax.Array  # type: ignore[assignment]
    projected: dict[str, Projected]
    rest: Any


def galore(
    inner: optax.GradientTransformation,
    rank: int,
    *,
    scale: float = 0.25,
    refresh_every: int = 200,
    targets: Sequence[str] | None = None,
    sites: Mapping[str, Site] | None = None,
    allow_other: bool = False,
    side: Side = "smaller",
    svd: linalg.SvdMethod = "randomized",
    on_refresh: OnRefresh = "keep",
    stagger: bool = True,
    seed: int = 0,
) -> optax.GradientTransformation:
    """GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (arXiv 2403.03507).

    A weight ``W [*batch, n_in, n_out]`` with gradient ``G`` is updated by ``scale * P inner(P^T G)``, where ``P [*batch, n_in, r]`` holds
    the leading singular directions of the gradient at the last refresh (``inner(G Q) Q^T`` where the output side is projected). The
    inner state is as large as ``P^T G``; with Adam ``2 r max(n_in, n_out) + r min(n_in, n_out)`` numbers a matrix instead of
    ``2 n_in n_out``. Every layer of a scanned stack and every expert has a subspace of its own. Leaves that are not targeted are updated
    by ``inner`` as they are.

    Weight decay and the learning rate belong outside, where the weight is whole::

        optax.chain(galore(optax.scale_by_adam(), rank=128), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.01))

    The inner transform is run on each weight alone, so one that looks across weights (a global norm) belongs outside too. Paper and
    official code differ from optax's own GaLore, which projects the longer side: ``side="larger"`` is that.

    Args:
      inner: such as ``optax.scale_by_adam()``; it must not need the parameters.
      rank: r, at most the projected dimension. scale: the paper's alpha, of projected updates only.
      refresh_every: T, updates between two refreshes of a weight.
      targets: patterns of weights (see `lowrank_jax.plan`); None: every dense weight and convolution that `lowrank_jax.sites` finds.
      sites: of the parameters, where they alone do not tell, such as `lowrank_jax.linen.sites` finds; None: `lowrank_jax.sites`.
      allow_other: hand a targeted leaf that is no matrix to ``inner`` instead of refusing it.
      side: which side of the matrix is projected, see `lowrank_jax.optim.subspace.sides`.
      svd: ``randomized`` (range finder, two power iterations) or ``exact``.
      on_refresh: what becomes of the inner state: ``keep`` (paper and code: the old moments go on, in the new subspace's coordinates),
        ``reset`` (starts anew, its counter too), ``rotate`` (first moments are turned into the new subspace, second ones by the
        squares, which is an approximation and not in the paper).
      stagger: spreads the refreshes over ``refresh_every`` steps, weight by weight, so that after the first step none does them all.
        False: all at steps 0, T, 2T, as the official code does.
      seed: of the sketches.

    Raises:
      ValueError: at once, a rank, period or name out of range; from ``init``, a rank above a weight's projected dimension, a target that
        matches nothing or is no matrix (by path); from ``update``, a state of other weights, an inner transform that needs parameters.

    Example:
      >>> params = {"layer": {"kernel": jnp.ones((6, 8)), "bias": jnp.zeros(8)}}
      >>> tx = optax.chain(galore(optax.scale_by_adam(), rank=2), optax.scale_by_learning_rate(1e-2))
      >>> state = tx.init(params)
      >>> state[0].projected["layer/kernel"].inner.mu.shape, state[0].rest.mu["layer/bias"].shape
      ((2, 8), (8,))
    """
    if rank < 1 or refresh_every < 1:
        raise ValueError(f"galore(rank={rank}, refresh_every={refresh_every}): expected numbers of at least 1.")
    for name, value, known in (
        ("side", side, ("smaller", "larger", "input", "output", "both")),
        ("on_refresh", on_refresh, ("keep", "reset", "rotate")),
        ("svd", svd, ("randomized", "exact")),
    ):
        if value not in known:
            raise ValueError(f"galore({name}={value!r}): expected one of {', '.join(known)}.")

    def chosen(tree: Any) -> dict[str, Site]:
        found = choose("galore", tree, targets, sites, allow_other)
        for path, site in found.items():
            if rank > projected_size(side, site.n_in, site.n_out):
                raise ValueError(
                    f"galore(rank={rank}) at {path}: the projected side of [{site.n_in}, {site.n_out}] has only "
                    f"{projected_size(side, site.n_in, site.n_out)} dimensions. Choose a smaller rank, or leave the weight out of targets."
                )
        return found

    def init(params: Any) -> GaloreState:
        flat, weights = flatten(params), chosen(params)
        return GaloreState(
            jnp.zeros((), jnp.int32),
            {path: _start(inner, site, rank, side, flat[path].dtype) for path, site in weights.items()},
            inner.init({path: leaf for path, leaf in flat.items() if path not in weights}),
        )

    def update(updates: Any, state: GaloreState, params: Any = None) -> tuple[Any, GaloreState]:
        flat, weights = flatten(updates), chosen(updates)
        _check_state(state, weights, rank, side)
        new, projected = {}, {}
        for n, (path, site) in enumerate(weights.items()):
            g, old = site.canonical(flat[path]), state.projected[path]
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), n), state.count)

            def refreshed(g: jax.Array, old: Projected, key: jax.Array) -> Projected:
                bases = leading(g, rank, side, key, svd)
                bases = jax.tree.map(lambda x, y: x.astype(y.dtype), bases, old.bases)
                if on_refresh == "reset":
                    return Projected(bases, inner.init(project(g, bases)))
                if on_refresh == "rotate":
                    return Projected(bases, _rotated(old, bases, project(g, bases).shape, state.count))
                return Projected(bases, old.inner)

            first = n * refresh_every // len(weights) if stagger else 0
            due = (state.count == 0) | (state.count % refresh_every == first)
            bases, inner_state = jax.lax.cond(due, refreshed, lambda g, old, key: old, g, old, key)
            step, inner_state = _inner_update(inner, project(g, bases), inner_state)
            new[path] = site.original(scale * project_back(step, bases)).astype(flat[path].dtype)
            projected[path] = Projected(bases, inner_state)
        rest = {path: leaf for path, leaf in flat.items() if path not in weights}
        others, rest_state = _inner_update(inner, rest, state.rest)
        state = GaloreState(optax.safe_increment(state.count), projected, rest_state)
        return with_leaves(updates, {**new, **others}), state

    return optax.GradientTransformation(init, update)


def _start(inner: optax.GradientTransformation, site: Site, rank: int, side: Side, dtype: Any) -> Projected:
    inputs, outputs = sides(side, site.n_in, site.n_out)
    zeros = lambda n: jnp.zeros((*site.batch_shape, n, rank), dtype)  # noqa: E731
    bases = Bases(zeros(site.n_in) if inputs else None, zeros(site.n_out) if outputs else None)
    shape = (*site.batch_shape, rank if inputs else site.n_in, rank if outputs else site.n_out)
    return Projected(bases, inner.init(jnp.zeros(shape, dtype)))


def _rotated(old: Projected, bases: Bases, shape: tuple[int, ...], count: jax.Array) -> Any:
    """The inner state with every array of the projected shape seen from the new subspace; before the first step it is zero anyway."""
    between = turn(old.bases, bases)
    squared = jax.tree.map(jnp.square, between)

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        if leaf.shape != shape:
            return leaf
        second = any(getattr(part, "name", None) == "nu" for part in path)
        return project_back(leaf, squared if second else between).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, old.inner)


def _inner_update(inner: optax.GradientTransformation, updates: Any, state: Any) -> tuple[Any, Any]:
    try:
        return inner.update(updates, state, None)
    except ValueError as error:
        if "`params`" not in str(error):
            raise
        raise ValueError(
            "galore: the inner transform needs the parameters, which are not in the subspace. Chain what needs them, such as "
            "optax.add_decayed_weights, after galore, and take optax.scale_by_adam() as the inner transform instead of optax.adamw."
        ) from error


def _check_state(state: GaloreState, weights: Mapping[str, Site], rank: int, side: Side) -> None:
    for path, site in weights.items():
        if path not in state.projected:
            raise ValueError(
                f"galore: the state holds no subspace for {path}; it was made for other weights. Make it with init."
            )
        bases = state.projected[path].bases
        inputs, outputs = sides(side, site.n_in, site.n_out)
        expected = [(*site.batch_shape, n, rank) for n, used in ((site.n_in, inputs), (site.n_out, outputs)) if used]
        found = [x.shape for x in jax.tree.leaves(bases)]
        if expected != found:
            raise ValueError(
                f"galore: the state's subspace for {path} has shape {found}, expected {expected}; it was made with another rank, side or "
                "model. Make it with init."
            )
    left = set(state.projected) - set(weights)
    if left:
        raise ValueError(
            f"galore: the state holds a subspace for {min(left)}, which is not targeted. Make it with init."
        )
