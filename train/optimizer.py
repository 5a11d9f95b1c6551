"""The optimizer of a run: AdamW over the trained leaves, with warmup, a rate for each rule, and the methods' own transforms."""

from __future__ import annotations

from typing import Any

import jax
import ml_collections
import optax

import lowrank_jax as lr
from lowrank_jax.sites import matches
from train.config import rules


def schedule(config: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
    """The learning rate by update: linear warmup from 0, then cosine or linear decay to ``final``, or none.

    Example:
      >>> from train.config import base
      >>> config = base()
      >>> config.warmup, config.learning_rate = 0.1, 1.0
      >>> rate = schedule(config, 100)
      >>> [round(float(rate(step)), 2) for step in (0, 5, 10, 55, 100)]
      [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    peak, end = config.learning_rate, config.learning_rate * config.final
    warmup = round(config.warmup * total_steps)
    rest = max(total_steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
    }[config.decay]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make(config: ml_collections.ConfigDict, plan: lr.Plan, total_steps: int) -> optax.GradientTransformation:
    """The optax transform for a train tree ``{path: {leaf: array}}`` of `lowrank_jax.partition`.

    It only ever sees the trained leaves: clipping, decay and moments leave the base and frozen leaves alone.
    """
    parts = [] if not config.clip else [optax.clip_by_global_norm(config.clip)]
    parts.append(adam(plan, config.b1, config.b2, config.eps))
    if config.weight_decay:
        parts.append(
            optax.add_decayed_weights(config.weight_decay, mask=lambda train: jax.tree.map(lambda x: x.ndim > 1, train))
        )
    parts.append(optax.scale_by_learning_rate(schedule(config, total_steps)))
    factors = _factors(config, plan)
    if set(factors.values()) - {1.0}:
        # A rate of its own is the run's schedule times a factor: it has no state and survives a change of phase.
        parts.append(
            optax.stateless(
                lambda updates, _: {p: _scaled(leaves, factors.get(p, 1.0)) for p, leaves in updates.items()}
            )
        )
    return lr.optim.with_methods(optax.chain(*parts), plan, total_steps)


def adam(plan: lr.Plan, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's steps. Only SpIEL's entries come and go while they are trained; under a plan with some, each has an age of its own."""
    changing = any(entry.method.name == "spiel" for entry in plan.entries)
    return (lr.optim.scale_by_spiel if changing else optax.scale_by_adam)(b1, b2, eps)


def _scaled(leaves: Any, factor: float) -> Any:
    return leaves if factor == 1.0 else jax.tree.map(lambda u: u * factor, leaves)


def _factors(config: ml_collections.ConfigDict, plan: lr.Plan) -> dict[str, float]:
    """Learning rate of every planned weight relative to the run's."""
    own = [
        (one.pattern, one.learning_rate / config.learning_rate)
        for one in rules(config).values()
        if one.get("learning_rate")
    ]
    factors = {}
    for entry in plan.entries:
        path = entry.site.path
        hits = [factor for pattern, factor in own if matches(pattern, path)]
        factors[path] = hits[-1] if hits else 1.0
    return factors
