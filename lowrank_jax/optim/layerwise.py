"""One layer at a time: the optimizer's step inside the backward pass, so that no more than one layer's gradient exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax.sites import flatten, named_sharding


class ModelParts(NamedTuple):
    """A model as three pure functions around a stack of equal layers. Below, ``rest`` are the parameters outside the stack.

    Attributes:
      stem: ``(rest, batch) -> (x, shared)``: what goes into the first layer, and what every layer is given besides (rotary tables, masks,
        an encoder's output).
      layer: ``(params, x, shared) -> x``, with the parameters of one layer; ``x`` a tree of floats that keeps its shapes and dtypes.
      head: ``(rest, x, shared, batch) -> loss``, a scalar; the mean over the batch if that is what is minimised.
    """

    stem: Callable[[Any, Any], tuple[Any, Any]]
    layer: Callable[[Any, Any, Any], Any]
    head: Callable[[Any, Any, Any, Any], jax.Array]


class LayerwiseState(NamedTuple):
    """Attributes: layers: each layer's own state, its leaves stacked ``[layers, ...]``, counters too. rest: of everything else."""

    layers: Any
    rest: Any


class LayerwiseUpdate(NamedTuple):
    """Attributes: init: ``(stacked, rest) -> state``. update: ``(stacked, rest, state, batch) -> (stacked, rest, state, loss)``."""

    init: Callable[[Any, Any], LayerwiseState]
    update: Callable[[Any, Any, LayerwiseState, Any], tuple[Any, Any, LayerwiseState, jax.Array]]


def layerwise_update(
    parts: ModelParts, tx_layer: optax.GradientTransformation, tx_rest: optax.GradientTransformation
) -> LayerwiseUpdate:
    """A whole training step that updates each layer as soon as the backward pass knows its gradient, and then forgets the gradient.

    The per-layer weight update of GaLore (arXiv 2403.03507), also in LOMO (arXiv 2306.09782), for models whose layers are stacked by a
    scan: ``stacked`` has leaves ``[layers, ...]``. The forward pass keeps the input of each layer and nothing else, so every layer is
    computed twice, as under full rematerialisation. The step is that of ``tx_layer`` run on each layer alone with the gradients of the
    whole model: no layer sees a weight that the same step has changed. Where the loss is not finite the step changes nothing.

    Jit ``update`` with ``donate_argnums=(0, 1, 2)``: then the stack and its state are written in place. A TPU may lay out a matrix with a
    side that is no multiple of 8 so that it has to be copied nevertheless: round such sides up, or compile with
    ``jax.experimental.layout.Layout.AUTO``.

    What needs all gradients before the first update is impossible here: a global norm (a clip in ``tx_layer`` sees one layer at a time),
    accumulation over batches, skipping a step for its gradients.

    Args:
      parts: the model, such as `lowrank_jax.models.llama_parts` makes.
      tx_layer: a whole optimizer (decay, learning rate) for the tree of one layer. tx_rest: one for the parameters outside.

    Raises:
      ValueError: when traced, a stack without layers or whose leaves disagree about their number (named), a state of another stack, a
        loss that is no scalar.

    Example:
      >>> parts = ModelParts(
      ...     stem=lambda rest, batch: (batch @ rest, None),
      ...     layer=lambda params, x, shared: x + jnp.tanh(x @ params["kernel"]),
      ...     head=lambda rest, x, shared, batch: jnp.mean((x @ rest.T - batch) ** 2),
      ... )
      >>> step = layerwise_update(parts, optax.adamw(1e-2), optax.adamw(1e-3))
      >>> stacked, rest = {"kernel": jnp.ones((3, 4, 4))}, jnp.ones((6, 4))
      >>> state = step.init(stacked, rest)
      >>> state.layers[0].mu["kernel"].shape, state.layers[0].count.shape
      ((3, 4, 4), (3,))
      >>> stacked, rest, state, loss = jax.jit(step.update, donate_argnums=(0, 1, 2))(stacked, rest, state, jnp.ones((2, 6)))
      >>> loss.shape, state.layers[0].count.tolist()
      ((), [1, 1, 1])
    """

    def init(stacked: Any, rest: Any) -> LayerwiseState:
        _depth(stacked)
        make = jax.vmap(tx_layer.init)
        if any(map(named_sharding, jax.tree.leaves(stacked))):
            make = jax.jit(make, out_shardings=jax.tree.map(_of_a_stack, tx_layer.init(_take(stacked, jnp.int32(0)))))
        return LayerwiseState(make(stacked), tx_rest.init(rest))

    def update(
        stacked: Any, rest: Any, state: LayerwiseState, batch: Any
    ) -> tuple[Any, Any, LayerwiseState, jax.Array]:
        depth = _depth(stacked, state.layers)

        def stem(rest: Any) -> tuple[Any, Any]:
            x, shared = parts.stem(rest, batch)
            return (x, _floats(shared)), shared

        (x, floats), stem_back, shared = jax.vjp(stem, rest, has_aux=True)
        layer = lambda params, x, floats: parts.layer(params, x, _joined(floats, shared))  # noqa: E731
        x, inputs = jax.lax.scan(lambda x, params: (layer(params, x, floats), x), x, stacked)
        loss, head_back = jax.vjp(lambda rest, x, y: parts.head(rest, x, _joined(y, shared), batch), rest, x, floats)
        if loss.shape:
            raise ValueError(f"layerwise_update: head has to return a scalar, got shape {loss.shape}; take the mean.")

        ok = jnp.isfinite(loss)

        def step(gradients: Any, params: Any, state: Any) -> tuple[Any, Any]:
            updates, state = tx_layer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        def back(n: jax.Array, carry: Any) -> Any:
            stacked, states, dx, dfloats = carry
            at = depth - 1 - n
            params, x, own = _take((stacked, inputs, states), at)
            gradients, dx, more = jax.vjp(layer, params, x, floats)[1](dx)
            # No compiler fuses across a condition. Without one a CPU's reads slices of the old state within the writes of the new, has to
            # keep both, and copies whole stacks for every layer.
            new = jax.lax.cond(ok, step, lambda gradients, params, own: (params, own), gradients, params, own)
            return *_put((stacked, states), new, at), dx, jax.tree.map(jnp.add, dfloats, more)

        of_head, dx, dfloats = head_back(jnp.ones_like(loss))
        # The stack is carried, not scanned over: what a scan returns lies beside what it was given, a carry is written in place.
        stacked, states, dx, dfloats = jax.lax.fori_loop(0, depth, back, (stacked, state.layers, dx, dfloats))
        gradients = jax.tree.map(jnp.add, of_head, stem_back((dx, dfloats))[0])
        updates, outside = tx_rest.update(gradients, state.rest, rest)
        # Here a choice, number by number: the results of a condition would lie beside what they replace.
        keep = lambda new, old: jnp.where(ok, new, old)  # noqa: E731
        rest, outside = jax.tree.map(keep, (optax.apply_updates(rest, updates), outside), (rest, state.rest))
        return stacked, rest, LayerwiseState(states, outside), loss

    return LayerwiseUpdate(init, update)


def _of_a_stack(leaf: jax.Array) -> NamedSharding | None:
    """Where a stack of such leaves lies; None: as the compiler likes."""
    own = named_sharding(leaf)
    return own and NamedSharding(own.mesh, PartitionSpec(None, *own.spec))


def _take(tree: Any, at: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, at, keepdims=False), tree)


