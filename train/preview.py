"""A run without its weights: the plan from shapes alone, and an update compiled for devices that are not there."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.table import Table

import lowrank_jax as lr
from lowrank_jax import chips, flops, memory, models, shard
from lowrank_jax.models.gguf import hf_config, is_gguf, open_gguf
from lowrank_jax.plan_table import human_bytes
from lowrank_jax.sites import flatten
from lowrank_jax.text_table import as_text
from train import base, job, optimizer, sharding, tasks
from train import config as configs
from train.step import State, make_update

PRESETS = ("llama2_7b", "llama2_13b", "llama2_70b", "mixtral_8x7b", "smollm2_135m", "minilm_l6", "roberta_base")


class Model(NamedTuple):
    """A model as shapes: module, parameters (ShapeDtypeStructs, laid over the mesh) and configuration."""

    module: nn.Module
    params: Any
    config: Any


class Needs(NamedTuple):
    """What one update needs, a chip.

    Attributes:
      base, adapters, optimizer: bytes held all the time. activations: the rest at the peak: activations, gradients, the batch.
      report: the compiler's. useful: FLOPs without what remat computes again.
    """

    base: int
    adapters: int
    optimizer: int
    activations: int
    report: memory.CompileReport
    useful: float


def mesh(config: ml_collections.ConfigDict, topology: str) -> Mesh:
    """The run's mesh on the chips of a topology, or on this machine's devices. Raises TopologyError where that cannot be."""
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


def needs(
    config: ml_collections.ConfigDict, model: Model, plan: lr.Plan, mesh: Mesh, total: int, step: int, length: int
) -> Needs:
    """What the compiler says of the update at a step: forward, backward, optimizer.

    Args:
      total: length of the run. length: tokens in a row.

    Raises:
      DoesNotFitError: it needs more memory than a chip has.
    """
    update, args = _update(config, model, plan, mesh, total, step, length)
    state, frozen, _, batch = args
    shardings = jax.tree.map(lambda x: x.sharding, state)
    adapters = _bytes(state.train) + _bytes(_used(frozen))
    optimizer, inputs = _bytes(state.optimizer), _bytes(batch)
    _refuse_early(mesh, _bytes(_kept(model.params, plan)) + adapters + optimizer)
    report = memory.compile_report(update, args, donate=(0,), out_shardings=shardings)
    # What the program takes is what it uses: not the base where a weight is trained whole.
    base = max(report.argument - adapters - optimizer - inputs, 0)
    plain = dataclasses.replace(model.config, remat="none")
    forward = _update(config, model._replace(module=models.build(plain)), plan, mesh, total, step, length)[0]
    useful = flops.count(forward, *args) / mesh.size
    return Needs(base, adapters, optimizer, report.peak - base - adapters - optimizer, report, useful)


def _update(
    config: ml_collections.ConfigDict, model: Model, plan: lr.Plan, mesh: Mesh, total: int, step: int, length: int
) -> tuple[Any, tuple[Any, ...]]:
    """The update of a step and its arguments as shapes laid over the mesh."""
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
    rows = NamedSharding(mesh, PartitionSpec(shard.ROWS))
    kinds = {"tokens": jnp.int32, "loss_mask": jnp.bool_, "positions": jnp.int32, "segment_ids": jnp.int32}
    if config.task == "classification":
        kinds = {"tokens": jnp.int32, "mask": jnp.bool_, "token_types": jnp.int32}
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, length), kind, sharding=rows) for name, kind in kinds.items()
    }
    if config.task == "classification":
        batch["label"] = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=rows)
    update = sharding.within(mesh, make_update(config, model.module, task, tx))
    return update, (state, frozen, model.params, batch)


def table(
    config: ml_collections.ConfigDict, model: Model, plan: lr.Plan, mesh: Mesh, total: int, length: int, topology: str
) -> str:
    """The needs of every phase of a run as a table.

    Raises:
      DoesNotFitError: see `needs`.
    """
    rows = []
    for step in plan.phases(total):
        found = needs(config, model, plan, mesh, total, step, length)
        rows.append(
            (
                f"{step} of {total}",
                f"{plan.count(step, total):,}",
                *cells(found, chips.chip(mesh.devices.flat[0]), config.batch_size * length),
            )
        )
    title = f"{topology}, {shape(mesh.shape)}, batch {config.batch_size} x {length}, remat {config.model.remat}; a chip"
    return text_table(title, ("phase from step", "trained", *COLUMNS), rows) + "\n" + NOTE


COLUMNS = (
    "base", "adapters", "optimizer", "activations", "peak", "FLOPs", "collectives", "step, at best", "tokens/s", "utilisation",
)  # fmt: skip
NOTE = (
    "Collectives: bytes a chip sends. The step's time is the compiler's estimate of its cycles, or of its collectives if they take\n"
    "longer, and no measurement; utilisation: FLOPs without recomputation, at that time, over the chip's peak.\n"
)


def cells(found: Needs, kind: chips.Chip | None, tokens: int) -> tuple[str, ...]:
    """A row of `COLUMNS`; ``tokens`` in a batch."""
    report = found.report
    timed = ("-",) * 3
    if kind is not None and report.seconds:
        share = found.useful / report.seconds / kind.flops
        timed = (f"{report.seconds:.3g} s", f"{tokens / report.seconds:,.0f}", f"{share:.0%}")
    held = (human_bytes(x) for x in (found.base, found.adapters, found.optimizer, found.activations, report.peak))
    return (*held, f"{report.flops:.3g}", human_bytes(report.sent), *timed)


def shape(sizes: Mapping[str, int]) -> str:
    """A mesh by the axes that are longer than 1.

    Example:
      >>> shape({"data": 1, "fsdp": 4, "tensor": 2}), shape({})
      ('fsdp 4 x tensor 2', 'one device')
    """
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text, numbers to the right."""
    out = Table(title=title, title_justify="left")
    for n, column in enumerate(columns):
        out.add_column(column, justify="left" if n == 0 else "right")
    for row in rows:
        out.add_row(*row)
    return as_text(out, 160)


