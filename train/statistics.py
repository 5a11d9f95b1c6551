"""What a run's methods want to know of data before they start: gathered over a few training batches, or from a tuned model."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import ml_collections

import lowrank_jax as lr
from lowrank_jax.checkpoint import load_adapter
from lowrank_jax.sites import Site, matches
from train import config as configs
from train import sharding
from train.data import Loader
from train.tasks import Task


def before_plan(
    config: ml_collections.ConfigDict, model: nn.Module, params: Any, task: Task, loader: Loader, mesh: Any
) -> lr.Statistics | None:
    """The contributions of weights to the task, for rules whose method allocates ranks by them; None if there is no such rule.

    Raises:
      ConfigError: config.statistics.tuned does not name the adapter of a full fine-tuning run.
    """
    rules = {pattern: _method(rule) for pattern, rule in configs.plan_rules(config).items()}
    patterns = [pattern for pattern, method in rules.items() if "contribution" in method.needs]
    if not patterns:
        return None
    where = config.statistics.tuned
    if not where or not pathlib.Path(where).is_dir():
        raise configs.ConfigError(
            f"config.statistics.tuned={where!r}: {rules[patterns[0]].name} compares the base with a fully fine-tuned model; expected the "
            "adapter directory of such a run (train.finetune --config=configs/minilm_tweets_full.py)."
        )
    tuned = lr.merge(params, load_adapter(where, params))
    found: dict[str, Site] = lr.linen.sites(model, params, _example(loader))
    sites = {
        path: site
        for path, site in found.items()
        if any(matches(p, path) and site.kind in rules[p].site_kinds for p in patterns)
    }
    return lr.contributions(make_loss(model, task, mesh), params, tuned, sites, _batches(config, loader, mesh))


def before_init(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    params: Any,
    task: Task,
    loader: Loader,
    mesh: Any,
    plan: lr.Plan,
) -> lr.Statistics | None:
    """Gradients and input covariances that the plan's methods start from; None if they need none. Kept in the run's directory."""
    needs = frozenset.union(*(entry.method.needs for entry in plan.entries))
    if not needs & {"gradient", "covariance"}:
        return None
    directory = configs.workdir(config) / "statistics"
    return lr.collect(make_loss(model, task, mesh), params, plan, _batches(config, loader, mesh), directory=directory)


def _method(rule: Any) -> lr.Method:
    return rule if isinstance(rule, lr.Method) else rule.method


def _example(loader: Loader) -> Any:
    return next(loader.iterator())["tokens"]


def _batches(config: ml_collections.ConfigDict, loader: Loader, mesh: Any) -> Any:
    return [sharding.put_batch(batch, mesh) for batch in itertools.islice(loader.iterator(), config.statistics.batches)]


def make_loss(model: nn.Module, task: Task, mesh: Any) -> Any:
    """``(params, adapters, batch) -> mean loss``, without dropout."""

    def loss(params: Any, adapters: lr.Adapters, batch: Any) -> jax.Array:
        total, weight = task.loss(
            task.logits(lr.linen.adapted(model, adapters), {"params": params}, batch, None), batch
        )
        return total / weight

    return sharding.within(mesh, loss)
