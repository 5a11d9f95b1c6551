"""How a model is learned from scratch: which weights are trained, by adapters or as they are, and by which transforms.

A method is a function ``(given, *, fields) -> Learner``; a field's default is what the config shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import lowrank_jax as lr
from lowrank_jax.folding import add_low_rank
from lowrank_jax.sites import Site, flatten, matches, with_leaves

# The matrices of attention and MLP: what the papers treat as low-rank. Embeddings, norms and head are always trained as they are.
MATRICES = r"(.*/)?(attention|mlp)/.*"

Loss = Callable[[Any, lr.Adapters, Any], jax.Array]
Refresh = Callable[[Loss], Callable[..., tuple[Any, lr.Adapters, Any]]]


class Given(NamedTuple):
    """What a method is made for.

    Attributes:
      sites: of the model's parameters, or of one layer's. adam: Adam's scaling with the run's decays.
      decay: weight decay of matrices, or identity; before the learning rate.
    """

    sites: Mapping[str, Site]
    adam: optax.GradientTransformation
    adam_8bit: optax.GradientTransformation
    decay: optax.GradientTransformation


class Learner(NamedTuple):
    """A method for one model.

    Attributes:
      weights: transform of the weights that are trained as they are, without the learning rate.
      outside: what it does to the weights in no layer where the layers' are updated one layer at a time (`weights` then sees a layer);
        None: the method cannot work so.
      rules: of the plan of adapters; {}: none, all weights are trained as they are.
      factors: transform of the adapters' leaves, without the learning rate.
      zero: the base of the adapters is zero and not stored.
      every: updates between refreshes; 0: none. first: whether there is one before the first update.
      refresh: ``loss -> (params, adapters, optimizer, batch, key) -> (params, adapters, optimizer)``; the optimizer is that of the factors.
      restarts: updates over which the learning rate rises again after a refresh.
    """

    weights: optax.GradientTransformation
    outside: optax.GradientTransformation | None = None
    rules: Mapping[str, lr.Method] = {}
    factors: optax.GradientTransformation = optax.identity()
    zero: bool = False
    every: int = 0
    first: bool = False
    refresh: Refresh | None = None
    restarts: int = 0


def adamw(given: Given, *, scale: float = 1.0) -> Learner:
    """AdamW: the baseline. ``scale``: of the updates of matrices in layers, as GaLore has one."""
    return Learner(optax.chain(given.adam, _matrices_times(scale), given.decay), optax.chain(given.adam, given.decay))


def adamw_8bit(given: Given, *, scale: float = 1.0) -> Learner:
    """AdamW with block-wise dynamic eight-bit moments (arXiv 2110.02861)."""
    adam = given.adam_8bit
    return Learner(optax.chain(adam, _matrices_times(scale), given.decay), optax.chain(adam, given.decay))


def galore(
    given: Given,
    *,
    rank: int = 128,
    scale: float = 0.25,
    refresh_every: int = 200,
    on_refresh: Any = "keep",
    side: Any = "smaller",
    svd: Any = "randomized",
    bits8: bool = False,
    quantise_subspace: bool = False,
) -> Learner:
    """GaLore (arXiv 2403.03507) on the matrices, Adam on the rest; ``bits8``: with eight-bit moments. See `lowrank_jax.optim.galore`."""
    adam = given.adam_8bit if bits8 else given.adam
    core = lr.optim.galore(
        adam, rank, scale=scale, refresh_every=refresh_every, targets=(MATRICES,), sites=given.sites,
        on_refresh=on_refresh, side=side, svd=svd, quantise_subspace=quantise_subspace,
    )  # fmt: skip
    return Learner(optax.chain(core, given.decay), optax.chain(adam, given.decay))


def dual_galore(
    given: Given,
    *,
    rank: int = 128,
    scale: float = 0.25,
    refresh_every: int = 200,
    side: Any = "smaller",
    bits8: bool = False,
) -> Learner:
    """GaLore by adapters, without a dense gradient of a matrix. See `lowrank_jax.dual_galore`. The matrices do not decay."""
    refresher = lambda loss: _keeping(lr.dual_galore.refresher(loss))  # noqa: E731
    return Learner(
        optax.chain(given.adam, given.decay), rules={MATRICES: lr.subspace_update(rank, side)},
        factors=optax.chain(given.adam_8bit if bits8 else given.adam, optax.scale(scale)), every=refresh_every, first=True,
        refresh=refresher,
    )  # fmt: skip


def frugal(
    given: Given,
    *,
    density: float = 0.25,
    subspace: Any = "inputs",
    free: Any = "sign",
    free_scale: float = 1.0,
    scale: float = 1.0,
    refresh_every: int = 200,
    on_refresh: Any = "reset",
) -> Learner:
    """FRUGAL (arXiv 2411.07837) on the matrices, Adam on the rest. See `lowrank_jax.optim.frugal`."""
    core = lr.optim.frugal(
        given.adam, density, subspace, free=free, free_scale=free_scale, refresh_every=refresh_every,
        on_refresh=on_refresh, targets=(MATRICES,), sites=given.sites,
    )  # fmt: skip
    return Learner(optax.chain(core, _matrices_times(scale), given.decay), optax.chain(given.adam, given.decay))


def lisa(given: Given, *, active: int = 2, period: int = 20, state_policy: Any = "reset") -> Learner:
    """LISA (arXiv 2403.17919): a few layers at a time, the rest always. See `lowrank_jax.optim.lisa`."""
    inner = optax.chain(given.adam, given.decay)
    return Learner(lr.optim.lisa(inner, active, period, state_policy=state_policy, sites=given.sites))


def sltrain(given: Given, *, rank: int = 128, alpha: float = 32.0, density: float = 0.03) -> Learner:
    """SLTrain (arXiv 2406.02214): every matrix is low-rank factors and sparse entries; no dense one is stored."""
    return _adapted(given, lr.sltrain(rank, alpha, density), zero=True)


def lora(given: Given, *, rank: int = 128, alpha: float = 32.0) -> Learner:
    """LoRA (arXiv 2106.09685) on the random matrices that pre-training starts from: the baseline of the GaLore paper."""
    return _adapted(given, lr.lora(rank, alpha))


def relora(
    given: Given, *, rank: int = 128, alpha: float = 32.0, refresh_every: int = 200, restarts: int = 20
) -> Learner:
    """ReLoRA (arXiv 2307.05695): LoRA merged and started anew every so often, without its moments, the learning rate warmed up again."""
    learner = _adapted(given, lr.lora(rank, alpha))

    def refresh(loss: Loss) -> Callable[..., tuple[Any, lr.Adapters, Any]]:
        def run(
            params: Any, adapters: lr.Adapters, optimizer: Any, batch: Any, key: jax.Array
        ) -> tuple[Any, lr.Adapters, Any]:
            merged = add_low_rank(params, adapters)
            fresh = lr.init(key, merged, adapters.plan)
            return merged, fresh, learner.factors.init(lr.partition(fresh)[0])

        return run

    return learner._replace(every=refresh_every, refresh=refresh, restarts=restarts)


METHODS: dict[str, Callable[..., Learner]] = {
    method.__name__: method for method in (adamw, adamw_8bit, galore, dual_galore, frugal, lisa, sltrain, lora, relora)
}


def is_adapted(learner: Learner, path: str) -> bool:
    """Whether a weight is trained by an adapter instead of as it is."""
    return any(matches(pattern, path) for pattern in learner.rules)


def _adapted(given: Given, method: lr.Method, zero: bool = False) -> Learner:
    """The matrices by adapters, everything else as it is."""
    whole = optax.chain(given.adam, given.decay)
    return Learner(whole, rules={MATRICES: method}, factors=whole, zero=zero)


def _matrices_times(scale: float) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        flat = flatten(updates)
        return with_leaves(updates, {p: scale * u for p, u in flat.items() if matches(MATRICES, p)}), state

    return optax.identity() if scale == 1 else optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _keeping(refresh: Callable[..., tuple[Any, lr.Adapters]]) -> Callable[..., tuple[Any, lr.Adapters, Any]]:
    """The refresh of a pair beside an optimizer's state that stays as it is."""
    return lambda params, adapters, optimizer, batch, key: (*refresh(params, adapters, batch, key), optimizer)
