"""A trained adapter with the run it came from: what evaluation, merging and generation start from."""

from __future__ import annotations

import ml_collections

import lowrank_jax as lr
from lowrank_jax.checkpoint import CheckpointError, load_adapter, read_record
from train import config as configs
from train import job as jobs


def config(directory: str | None) -> ml_collections.ConfigDict:
    """The configuration of the run that wrote an adapter directory.

    Raises:
      ValueError: no directory given. FileNotFoundError: not an adapter directory. CheckpointError: not written by a run.
    """
    if not directory:
        raise ValueError("--adapter is missing: give the directory that train.finetune wrote, runs/<name>/adapter.")
    extra = read_record(directory)["extra"]
    if "config" not in extra:
        raise CheckpointError(
            f"{directory}: no configuration is kept with this adapter; it was not written by train.finetune."
        )
    return configs.from_json(extra["config"])


def load(directory: str | None, config: ml_collections.ConfigDict) -> tuple[jobs.Job, lr.Adapters]:
    """The run's parts without its training data, and the adapter on the (unfolded) base.

    Raises:
      CheckpointError: the base has changed since the adapter was trained, or the adapter is damaged.
    """
    job = jobs.load(config, training=False)
    return job, load_adapter(directory or "", job.params, job.base)


def load_model(directory: str | None, config: ml_collections.ConfigDict) -> tuple[jobs.Model, lr.Adapters]:
    """As `load` for a causal_lm, without any data."""
    model = jobs.load_model(config)
    return model, load_adapter(directory or "", model.params, model.base)


def plain_model(source: str) -> jobs.Model:
    """A causal language model without an adapter, such as train.pretrain wrote."""
    config = configs.base()
    config.task, config.model.source = "causal_lm", source
    return jobs.load_model(config)
