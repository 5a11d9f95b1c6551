"""A run without its weights: the plan from shapes alone, and an update compiled for devices that are not there."""

from __future__ import annotations

import io
import json
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lowrank_jax as lr
from lowrank_jax import memory, models, shard
from lowrank_jax.models.gguf import hf_config, is_gguf, open_gguf
from lowrank_jax.plan_table import human_bytes
from train import base, job, optimizer, tasks
from train import config as configs
from train.step import State, make_update

PRESETS = ("llama2_7b", "smollm2_135m", "minilm_l6", "roberta_base")


class Model(NamedTuple):
    """A model as shapes: module, parameters (ShapeDtypeStructs, laid over the mesh) and configuration."""

    module: nn.Module
    params: Any
    config: Any


def mesh(config: ml_collections.ConfigDict, topology: str) -> Mesh:
    """The run's mesh on the chips of a topology. Raises TopologyError where that cannot be."""
    return memory.topology_mesh(topology, config.mesh)


def abstract_model(config: ml_collections.ConfigDict, num_labels: int, mesh: Mesh | None = None) -> Model:
    """The model that a configuration names, without reading its weights.

    Raises:
      ValueError: a source that is neither a shape known by name, nor an asset, directory or GGUF file here.
    """
    fields: dict[str, Any] = {
        "dtype": jnp.dtype(config.model.dtype), "param_dtype": jnp.dtype(config.model.param_dtype),
        "scan_layers": config.model.scan_layers, "remat": config.model.remat, **configs.model_fields(config),
    }  # fmt: skip
    if config.task == "classification":
        fields |= {"task": "classify", "num_labels": num_labels}
        fields |= {"classifier_pooling": config.model.pooling} if config.model.pooling else {}
    if config.model.source in PRESETS:
        found = getattr(models, config.model.source)(**fields)
    else:
        source = job.locate(config.model.source)
        if not isinstance(source, pathlib.Path):
            raise ValueError(
                f"config.model.source={source!r}: planning reads shapes from an asset, a directory or a GGUF file, or takes one of "
                f"{', '.join(PRESETS)}."
            )
        described = (
            hf_config(open_gguf(source)) if is_gguf(source) else json.loads((source / "config.json").read_text())
        )
        found = models.from_hf({**described, "architectures": []} if "task" in fields else described, **fields)
    shapes = models.param_shapes(found)
    if mesh is not None:
        shapes = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes, shard.layout(shapes, mesh, names=models.logical_axes(found)),
        )  # fmt: skip
    return Model(models.build(found), base.alone(config, shapes), found)


def make_plan(config: ml_collections.ConfigDict, model: Model) -> lr.Plan:
    """The plan of a configuration on shapes. Methods that read the weights to plan (LaMDA++) raise."""
    return job.make_plan(config, model.module, model.params)


def report(
    config: ml_collections.ConfigDict, model: Model, plan: lr.Plan, mesh: Mesh, total: int, step: int, length: int
) -> memory.CompileReport:
    """What the compiler says of the update at a step: forward, backward, optimizer.

    Args:
      total: length of the run. length: tokens in a row.
    """
    task = (
        tasks.causal_lm(config.data.pack) if config.task == "causal_lm" else tasks.classification(config.model.dropout)
    )
    tx = optimizer.make(config, plan, total)
    adapters = memory.abstract_adapters(plan, mesh).replace(folded=config.fold)  # type: ignore[attr-defined]
    train, frozen = lr.partition(adapters, step, total)
    everywhere = NamedSharding(mesh, PartitionSpec())
    scalar: Any = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere)  # noqa: E731
    state = State(train, _beside(jax.eval_shape(tx.init, train), train, everywhere), scalar(jnp.int32), scalar(jnp.bool_),
                  scalar(jnp.float32), scalar(jnp.float32))  # fmt: skip
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    kinds = {"tokens": jnp.int32, "loss_mask": jnp.bool_, "positions": jnp.int32, "segment_ids": jnp.int32}
    if config.task == "classification":
        kinds = {"tokens": jnp.int32, "mask": jnp.bool_, "token_types": jnp.int32}
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, length), kind, sharding=rows) for name, kind in kinds.items()
    }
    if config.task == "classification":
        batch["label"] = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=rows)
    update = make_update(config, model.module, task, tx)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return memory.compile_report(update, (state, frozen, model.params, batch), donate=(0,), out_shardings=shardings)


def table(
    config: ml_collections.ConfigDict, model: Model, plan: lr.Plan, mesh: Mesh, total: int, length: int, topology: str
) -> str:
    """The needs of every phase of a run as a table."""
    from rich.console import Console
    from rich.table import Table

    out = Table("phase from step", "trained", "peak a chip", "of it arguments", "temporaries", "FLOPs a chip",
                title=f"{topology}, batch {config.batch_size} x {length}, remat {config.model.remat}", title_justify="left")  # fmt: skip
    for step in plan.phases(total):
        found = report(config, model, plan, mesh, total, step, length)
        out.add_row(f"{step} of {total}", f"{plan.count(step, total):,}", human_bytes(found.peak), human_bytes(found.argument),
                    human_bytes(found.temp), f"{found.flops:.3g}")  # fmt: skip
    text = io.StringIO()
    Console(file=text, width=120).print(out)
    note = (
        "The body of a scan over layers counts once in the FLOPs; set config.model.scan_layers=False to count all."
        if config.model.scan_layers
        else ""
    )
    return text.getvalue() + note


def _beside(optimizer: Any, train: Any, everywhere: NamedSharding) -> Any:
    """The optimizer's state laid out like the leaf each part belongs to."""
    layout = {(path, name): leaf.sharding for path, leaves in train.items() for name, leaf in leaves.items()}

    def put(where: Any, leaf: Any) -> Any:
        keys = [entry.key for entry in where if isinstance(entry, jax.tree_util.DictKey)]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.get(tuple(keys[-2:]), everywhere))

    return jax.tree_util.tree_map_with_path(put, optimizer)
