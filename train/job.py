"""A run's parts, made from its configuration: model, base weights, data, plan. Training, evaluation and merging start here."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

import lowrank_jax as lr
from lowrank_jax import assets, models
from lowrank_jax.checkpoint import Base, base_reference
from lowrank_jax.models.gguf import is_gguf
from lowrank_jax.models.gguf_load import load_gguf
from lowrank_jax.models.tokenizer import Tokenizer, load_tokenizer
from train import base as bases
from train import config as configs
from train import data, processes, sharding, tasks
from train.data import Loader
from train.statistics import before_init, before_plan


class Model(NamedTuple):
    """The base: module, parameters, configuration, tokenizer, its reference with hash, and the mesh it lies on (None: one device)."""

    module: nn.Module
    params: Any
    config: Any
    tokenizer: Tokenizer
    base: Base
    mesh: jax.sharding.Mesh | None


@dataclasses.dataclass(frozen=True)
class Job:
    """What a configuration describes, loaded.

    Attributes:
      config: the checked configuration. task: see `train.tasks`.
      model, params, model_config: the base; it is never changed. Where it is to be quantised the weights are still in their files, see
        `train.base`. base: its reference and hash. tokenizer: of the model.
      train, evaluation, test: the loaders; test is None without a test split, train None where nothing is trained.
      plan: what adapts what, empty where nothing is trained. statistics: what its methods start from, or None. total_steps: updates.
      mesh: the device mesh, or None for one device.
    """

    config: ml_collections.ConfigDict
    task: tasks.Task
    model: nn.Module
    params: Any
    model_config: Any
    base: Base
    tokenizer: Tokenizer
    train: Loader | None
    evaluation: Loader
    test: Loader | None
    plan: lr.Plan
    statistics: lr.Statistics | None
    total_steps: int
    mesh: jax.sharding.Mesh | None


def load(config: ml_collections.ConfigDict, *, training: bool = True) -> Job:
    """Loads everything a configuration names.

    Args:
      training: False leaves out the training split.

    Raises:
      ConfigError, ValueError: a field, a method, a model or data that does not fit; see the message.
    """
    configs.check(config)
    mesh = sharding.make_mesh(config.mesh)
    with processes.one_first("data"):
        tokenizer = load_tokenizer(tokenizer_path(locate(config.model.source)))
        train, test = None, None
        if training:
            train = _data(config, config.data.train_split, tokenizer, config.batch_size, config.data.limit, mesh)
        size = config.eval_batch_size
        evaluation = _data(config, config.data.eval_split, tokenizer, size, config.data.eval_limit, mesh)
        if config.data.test_split:
            test = _data(config, config.data.test_split, tokenizer, size, 0, mesh)
    model = load_model(config, evaluation.num_labels)
    task, plan, statistics = make_task(config, evaluation), lr.Plan(()), None
    if train is not None:
        about = (config, model.module, model.params, task, train, model.mesh)
        plan = make_plan(config, model.module, model.params, before_plan(*about))
        statistics = before_init(*about, plan)
    return Job(
        config=config, task=task, model=model.module, params=model.params, model_config=model.config,
        base=model.base, tokenizer=tokenizer, train=train, evaluation=evaluation, test=test,
        plan=plan, statistics=statistics, total_steps=_total_steps(config, train), mesh=model.mesh,
    )  # fmt: skip


def load_model(config: ml_collections.ConfigDict, num_labels: int = 0) -> Model:
    """Loads the base alone.

    Args:
      num_labels: classes of a classifier; unused for a causal_lm.
    """
    source, mesh = locate(config.model.source), sharding.make_mesh(config.mesh)
    tokenizer = load_tokenizer(tokenizer_path(source))
    loaded = _model(config, source, num_labels, mesh)
    if tokenizer.vocab_size > loaded.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the model's table {loaded.config.vocab_size}: they do not belong together."
        )
    base = bases.reference(config, base_reference(str(config.model.source), loaded.params, exclude=loaded.fresh))
    params = sharding.place(loaded.params, loaded.config, mesh)
    return Model(loaded.model, params, loaded.config, tokenizer, base, mesh)


def make_plan(
    config: ml_collections.ConfigDict, model: nn.Module, params: Any, statistics: lr.Statistics | None = None
) -> lr.Plan:
    """The plan of a configuration for a model; its parameters may be shapes only."""
    rules = configs.plan_rules(config)
    found = lr.linen.sites(model, params, jnp.ones((1, 8), jnp.int32))
    return lr.plan(
        params, rules, exclude=tuple(config.exclude), sites=found, allow_dense=config.allow_dense, statistics=statistics
    )


def make_task(config: ml_collections.ConfigDict, loader: Loader) -> tasks.Task:
    """The task of a configuration on a data set."""
    if config.task == "causal_lm":
        return tasks.causal_lm(packed=config.data.pack)
    return tasks.classification(config.model.dropout, regression=not loader.label_names)


def locate(source: str) -> pathlib.Path | str:
    """An asset's path where ``source`` names one, a local path, or the name itself (of the hub)."""
    if source in assets.ASSETS:
        return assets.fetch(source)
    path = pathlib.Path(source).expanduser()
    return path if path.exists() else source


