"""LT-SFT's two phases: what is chosen, and training it alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.lt_sft.sparse_delta import check_weight
from lowrank_jax.lt_sft.top_changes import Change, farthest
from lowrank_jax.sites import flatten, hits, with_leaves


class Ticket(NamedTuple):
    """What `lottery` gives: the fine-tuned parameters, and the mask they were trained under."""

    params: Any
    mask: Any


class MaskState(NamedTuple):
    """The mask, which travels as state so that a compiled step does not hold a copy of it as a constant."""

    mask: Any


def lottery(
    train: Callable[[Any, Any], Any],
    start: Any,
    *,
    entries: int | None = None,
    density: float = 0.01,
    whole: Sequence[str] = (),
    frozen: Sequence[str] = (),
    rounds: int = 1,
) -> Ticket:
    """Lottery Ticket Sparse Fine-Tuning: trains once to see what moves, and again, from the same start, with that alone.

    Composable Sparse Fine-Tuning for Cross-Lingual Transfer (LT-SFT, arXiv 2110.07560). Phase 1 fine-tunes everything, `top_changes`
    chooses the entries that moved farthest, everything goes back to ``start``, and phase 2 trains the chosen entries. What comes out as
    `SparseDelta` may be added to others: a task's, learnt on top of its language's, and another language's.

    Phase 1 costs what full fine-tuning does. The published sizes are 4% of a multilingual BERT for a language and 8% for a task, at a rate
    of 5e-5, with `l1_distance` in the loss of languages, norms frozen, and the head whole.

    Args:
      train: ``(params, mask) -> params``, called twice a round; it makes an optimizer of its own each time, with `mask_updates` last, and
        may donate its parameters.
      start: theta0; what is returned differs from it where the mask allows, and nowhere else.
      entries, density, whole, frozen: see `top_changes`.
      rounds: more than one chooses ``entries / rounds`` at a time and goes on from the round before, each phase 2 with all chosen so far.

    Raises:
      ValueError: fewer rounds than one, or more than entries; and as `top_changes`.

    Example:
      >>> def train(params, mask):
      ...     tx = optax.chain(optax.sgd(0.5), mask_updates(mask))
      ...     gradient = jax.grad(lambda p: ((p["w"] - jnp.array([1.0, 3.0, 2.0])) ** 2).sum() / 2)(params)
      ...     return optax.apply_updates(params, tx.update(gradient, tx.init(params), params)[0])
      >>> lottery(train, {"w": jnp.zeros(3)}, entries=1).params["w"].tolist()
      [0.0, 1.5, 0.0]
    """
    number = _number("lottery", start, entries, density, whole, frozen)
    if not 1 <= rounds <= number:
        raise ValueError(f"lottery(rounds={rounds}): expected from 1 to {number}, the number of entries.")
    everything, chosen, params = allowed(start, whole, frozen), None, start
    # Copies, so that a training that donates its parameters leaves the start to the second phase.
    copied = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
    for _ in range(rounds):
        tuned = train(copied(params), everything)
        # Distances are from the very start, as in the release, whatever a round begins with.
        chosen = top_changes(start, tuned, entries=number // rounds, whole=whole, frozen=frozen, chosen=chosen)
        params = train(copied(params), chosen)
    return Ticket(params, chosen)


def allowed(params: Any, whole: Sequence[str] = (), frozen: Sequence[str] = ()) -> Any:
    """The mask of phase 1: True at every entry, ``True`` for whole weights, ``False`` for frozen ones and whole numbers.

    Example:
      >>> mask = allowed({"w": jnp.zeros(2), "head": jnp.zeros(3)}, whole=["head"])
      >>> mask["w"].tolist(), mask["head"].tolist()
      ([True, True], True)
    """
    flat = flatten(params)
    roles = _roles("allowed", flat, whole, frozen)
    return with_leaves(
        params, {p: jnp.ones(flat[p].shape, bool) if r is None else jnp.bool_(r) for p, r in roles.items()}
    )


def top_changes(
    start: Any,
    tuned: Any,
    *,
    entries: int | None = None,
    density: float = 0.01,
    whole: Sequence[str] = (),
    frozen: Sequence[str] = (),
    chosen: Any = None,
) -> Any:
    """The mask of the ``entries`` that moved farthest, over all weights jointly: a weight has no share of its own.

    Exactly as many are chosen: of those at the threshold the first ones, in the order of the tree. The release takes all of them, which
    with bfloat16 parameters, or many entries that did not move, is far more than asked for.

    Args:
      start, tuned: trees of parameters before and after phase 1.
      entries: K. density: instead: K as a share of what may be masked.
      whole: patterns of weights (see `lowrank_jax.plan`) that are trained and stored whole, such as a head: their mask is one ``True``.
      frozen: patterns of weights that are not trained, such as norms: their mask is one ``False``; so is that of whole numbers.
      chosen: a mask of entries that are in already: they stay, and K come to them.

    Returns:
      A tree like ``start`` of bool arrays: of a weight's shape, or scalars.

    Raises:
      ValueError: a number or density out of range, more entries than there are, a pattern that matches nothing, a weight that is missing,
        of another shape or not finite (by path).

    Example:
      >>> start = {"x": jnp.zeros(3), "y": jnp.zeros(2)}
      >>> mask = top_changes(start, {"x": jnp.array([5.0, -4.0, 0.1]), "y": jnp.array([0.2, 3.0])}, entries=3)
      >>> mask["x"].tolist(), mask["y"].tolist()
      ([True, True, False], [False, True])
    """
    old, new = flatten(start), flatten(tuned)
    roles = _roles("top_changes", old, whole, frozen)
    number = _number("top_changes", start, entries, density, whole, frozen)
    taken = {} if chosen is None else flatten(chosen)
    for path, leaf in old.items():
        check_weight(path, new, tuple(leaf.shape), "the tuned parameters")
    changes = {p: Change(old[p], new[p], taken.get(p)) for p, role in roles.items() if role is None}
    masks = {path: jnp.bool_(role) for path, role in roles.items() if role is not None}
    return with_leaves(start, {**masks, **farthest("top_changes", changes, number)})


def mask_updates(mask: Any) -> optax.GradientTransformation:
    """Leaves everything outside a mask exactly as it is. Chain it last.

    A gradient of zero does not do that: weight decay and momentum go on moving what has none, as the release's would if it decayed.

    Args:
      mask: a tree of bool arrays, each of a weight's shape or a scalar, as `top_changes` gives.

    Raises:
      ValueError (from ``init``): a mask of other parameters.

    Example:
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> tx = optax.chain(optax.adamw(0.1, weight_decay=0.5), mask_updates({"w": jnp.array([False, True])}))
      >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].round(3).tolist()
      [1.0, -2.0]
    """

    def init(params: Any) -> MaskState:
        own, of = flatten(mask), flatten(params)
        if own.keys() != of.keys() or any(m.shape not in ((), of[path].shape) for path, m in own.items()):
            raise ValueError("mask_updates: the mask is of other parameters. Make it with top_changes from these.")
        return MaskState(jax.tree.map(jnp.array, mask))  # of its own: a step may donate it

    def update(updates: Any, state: MaskState, params: Any = None) -> tuple[Any, MaskState]:
        # Minus zero: adding it keeps a weight of minus zero too.
        return jax.tree.map(lambda m, u: jnp.where(m, u, jnp.full_like(u, -0.0)), state.mask, updates), state

    return optax.GradientTransformation(init, update)


def l1_distance(params: Any, start: Any, leave_out: Sequence[str] = ()) -> jax.Array:
    """``sum |params - start|`` over the number of all parameters, float32: 0.1 of it is added to a language's loss, in both phases.

    Args:
      leave_out: patterns of weights that are not summed; they count in the number, as in the release.

    Raises:
      ValueError: a pattern that matches nothing; a weight that is missing or of another shape.

    Example:
      >>> float(l1_distance({"w": jnp.array([1.0, -3.0])}, {"w": jnp.zeros(2)}))
      2.0
    """
    now, old = flatten(params), flatten(start)
    roles = _roles("l1_distance", now, (), leave_out)
    for path, leaf in now.items():
        check_weight(path, old, tuple(leaf.shape), "the start")

    def apart(path: str) -> jax.Array:
        change = jnp.asarray(now[path], jnp.float32) - jnp.asarray(old[path], jnp.float32)
        # Not jnp.abs: its gradient at zero, where everything starts, is one.
        return (change * jax.lax.stop_gradient(jnp.sign(change))).sum()

    size = sum(math.prod(x.shape) for x in now.values())
    return sum((apart(path) for path, role in roles.items() if role is None), jnp.float32(0)) / size


def _roles(what: str, flat: Mapping[str, Any], whole: Sequence[str], frozen: Sequence[str]) -> dict[str, bool | None]:
    """None: entries of it may be chosen. True: trained whole. False: not trained."""
    found: dict[str, set[str]] = {}
    for name, patterns in (("whole", whole), ("frozen", frozen)):
        found[name] = set()
        for pattern in patterns:
            found[name] |= set(hits(f"{what}: {name}={pattern!r}", pattern, flat))
    both = sorted(found["whole"] & found["frozen"])
    if both:
        raise ValueError(f"{what}: {both[0]} is both whole and frozen; take it out of one of them.")

    def role(path: str) -> bool | None:
        if path in found["whole"]:
            return True
        return False if path in found["frozen"] or not jnp.issubdtype(flat[path].dtype, jnp.floating) else None

    return {path: role(path) for path in flat}


def _number(
    what: str, params: Any, entries: int | None, density: float, whole: Sequence[str], frozen: Sequence[str]
) -> int:
    if entries is not None:
        if entries < 1:
            raise ValueError(f"{what}(entries={entries}): expected at least 1.")
        return entries
    flat = flatten(params)
    size = sum(math.prod(flat[path].shape) for path, role in _roles(what, flat, whole, frozen).items() if role is None)
    number = math.floor(density * size + 1e-9)
    if not 0 < density <= 1 or number < 1:
        raise ValueError(
            f"{what}(density={density}): expected a share in (0, 1] of {size} entries that is one at least."
        )
    return number
