"""What each remat policy keeps and computes again, by the TPU compiler, without a TPU.

    pip install -e '.[topology]'
    JAX_PLATFORMS=cpu python -m bench.memory_policies          # about half an hour on two cores

Compiles whole training steps (forward, backward, AdamW; bfloat16 weights and compute, float32 adapters, chunked cross-entropy) of
Llama-2-7B shapes with adapters on all linear layers, batch 4 x 512, for one v5p chip. FLOPs are those of all products of a step, the splash
kernel's masked blocks among them (`lowrank_jax.flops`).
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import lowrank_jax as lr
from bench.common import table, write_json
from lowrank_jax import models
from lowrank_jax.memory import DoesNotFitError, abstract_adapters, compile_report, topology_mesh

SITES = r".*/(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
ROWS, LENGTH, CHUNK = 4, 512, 1024
# The method, and the step of a run of 100 it is looked at: at its end LaMDA trains the core alone.
METHODS = {"LaMDA r=32, end": (lr.lamda(rank=32), 99), "LoRA r=16": (lr.lora(rank=16), 0)}
POLICIES = ("none", "dots", "dots_saveable", "full", "adapter", "adapter_offload")


def training_step(model: Any, shapes: Any, method: lr.Method, step: int) -> tuple[Any, tuple[Any, ...]]:
    """A training step and its abstract arguments; anchors are folded, so that they are no part of it."""
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    plan = lr.plan(shapes, {SITES: method}, sites=lr.linen.sites(model, shapes, tokens))
    adapters = abstract_adapters(plan).replace(folded=True)
    train, frozen = lr.partition(adapters, step, 100)
    held = {
        path: {name: leaf for name, leaf in leaves.items() if not plan.by_path[path].leaves[name].anchor}
        for path, leaves in frozen.sites.items()
    }
    tx = lr.optim.with_methods(optax.adamw(1e-4), plan, 100)

    def run(train: Any, state: Any, frozen: Any, params: Any, tokens: Any) -> Any:
        def loss_of(train: Any) -> Any:
            targets = jnp.roll(tokens, -1, axis=1)
            losses = lr.linen.apply(model, params, lr.join(train, frozen), tokens, targets=targets)
            return losses[:, :-1].mean()

        loss, gradients = jax.value_and_grad(loss_of)(train)
        updates, new_state = tx.update(gradients, state, train)
        return optax.apply_updates(train, updates), new_state, loss

    return run, (train, jax.eval_shape(tx.init, train), frozen.replace(sites=held), shapes, tokens)


def measure(name: str, policy: str, attention: str | None = None, chunk: int = CHUNK) -> dict[str, Any]:
    """One row: what the compiler says of a step."""
    method, step = METHODS[name]
    config = dataclasses.replace(
        models.llama2_7b(),
        scan_layers=True, remat=policy, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, loss_chunk=chunk,
        attention_implementation=attention,
    )  # fmt: skip
    shapes = models.param_shapes(config)
    run, args = training_step(models.build(config), shapes, method, step)
    chip = NamedSharding(topology_mesh("v5p:2x2x1", {"chip": 1}), PartitionSpec())
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip), args)
    base = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    row = {
        "method": name,
        "remat": policy,
        "attention": attention or "xla",
        "loss_chunk": chunk,
        "base_gib": base / 2**30,
    }
    try:
        report = compile_report(run, args, donate=(0, 1))
    except DoesNotFitError as error:
        return row | {"refused": str(error)}
    return row | {
        "peak_gib": report.peak / 2**30,
        "rest_gib": (report.peak - base) / 2**30,
        "host_gib": report.host / 2**30,
        "step_tflop": report.flops / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    cells: list[tuple[Any, ...]] = [(name, policy) for policy in POLICIES for name in METHODS]
    cells += [(name, "adapter", "splash") for name in METHODS]
    cells += [(name, "adapter", None, 0) for name in METHODS]
    rows = []
    for cell in cells:
        rows.append(measure(*cell))
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        write_json("memory_policies", {"model": "llama2-7b", "chip": "v5p", "batch": [ROWS, LENGTH], "rows": rows})
    columns = ("method", "remat", "attention", "loss_chunk", "peak_gib", "rest_gib", "host_gib", "step_tflop")
    show = lambda value: f"{value:.2f}" if isinstance(value, float) else str(value)  # noqa: E731
    table(columns, [[show(row.get(name, "-")) for name in columns] for row in rows], "One v5p chip, batch 4 x 512")


if __name__ == "__main__":
    main()
