"""GaLore without gradients: between refreshes it is an adapter, and a refresh is a few more of its steps.

GaLore (arXiv 2403.03507) updates ``W`` by ``P inner(P^T G)``. The gradient of the adapter ``x W + x P r`` with respect to ``r`` is
``P^T G`` itself, so training ``r`` with the same optimizer is the same training, and the dense gradient need not exist; that is known. A
refresh needs the leading singular directions of ``G``. A randomized range finder asks for products ``G Omega`` and ``Q^T G`` only, and
these are gradients of adapters too: of ``x W + x r Omega^T`` and of ``x W + x Q r``. So a refresh is ``2 * power_iterations + 1`` backward
passes (one more where both sides are projected) on one batch, for all weights at once, in the memory of a LoRA of rank
``rank + oversample``. Finding the subspace in this way is ours, not the paper's; the subspace is the paper's.

    plan = lr.plan(params, {".*/(attention|mlp)/.*": lr.subspace_update(rank=128)})
    refresh = jax.jit(lr.dual_galore.refresher(loss), donate_argnums=(0, 1))
    for step, batch in enumerate(batches):
        if step % 200 == 0:
            params, adapters = refresh(params, adapters, batch, jax.random.key(step))
        ...  # an ordinary step on lr.partition(adapters), the learning rate times GaLore's scale

The weights move at refreshes only; until then what was learned is in ``r``, and ``lr.merge(params, adapters)`` is the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import linalg
from lowrank_jax.adapters import Adapters, join, partition
from lowrank_jax.folding import add_low_rank
from lowrank_jax.methods.subspace_update import subspace_update
from lowrank_jax.optim.subspace import Bases, sides
from lowrank_jax.plan import Entry

Loss = Callable[[Any, Adapters, Any], jax.Array]


def absorb(params: Any, adapters: Adapters) -> tuple[Any, Adapters]:
    """Moves what was learned into the weights: ``W + P r``, and ``r = 0``. The model stays what it is.

    One matrix of a stack at a time, in place where ``params`` is donated: no dense update of a whole stack exists. Other methods' leaves
    stay. Weights in bfloat16 round what they are given, as they do in any training with such weights.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"x": {"kernel": jnp.zeros((2, 3))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"x": lr.subspace_update(rank=2)}))
      >>> moved = adapters.replace(sites=jax.tree.map(jnp.ones_like, adapters.sites))
      >>> params, adapters = absorb(params, moved)
      >>> params["x"]["kernel"].tolist(), float(adapters.sites["x/kernel"]["r"].sum())
      ([[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]], 0.0)
    """
    sites = dict(adapters.sites)
    for entry in _own(adapters):
        leaves = sites[entry.site.path]
        sites[entry.site.path] = {**leaves, "r": jnp.zeros_like(leaves["r"])}
    return add_low_rank(params, adapters, _own(adapters)), adapters.replace(sites=sites)


def subspaces(
    loss: Loss,
    params: Any,
    adapters: Adapters,
    batch: Any,
    key: jax.Array,
    *,
    oversample: int = 16,
    power_iterations: int = 2,
) -> dict[str, Bases]:
    """The leading singular directions of every weight's gradient on a batch, by a range finder whose products are gradients of adapters.

    Args:
      loss: ``(params, adapters, batch) -> scalar``. adapters: of `subspace_update` where a subspace is wanted, with ``r = 0``.
      key: of the first sketches. oversample, power_iterations: see `lowrank_jax.linalg.range_finder`.

    Returns:
      ``{path: Bases}``, float32.
    """
    own = _own(adapters)
    both = [entry.site.path for entry in own if all(sides(_side(entry), entry.local.n_in, entry.local.n_out))]
    far: dict[str, jax.Array] = {}
    for n, entry in enumerate(own):
        rank, site = _width(entry, oversample), entry.local
        size = site.n_out if _sought(entry) else site.n_in
        far[entry.site.path] = jax.random.normal(jax.random.fold_in(key, n), (size, rank))
        far[entry.site.path] = jnp.broadcast_to(far[entry.site.path], (*site.batch_shape, size, rank))
    near = _products(loss, params, adapters, batch, far, opposite=True)
    for _ in range(power_iterations):  # no loop of the compiler's: on a TPU it holds twice the temporaries
        far = _products(loss, params, adapters, batch, _orthonormal(near), opposite=False)
        near = _products(loss, params, adapters, batch, _orthonormal(far), opposite=True)
    near = {entry.site.path: linalg.left_singular_vectors(near[entry.site.path], _rank(entry)) for entry in own}
    far = _products(loss, params, adapters, batch, {path: near[path] for path in both}, opposite=False) if both else {}
    found = {}
    for entry in own:
        path = entry.site.path
        other = linalg.left_singular_vectors(far[path], _rank(entry)) if path in both else None
        found[path] = Bases(near[path], other) if _sought(entry) else Bases(other, near[path])
    return found


def refresher(loss: Loss, *, oversample: int = 16, power_iterations: int = 2) -> Callable[..., tuple[Any, Adapters]]:
    """``(params, adapters, batch, key) -> (params, adapters)``: absorbs what was learned, and goes on in a batch's subspaces.

    To be jitted with ``donate_argnums=(0, 1)``. The optimizer's state is left alone (GaLore's ``keep``); to start it anew make it with
    ``init`` again. Arguments as of `subspaces`.
    """

    def refresh(params: Any, adapters: Adapters, batch: Any, key: jax.Array) -> tuple[Any, Adapters]:
        params, adapters = absorb(params, adapters)
        found = subspaces(loss, params, adapters, batch, key, oversample=oversample, power_iterations=power_iterations)
        return params, placed(adapters, found)

    return refresh


def placed(adapters: Adapters, found: Mapping[str, Bases]) -> Adapters:
    """The adapters in other subspaces; ``r`` keeps its numbers."""
    sites = dict(adapters.sites)
    for path, bases in found.items():
        new = {"p": bases.inputs, "q": None if bases.outputs is None else jnp.swapaxes(bases.outputs, -1, -2)}
        sites[path] = {**sites[path], **{n: x.astype(sites[path][n].dtype) for n, x in new.items() if x is not None}}
    return adapters.replace(sites=sites)


def _products(
    loss: Loss, params: Any, adapters: Adapters, batch: Any, known: Mapping[str, jax.Array], opposite: bool
) -> dict[str, jax.Array]:
    """``G known`` or ``G^T known``, ``[*batch, n, k]``, as gradients of an adapter that has ``known`` as its frozen factor."""
    entries, sites = [], dict(adapters.sites)
    for entry in adapters.plan.entries:
        path = entry.site.path
        if path in known:
            inputs = _sought(entry) != opposite  # on which side the known factor lies
            entry = replace(entry, method=subspace_update(known[path].shape[-1], "input" if inputs else "output"))
            site, k = entry.local, known[path].shape[-1]
            fixed = {"p": known[path]} if inputs else {"q": jnp.swapaxes(known[path], -1, -2)}
            shape = (k, site.n_out) if inputs else (site.n_in, k)
            sites[path] = {**fixed, "r": jnp.zeros((*site.batch_shape, *shape))}
        entries.append(entry)
    probe = adapters.replace(sites=sites, plan=replace(adapters.plan, entries=tuple(entries)))
    train, frozen = partition(probe)
    wanted = {path: leaves for path, leaves in train.items() if path in known}
    rest = {path: leaves for path, leaves in train.items() if path not in known}
    gradients = jax.grad(lambda wanted: loss(params, join({**rest, **wanted}, frozen), batch))(wanted)
    out = {}
    for entry in probe.plan.entries:
        path = entry.site.path
        if path in known:
            g = gradients[path]["r"]
            out[path] = jnp.swapaxes(g, -1, -2) if "p" in entry.leaves else g
    return out


def _orthonormal(matrices: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: linalg.orthonormal(x) for path, x in matrices.items()}


def _own(adapters: Adapters) -> list[Entry]:
    return [entry for entry in adapters.plan.entries if entry.method.name == "subspace_update"]


def _rank(entry: Entry) -> int:
    return dict(entry.method.config)["rank"]


def _side(entry: Entry) -> Any:
    return dict(entry.method.config)["side"]


def _sought(entry: Entry) -> bool:
    """Whether the range is sought on the input side; where both are wanted, on the shorter."""
    inputs, outputs = sides(_side(entry), entry.local.n_in, entry.local.n_out)
    return entry.local.n_in <= entry.local.n_out if inputs and outputs else inputs


def _width(entry: Entry, oversample: int) -> int:
    return min(_rank(entry) + oversample, entry.local.n_in, entry.local.n_out)