def _put(tree: Any, new: Any, at: jax.Array) -> Any:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, at, 0), tree, new)


def _floats(shared: Any) -> Any:
    """The leaves that can have a gradient; None in the place of others."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else None, shared)


def _joined(floats: Any, shared: Any) -> Any:
    return jax.tree.map(lambda x, y: y if x is None else x, floats, shared, is_leaf=lambda x: x is None)


def _depth(stacked: Any, states: Any = ()) -> int:
    """The number of layers that all leaves agree on."""
    flat = flatten(stacked)
    first = next(iter(flat), None)
    if first is None or not flat[first].shape or not flat[first].shape[0]:
        found = "has no leaves" if first is None else f"begins with {first} of shape {flat[first].shape}"
        raise ValueError(f"layerwise_update: the stack {found}; expected leaves [layers, ...] with at least one layer.")
    depth = flat[first].shape[0]
    for what, leaves in (("stack", flat), ("state", flatten(states))):
        for path, leaf in leaves.items():
            if leaf.shape[:1] != (depth,):
                raise ValueError(
                    f"layerwise_update: {path} of the {what} has shape {leaf.shape}, but {first} has {depth} layers; expected "
                    f"[{depth}, ...]. What belongs to no layer goes into rest; a state is made by init for its stack."
                )
    return depth
