"""What a quantised base leaves of the memory of a fine-tuning step, by the TPU compiler, without a TPU.

    pip install -e '.[topology,quant]'
    JAX_PLATFORMS=cpu python -m bench.quantised          # about ten minutes on two cores

Compiles whole training steps (forward, backward, AdamW; bfloat16 compute, float32 adapters, chunked cross-entropy) of Llama-2-7B
shapes with adapters on all linear layers, batch 4 x 512, for one v5e chip of 16 GB: on the base in bfloat16, int8 and nf4, blocks of 64.
Embeddings, the head and norms stay in bfloat16. FLOPs are those of all products of a step.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import lowrank_jax as lr
from bench.common import table, write_json
from bench.memory_policies import CHUNK, LENGTH, METHODS, ROWS, SITES, training_step
from lowrank_jax import models
from lowrank_jax.memory import DoesNotFitError, compile_report, topology_mesh


def measure(name: str, policy: str, kind: str) -> dict[str, Any]:
    """One row: what the compiler says of a step."""
    method, step = METHODS[name]
    config = dataclasses.replace(
        models.llama2_7b(),
        scan_layers=True, remat=policy, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, loss_chunk=CHUNK,
    )  # fmt: skip
    shapes = models.param_shapes(config)
    base = lr.quantize(shapes, {SITES: kind}) if kind != "bfloat16" else shapes
    run, args = training_step(models.build(config), base, method, step)
    chip = NamedSharding(topology_mesh("v5e:2x2", {}), PartitionSpec())
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip), args)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(base))
    row = {"method": name, "remat": policy, "base": kind, "base_gib": held / 2**30}
    try:
        report = compile_report(run, args, donate=(0, 1))
    except DoesNotFitError as error:
        return row | {"refused": str(error)}
    return row | {
        "peak_gib": report.peak / 2**30,
        "rest_gib": (report.peak - held) / 2**30,
        "step_tflop": report.flops / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    rows = []
    for policy in ("full", "adapter"):
        for name in METHODS:
            for kind in ("bfloat16", "int8", "nf4"):
                rows.append(measure(name, policy, kind))
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
                write_json("quantised", {"model": "llama2-7b", "chip": "v5e", "batch": [ROWS, LENGTH], "rows": rows})
    columns = ("method", "remat", "base", "base_gib", "peak_gib", "rest_gib", "step_tflop")
    show = lambda value: f"{value:.2f}" if isinstance(value, float) else str(value)  # noqa: E731
    table(columns, [[show(row.get(name, "-")) for name in columns] for row in rows], "One v5e chip, batch 4 x 512")


if __name__ == "__main__":
    main()
