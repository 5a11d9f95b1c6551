"""The engine of GaLore, FRUGAL and their like: an optax transform run in a changing subspace of each matrix's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from lowrank_jax.forms.base import Leaf, leaf_spec
from lowrank_jax.optim.blockwise import BLOCK, Quantised, dequantise_blockwise, quantise_blockwise
from lowrank_jax.optim.targets import choose
from lowrank_jax.shard import fitted
from lowrank_jax.sites import Site, flatten, named_sharding, with_leaves

OnRefresh = Literal["keep", "reset", "rotate"]


class Space(NamedTuple):
    """How a subspace of matrices ``g [*batch, n_in, n_out]`` is found and used.

    Attributes:
      start: ``(shape, dtype) ->`` a subspace of the right shapes and dtypes, whose values do not matter.
      find: ``(g, key, number) -> subspace``; ``number``: how many were found before, int32.
      down: ``(g, subspace) ->`` coordinates. up: ``(coordinates, subspace, shape) ->`` the matrices they stand for.
      left: ``(g, subspace) ->`` what of ``g`` lies outside.
      turned: ``(coordinates, old, new, squares) ->`` the same seen from the new subspace, by the squares where they are second moments;
        None: there is no such thing.
      rows: the side, 'in' or 'out', that the second to last axis of each array of a subspace is of: it is divided over a mesh as that side
        of the weight. One for all, or a tree of them; None: the arrays are small and whole on every device.
    """

    start: Callable[[tuple[int, ...], Any], Any]
    find: Callable[[jax.Array, jax.Array, jax.Array], Any]
    down: Callable[[jax.Array, Any], jax.Array]
    up: Callable[[jax.Array, Any, tuple[int, ...]], jax.Array]
    left: Callable[[jax.Array, Any], jax.Array]
    turned: Callable[[jax.Array, Any, Any, bool], jax.Array] | None = None
    rows: Any = None


class Projected(NamedTuple):
    """The state of one weight, or of all weights of a size: the subspace, and the inner transform's state on the coordinates in it."""

    subspace: Any
    inner: Any


class ProjectedState(NamedTuple):
    """Attributes: count: updates made, int32. projected: ``{name: Projected}``. rest: the inner state of every other leaf."""

    count: jax.Array  # type: ignore[assignment]
    projected: dict[str, Projected]
    rest: Any