def _used(frozen: lr.Adapters) -> Any:
    """The frozen leaves that a step takes: where anchors are folded into the base, not these."""
    if not frozen.folded:
        return frozen.sites, frozen.shared
    by_path = frozen.plan.by_path
    return {
        path: {name: leaf for name, leaf in leaves.items() if not by_path[path].leaves[name].anchor}
        for path, leaves in frozen.sites.items()
    }, frozen.shared


def _kept(params: Any, plan: lr.Plan) -> Any:
    """The base without the weights that are trained whole, whose adapters stand in for them."""
    whole = {entry.site.path for entry in plan.entries if entry.method.name == "full"}
    return {path: leaf for path, leaf in flatten(params).items() if path not in whole}


def _refuse_early(mesh: Mesh, held: int) -> None:
    """Spares the compilation where the arrays of a run are already too many."""
    kind = chips.chip(mesh.devices.flat[0])
    if kind is not None and held > kind.memory:
        raise memory.DoesNotFitError(
            f"Base, adapters and optimizer alone take {human_bytes(held)} a chip, which has {human_bytes(kind.memory)}. Use more chips, a "
            "mesh with larger fsdp or tensor, or narrower types."
        )


def _bytes(tree: Any) -> int:
    """Bytes of a tree of laid-out shapes on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _beside(optimizer: Any, train: Any, everywhere: NamedSharding) -> Any:
    """The optimizer's state laid out like the leaf each part belongs to."""
    layout = {(path, name): leaf.sharding for path, leaves in train.items() for name, leaf in leaves.items()}

    def put(where: Any, leaf: Any) -> Any:
        keys = [entry.key for entry in where if isinstance(entry, jax.tree_util.DictKey)]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.get(tuple(keys[-2:]), everywhere))

    return jax.tree_util.tree_map_with_path(put, optimizer)
