"""AdaPT: training on fixed-point weights whose format each layer chooses anew every few dozen steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.fixed_point import MAX_BITS
from lowrank_jax.optim.precision_state import LayerPrecision, PrecisionState
from lowrank_jax.optim.precision_switch import MAX, MIN, gradient_diversity, push_down, push_up
from lowrank_jax.optim.targets import choose
from lowrank_jax.sites import Site, flatten, with_leaves


def adaptive_precision(
    *,
    targets: Sequence[str] | None = None,
    sites: Mapping[str, Site] | None = None,
    threshold: float = 0.05,
    start: tuple[int, int] = (8, 4),
    buffer: int = 4,
    min_look_back: int = 25,
    max_look_back: int = 100,
    look_back_momentum: float = 0.33,
    min_resolution: int = 50,
    max_resolution: int = 150,
    normalise: bool = True,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adaptive Precision Training (AdaPT): A dynamic fixed point quantized training approach for DNNs (arXiv 2107.13490).

    The weights that an optimizer updates stay as they are; the loss sees them in fixed point, through `quantise_params`, with a format
    ``<WL, FL>`` of each layer's own. Every window of gradients a layer switches to the shortest format that keeps the histogram of its
    weights (`push_down`), made longer by what the diversity of its gradients asks for (`push_up`). Layers of a scanned stack and experts
    are layers of their own. Chain it in front of the optimizer, and give it the loss, which it watches::

        tx = optax.chain(adaptive_precision(), optax.sgd(0.1))
        value, grads = jax.value_and_grad(lambda p: loss(quantise_params(p, state[0], key)))(params)
        updates, state = tx.update(grads, state, params, value=value)

    Nothing here makes a step faster on hardware that has no such words: what is real are the bits (`mean_word_length`), not the time.
    A layer keeps the sum of its gradients, as much as its weights.

    The abstract gives the aim, layer by layer: the lowest precision without loss of information that still lets the layer learn. The rest
    is a reconstruction, for want of the paper's text, after a public optimiser with its vocabulary whose origin is not confirmed; so are
    all default numbers. The length of the window follows ``max_look_back / diversity``; the histogram gets one bin more where that is at
    its upper bound and one less at the lower; the strategy goes from min to mean to max while the loss is not below its mean over the
    (average) window, and back to min when it is. That optimiser takes its divergence of probabilities where logarithms belong, and of
    the first row of a weight; here it is as defined.

    Args:
      targets, sites: which weights, as in `lowrank_jax.optim.galore`; all others stay in full precision.
      threshold: of the divergence, in nats. start: ``(WL, FL)`` before the first switch. buffer: the fewest integer bits.
      min_look_back, max_look_back: bounds of the window, in steps. look_back_momentum: weight of the newest proposal for it.
      min_resolution, max_resolution: bounds of the number of bins; it starts at their mean.
      normalise: gradients of these weights get norm 1, layer by layer. seed: of the rounding in the search.

    Raises:
      ValueError: at once, a number out of range; from ``init``, a target that matches nothing or is no matrix; from ``update``, no
        parameters, no ``value``, or a state of other weights.

    Example:
      >>> params = {"layer": {"kernel": jnp.ones((6, 8)), "bias": jnp.zeros(8)}}
      >>> state = adaptive_precision(start=(8, 4)).init(params)
      >>> state.layers["layer/kernel"].word_length.tolist()
      [[8]]
    """
    _check(threshold, start, buffer, min_look_back, max_look_back, look_back_momentum, min_resolution, max_resolution)
    name = "adaptive_precision"

    def init(params: Any) -> PrecisionState:
        flat, layers = flatten(params), {}
        for path, site in choose(name, params, targets, sites).items():
            one = tuple(n if axis in site.batch else 1 for axis, n in enumerate(site.shape))
            whole = lambda n, one=one: jnp.full(one, n, jnp.int32)  # noqa: E731
            layers[path] = LayerPrecision(
                whole(start[0]), whole(start[1]), whole(0), jnp.full(one, max_look_back, jnp.float32),
                whole((min_resolution + max_resolution) // 2), jnp.zeros(one), jnp.zeros_like(flat[path], jnp.float32),
            )  # fmt: skip
        zero = jnp.zeros((), jnp.int32)
        return PrecisionState(zero, layers, zero + MIN, jnp.zeros(max_look_back))

    def update(
        updates: Any, state: PrecisionState, params: Any = None, *, value: Any = None, **extra: Any
    ) -> tuple[Any, PrecisionState]:
        if params is None:
            raise ValueError(f"{name}: update needs the parameters: update(updates, state, params, value=loss).")
        if value is None:
            raise ValueError(
                f"{name}: update needs value=, the loss of the step: update(updates, state, params, value=loss)."
            )
        flat, weights, chosen = flatten(updates), flatten(params), choose(name, params, targets, sites)
        if set(state.layers) != set(chosen):
            raise ValueError(
                f"{name}: the state holds {', '.join(state.layers)}, expected {', '.join(chosen)}; it was made for other weights. Make it "
                "with init."
            )
        strategy, losses = _watch(state, jnp.abs(jnp.asarray(value, jnp.float32)))
        new, layers = {}, {}
        for n, (path, site) in enumerate(chosen.items()):
            g = flat[path].astype(jnp.float32)
            norm = _norm(g, site)
            if normalise:
                g = g / jnp.where(norm > 0, norm, 1)
                new[path] = g.astype(flat[path].dtype)
                norm = _norm(g, site)
            old = state.layers[path]
            layer = old._replace(seen=old.seen + 1, norms=old.norms + norm, gradient=old.gradient + g)
            diversity = gradient_diversity(layer.norms, _norm(layer.gradient, site))
            layer = widened(layer, diversity)
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), n), state.count)
            layers[path] = switched(layer, diversity, weights[path], site, strategy, key)
        state = PrecisionState(optax.safe_increment(state.count), layers, strategy, losses)
        return with_leaves(updates, new), state

    def widened(layer: LayerPrecision, diversity: jax.Array) -> LayerPrecision:
        proposal = jnp.clip(jnp.ceil(max_look_back / diversity), min_look_back, max_look_back)
        look_back = look_back_momentum * proposal + (1 - look_back_momentum) * layer.look_back
        step = (proposal == max_look_back).astype(jnp.int32) - (proposal == min_look_back)
        resolution = jnp.clip(layer.resolution + step, min_resolution, max_resolution)
        return layer._replace(look_back=jnp.clip(look_back, min_look_back, max_look_back), resolution=resolution)

    def switched(
        layer: LayerPrecision, diversity: jax.Array, w: jax.Array, site: Site, strategy: jax.Array, key: jax.Array
    ) -> LayerPrecision:
        due = layer.seen >= layer.look_back

        def switch(args: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            w, key, resolution, diversity, *_ = args
            low = push_down(w, key, threshold, resolution, max_bins=max_resolution, max_fraction=MAX_BITS - buffer)
            return push_up(*low, diversity, strategy, buffer)

        def one(args: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            return jax.lax.cond(args[4], switch, lambda args: (args[5], args[6]), args)

        number = math.prod(site.batch_shape)
        each = [x.ravel() for x in (layer.resolution, diversity, due, layer.word_length, layer.fraction_length)]
        # A loop over layers, not vmap, under which every layer would search at every step.
        word, fraction = jax.lax.map(one, (site.canonical(w).reshape(number, -1), jax.random.split(key, number), *each))
        keep = lambda x: jnp.where(due, jnp.zeros_like(x), x)  # noqa: E731
        return layer._replace(
            word_length=word.reshape(due.shape), fraction_length=fraction.reshape(due.shape),
            seen=keep(layer.seen), norms=keep(layer.norms), gradient=keep(layer.gradient),
        )  # fmt: skip

    return optax.GradientTransformationExtraArgs(init, update)


def _norm(g: jax.Array, site: Site) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(g), axis=site.inputs + site.outputs, keepdims=True))