def run_projected(
    what: str,
    inner: optax.GradientTransformation,
    space: Callable[[Site], Space],
    *,
    scale: float,
    free: Callable[[jax.Array], jax.Array] | None,
    refresh_every: int,
    on_refresh: OnRefresh,
    stagger: bool,
    by_size: bool,
    targets: Sequence[str] | None,
    sites: Mapping[str, Site] | None,
    allow_other: bool,
    seed: int,
) -> optax.GradientTransformation:
    """The transform; see `lowrank_jax.optim.galore` for the arguments that both share.

    Args:
      what: the optimizer's name, for errors. space: of a weight; it may refuse the weight.
      free: what becomes of the part of the gradient outside the subspace; None: nothing.
      by_size: put all matrices of a size into one unit, ``[matrices, n_in, n_out]``.
    """

    def units(tree: Any) -> dict[str, list[Site]]:
        found: dict[str, list[Site]] = {}
        for path, site in choose(what, tree, targets, sites, allow_other).items():
            found.setdefault(f"{site.n_in}x{site.n_out}" if by_size else path, []).append(site)
        return found

    def gathered(flat: Mapping[str, Any], members: Sequence[Site]) -> jax.Array:
        if not by_size:
            return members[0].canonical(flat[members[0].path])
        return jnp.concatenate([s.canonical(flat[s.path]).reshape(-1, s.n_in, s.n_out) for s in members])

    def scattered(matrices: jax.Array, members: Sequence[Site]) -> dict[str, jax.Array]:
        if not by_size:
            return {members[0].path: members[0].original(matrices)}
        ends = [math.prod(site.batch_shape) for site in members]
        parts = jnp.split(matrices, [sum(ends[:n]) for n in range(1, len(ends))])
        return {site.path: site.original(part) for site, part in zip(members, parts, strict=True)}

    def shape_of(members: Sequence[Site]) -> tuple[int, ...]:
        first = members[0]
        batch = (sum(math.prod(site.batch_shape) for site in members),) if by_size else first.batch_shape
        return (*batch, first.n_in, first.n_out)

    def start(members: Sequence[Site], weight: Any) -> Projected:
        here, shape = space(members[0]), shape_of(members)
        subspace = here.start(shape, weight.dtype)
        like = jax.eval_shape(here.down, jax.ShapeDtypeStruct(shape, weight.dtype), subspace)
        where = None
        if not by_size:
            where = _beside(weight, members[0], like.shape)
            laid = lambda rows, part: jax.tree.map(lambda x: _laid(x, _beside(weight, members[0], x.shape, rows)), part)  # noqa: E731
            subspace = subspace if here.rows is None else jax.tree.map(laid, here.rows, subspace)
        inside = inner.init(jnp.zeros(like.shape, like.dtype, device=where))
        held = [x.shape for x in jax.tree.leaves(inside) if x.ndim]
        if on_refresh == "rotate" and set(held) - {like.shape}:
            raise ValueError(
                f"{what}(on_refresh='rotate'): the inner state of {members[0].path} has arrays of shapes {sorted(set(held))}, which "
                f"cannot be turned; expected {like.shape}, as of optax.scale_by_adam(). Take 'keep' or 'reset' for packed moments."
            )
        return Projected(subspace, inside)

    def init(params: Any) -> ProjectedState:
        flat, chosen = flatten(params), units(params)
        projected = {name: start(members, flat[members[0].path]) for name, members in chosen.items()}
        return ProjectedState(jnp.zeros((), jnp.int32), projected, inner.init(_others(flat, chosen)))

    def update(updates: Any, state: ProjectedState, params: Any = None) -> tuple[Any, ProjectedState]:
        flat, chosen = flatten(updates), units(updates)
        new: dict[str, jax.Array] = {}
        projected: dict[str, Projected] = {}
        _check_names(what, state, chosen)
        for n, (name, members) in enumerate(chosen.items()):
            g, old, here = gathered(flat, members), state.projected[name], space(members[0])
            _check_shapes(what, name, old.subspace, here.start(g.shape, g.dtype))
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), n), state.count)

            def refreshed(g: jax.Array, old: Projected, key: jax.Array, here: Space = here) -> Projected:
                subspace = here.find(g, key, state.count // refresh_every)
                subspace = jax.tree.map(lambda x, y: x.astype(y.dtype), subspace, old.subspace)
                if on_refresh == "reset":
                    return Projected(subspace, inner.init(here.down(g, subspace)))
                if on_refresh == "rotate":
                    return Projected(subspace, _rotated(old, subspace, here, here.down(g, subspace).shape))
                return Projected(subspace, old.inner)

            first = n * refresh_every // len(chosen) if stagger else 0
            due = (state.count == 0) | (state.count % refresh_every == first)
            subspace, inside = jax.lax.cond(due, refreshed, lambda g, old, key: old, g, old, key)
            step, inside = _inner_update(what, inner, here.down(g, subspace), inside)
            whole = scale * here.up(step, subspace, g.shape)
            if free is not None:
                whole = whole + free(here.left(g, subspace))
            new |= scattered(whole.astype(g.dtype), members)
            projected[name] = Projected(subspace, inside)
        others, rest = _inner_update(what, inner, _others(flat, chosen), state.rest)
        state = ProjectedState(optax.safe_increment(state.count), projected, rest)
        return with_leaves(updates, {**new, **others}), state

    return optax.GradientTransformation(init, update)


def quantised(space: Space, block: int = BLOCK) -> Space:
    """The space with every float of the subspace kept in eight bits, see `lowrank_jax.optim.blockwise`."""
    plain = lambda tree: jax.tree.map(dequantise_blockwise, tree, is_leaf=lambda x: isinstance(x, Quantised))  # noqa: E731
    small = lambda tree: jax.tree.map(lambda x: quantise_blockwise(x, block=block), tree)  # noqa: E731
    return Space(
        lambda shape, dtype: small(space.start(shape, dtype)),
        lambda g, key, number: small(space.find(g, key, number)),
        lambda g, subspace: space.down(g, plain(subspace)).astype(g.dtype),
        lambda x, subspace, shape: space.up(x, plain(subspace), shape),
        lambda g, subspace: space.left(g, plain(subspace)),
        space.turned and (lambda x, old, new, squares: space.turned(x, plain(old), plain(new), squares)),  # type: ignore[misc]
    )


def _beside(weight: Any, site: Site, shape: tuple[int, ...], rows: str = "in") -> NamedSharding | None:
    """Where an array ``[*batch, m, n]`` lies so that its rows are divided as one side of its weight and its columns as the other."""
    sharding = named_sharding(weight)
    if sharding is None or len(shape) != len(site.batch) + 2:
        return None
    axes = ("in", "out") if rows == "in" else ("out", "in")
    spec = leaf_spec(Leaf(shape[-2:], axes), replace(site, spec=sharding.spec))
    assert spec is not None
    return NamedSharding(sharding.mesh, fitted(shape, tuple(spec), sharding.mesh))


def _laid(x: jax.Array, where: NamedSharding | None) -> jax.Array:
    return x if where is None else jax.device_put(x, where)


def _others(flat: Mapping[str, Any], chosen: Mapping[str, Sequence[Site]]) -> dict[str, Any]:
    taken = {site.path for members in chosen.values() for site in members}
    return {path: leaf for path, leaf in flat.items() if path not in taken}


def _rotated(old: Projected, subspace: Any, here: Space, shape: tuple[int, ...]) -> Any:
    """The inner state with every array of the coordinates' shape seen from the new subspace; before the first step they are zero."""
    assert here.turned is not None
    turned = here.turned

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        if leaf.shape != shape:
            return leaf
        second = any(getattr(part, "name", None) == "nu" for part in path)
        return turned(leaf, old.subspace, subspace, second).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, old.inner)


def _inner_update(what: str, inner: optax.GradientTransformation, updates: Any, state: Any) -> tuple[Any, Any]:
    try:
        return inner.update(updates, state, None)
    except ValueError as error:
        if "`params`" not in str(error):
            raise
        raise ValueError(
            f"{what}: the inner transform needs the parameters, which are not in the subspace. Chain what needs them, such as "
            f"optax.add_decayed_weights, after {what}, and take optax.scale_by_adam() as the inner transform instead of optax.adamw."
        ) from error


def _check_names(what: str, state: ProjectedState, chosen: Mapping[str, Any]) -> None:
    for name in chosen:
        if name not in state.projected:
            raise ValueError(
                f"{what}: the state holds no subspace for {name}; it was made for other weights. Make it with init."
            )
    left = set(state.projected) - set(chosen)
    if left:
        raise ValueError(
            f"{what}: the state holds a subspace for {min(left)}, which is not targeted. Make it with init."
        )


def _check_shapes(what: str, name: str, found: Any, expected: Any) -> None:
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{what}: the state's subspace for {name} has shape {shapes[0]}, expected {shapes[1]}; it was made with other settings or for "
            "another model. Make it with init."
        )