def tokenizer_path(source: pathlib.Path | str) -> pathlib.Path:
    """Where a model's tokenizer is; a name on the hub is fetched."""
    if isinstance(source, pathlib.Path):
        return source
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(source, allow_patterns=["tokenizer*", "special_tokens_map.json"])
        )
    except (OSError, ValueError) as error:
        known = ", ".join(name for name, asset in assets.ASSETS.items() if name in ("minilm", "smollm2") and asset)
        raise FileNotFoundError(
            f"config.model.source={source!r}: neither an asset ({known}), nor a file or directory here, nor a name the hub could give "
            f"({type(error).__name__})."
        ) from error


def _model(config: ml_collections.ConfigDict, source: pathlib.Path | str, num_labels: int, mesh: Any) -> models.Loaded:
    fields: dict[str, Any] = {
        "dtype": jnp.dtype(config.model.dtype), "param_dtype": jnp.dtype(config.model.param_dtype),
        "scan_layers": config.model.scan_layers, "remat": config.model.remat, "seed": config.seed,
        "unread": bool(config.model.quantize),
    }  # fmt: skip
    if config.task == "classification":
        fields |= {"task": "classify", "num_labels": num_labels}
        fields |= {"classifier_pooling": config.model.pooling} if config.model.pooling else {}
    else:
        fields |= {"task": "causal_lm"}
    with sharding.loading(mesh):
        if isinstance(source, pathlib.Path) and is_gguf(source):
            if config.task != "causal_lm":
                raise ValueError(
                    f"config.model.source={config.model.source!r} is a GGUF file, which holds a causal_lm, not a {config.task} model."
                )
            loaded = load_gguf(source, **{k: v for k, v in fields.items() if k not in ("task", "seed")})
        else:
            loaded = models.load(source, **fields)
    computing = dataclasses.replace(loaded.config, **configs.model_fields(config))
    return loaded._replace(config=computing, model=models.build(computing))


def _data(
    config: ml_collections.ConfigDict, split: str, tokenizer: Tokenizer, batch_size: int, limit: int, mesh: Any
) -> Loader:
    return data.load(
        config.data.name, split, tokenizer, task=config.task, batch_size=batch_size, max_length=config.data.max_length,
        seed=config.seed, directory=config.data.directory or None, pack=config.data.pack, chat=config.data.chat, limit=limit or None,
        share=sharding.share(mesh, batch_size),
    )  # fmt: skip


def _total_steps(config: ml_collections.ConfigDict, train: Loader | None) -> int:
    if config.steps or train is None:
        return config.steps
    if not train.steps_per_epoch:
        raise ValueError(
            f"{train.num_examples} training examples do not fill a batch of {config.batch_size}; lower config.batch_size."
        )
    return max(1, math.ceil(config.epochs * train.steps_per_epoch))