def _watch(state: PrecisionState, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The strategy after a step's loss, and the losses with it."""
    size = state.losses.size
    look_backs = jnp.concatenate([layer.look_back.ravel() for layer in state.layers.values()])
    window = jnp.floor(look_backs.mean()).astype(jnp.int32)
    age = (state.count - 1 - jnp.arange(size)) % size
    mean = jnp.sum(jnp.where(age < window, state.losses, 0)) / window
    moved = jnp.where(value < mean, MIN, jnp.minimum(state.strategy + 1, MAX))
    strategy = jnp.where(state.count >= window, moved, state.strategy)
    return strategy, state.losses.at[state.count % size].set(value)


def _check(
    threshold: float, start: tuple[int, int], buffer: int, min_look_back: int, max_look_back: int, momentum: float,
    min_resolution: int, max_resolution: int,
) -> None:  # fmt: skip
    word, fraction = start
    for fine, given, expected in [
        (threshold > 0, f"threshold={threshold}", "a number above 0"),
        (1 <= word <= MAX_BITS and 0 <= fraction <= MAX_BITS, f"start={start}", f"up to {MAX_BITS} bits"),
        (1 <= buffer < MAX_BITS, f"buffer={buffer}", f"1 to {MAX_BITS - 1} bits"),
        (1 <= min_look_back <= max_look_back, f"min_look_back={min_look_back}, max_look_back={max_look_back}",
         "steps, the first no more than the second"),
        (0 < momentum <= 1, f"look_back_momentum={momentum}", "a number above 0, at most 1"),
        (2 <= min_resolution <= max_resolution, f"min_resolution={min_resolution}, max_resolution={max_resolution}",
         "at least 2 bins, the first no more than the second"),
    ]:  # fmt: skip
        if not fine:
            raise ValueError(f"adaptive_precision({given}): expected {expected}.")
