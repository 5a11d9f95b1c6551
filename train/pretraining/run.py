"""A configuration, loaded: model, first weights, corpus, and how to learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

import lowrank_jax as lr
from lowrank_jax import models, shard
from lowrank_jax.models.llama_parts import split_layers
from lowrank_jax.models.llama_sizes import galore_paper
from lowrank_jax.models.tokenizer import Tokenizer
from lowrank_jax.sites import Site, flatten, with_leaves
from train import optimizer, processes, sharding
from train.data import Loader
from train.pretraining import config as configs
from train.pretraining import corpus
from train.pretraining.methods import METHODS, Given, Learner, is_adapted


@dataclasses.dataclass(frozen=True)
class Run:
    """What a configuration describes.

    Attributes:
      config, model, model_config, tokenizer: as named. train, evaluation: the loaders. mesh: None for one device.
      shapes: of all the model's parameters. learner: the method. plan: of its adapters, empty if there are none.
    """

    config: ml_collections.ConfigDict
    model: nn.Module
    model_config: Any
    tokenizer: Tokenizer
    train: Loader
    evaluation: Loader
    mesh: jax.sharding.Mesh | None
    shapes: Any
    learner: Learner
    plan: lr.Plan


def load(config: ml_collections.ConfigDict) -> Run:
    """Loads the corpus and makes the model's shapes; no weight exists yet.

    Raises:
      ConfigError, ValueError: a field that does not fit; see the message.
    """
    configs.check(config)
    mesh = sharding.make_mesh(config.mesh)
    with processes.one_first("data"):
        tokenizer = corpus.tokenizer_of(config)
        train = corpus.loader(config, config.data.train_split, tokenizer, mesh, training=True)
        evaluation = corpus.loader(config, config.data.eval_split, tokenizer, mesh, training=False)
    model_config = make_model(config, tokenizer.vocab_size)
    model, shapes = models.build(model_config), models.param_shapes(model_config)
    sites = lr.linen.sites(model, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    learner = make_learner(config, one_layer(shapes) if config.layerwise else sites)
    plan = lr.plan(shapes, learner.rules, sites=sites) if learner.rules else lr.Plan(())
    return Run(config, model, model_config, tokenizer, train, evaluation, mesh, shapes, learner, plan)


def make_model(config: ml_collections.ConfigDict, vocab_size: int) -> models.LlamaConfig:
    """The model's configuration, its vocabulary that of the tokenizer."""
    given = config.model
    named = {"hidden_size": given.hidden_size, "intermediate_size": given.intermediate_size, "num_hidden_layers": given.layers,
             "num_attention_heads": given.heads, "num_key_value_heads": given.heads}  # fmt: skip
    return galore_paper(
        given.size, vocab_size=vocab_size, max_position_embeddings=max(config.data.max_length, 1024), scan_layers=given.scan_layers,
        remat=given.remat, dtype=jnp.dtype(given.dtype), param_dtype=jnp.dtype(given.param_dtype),
        **{name: value for name, value in named.items() if value},
    )  # fmt: skip


def one_layer(shapes: Any) -> Mapping[str, Site]:
    """The sites of a single layer of a scanned stack, by their paths within it."""
    stacked, _ = split_layers(shapes)
    return lr.sites(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked))


def make_learner(config: ml_collections.ConfigDict, sites: Mapping[str, Site]) -> Learner:
    """The method of a configuration for the weights of a model, or of one of its layers.

    Raises:
      ValueError: a weight decay that the method could not apply, a method that needs all layers' gradients at once.
    """
    name = config.method.name
    decay = optax.identity()
    if config.weight_decay:
        decay = optax.add_decayed_weights(config.weight_decay, mask=_matrices)
    if config.weight_decay and name == "dual_galore":
        raise configs.ConfigError(
            f"config.weight_decay={config.weight_decay}: dual_galore keeps no gradient of a matrix, and does not decay them either; "
            "expected 0, or take galore."
        )
    betas = (config.b1, config.b2, config.eps)
    adam, adam_8bit = optax.scale_by_adam(*betas), lr.optim.scale_by_adam_8bit(*betas)
    fields = {field: value for field, value in config.method.items() if field != "name"}
    learner = METHODS[name](Given(sites, adam, adam_8bit, decay), **fields)
    if config.layerwise and learner.outside is None:
        raise configs.ConfigError(
            f"config.layerwise=True: {name} does not update layers one at a time; expected adamw, adamw_8bit, galore or frugal."
        )
    return learner


def rate(run: Run) -> optax.Schedule:
    """The learning rate by update, warmed up again after each refresh where the method asks for it."""
    config, learner = run.config, run.learner
    plain = optimizer.schedule(config, config.steps)
    if not learner.restarts:
        return plain

    def schedule(step: Any) -> jax.Array:
        since = step % learner.every
        risen = jnp.where(step < learner.every, 1.0, jnp.minimum(1.0, (since + 1) / learner.restarts))
        return plain(step) * risen

    return schedule


def first_weights(run: Run) -> Any:
    """Normal matrices of `config.model.init_std`, ones for norms; where an adapter's base is zero and not stored, shapes only."""
    key = jax.random.key(run.config.seed)
    where: dict[str, Any] = {}
    mesh = run.mesh
    if mesh is not None:
        where = flatten(shard.layout(run.shapes, mesh, names=models.logical_axes(run.model_config)))
    make, made = jax.jit(_first, static_argnums=(1, 2, 3)), {}
    for n, (path, leaf) in enumerate(flatten(run.shapes).items()):
        if run.learner.zero and is_adapted(run.learner, path):
            continue
        std = 0.0 if path.endswith("scale") else float(run.config.model.init_std)
        value = make(jax.random.fold_in(key, n), leaf.shape, leaf.dtype, std)
        made[path] = sharding.put(value, where[path]) if where else value
    return with_leaves(run.shapes, made)


def _first(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float) -> jax.Array:
    return (jax.random.normal(key, shape) * std).astype(dtype) if std else jnp.ones(shape, dtype)


def _matrices(tree: Any) -> Any:
    """What decays: not the norms, whatever their shape in a stack."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: not str(path[-1]).endswith("scale']"), tree)
