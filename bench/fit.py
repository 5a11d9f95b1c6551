"""Which model trains with which method on which TPUs, by the TPU compiler and without a TPU.

    pip install -e '.[topology]'
    JAX_PLATFORMS=cpu python -m bench.fit                                 # two hours on two cores; finished cells are kept
    JAX_PLATFORMS=cpu python -m bench.fit --models llama2_7b --chips v5e-1

One row of 2,048 tokens a chip, the weights over all chips (fsdp), every layer rematerialised, bfloat16 weights and compute, float32
factors and AdamW moments, adapters on all linear weights of the layers. LaMDA stands with the
larger of its phases, the first. GaLore is its dual between refreshes. Full fine-tuning keeps its weights in float32. `train.plan --search`
finds faster meshes and policies; here all is compiled alike. Mixtral's eight experts lie over as many chips (the mesh axis 'expert'), the
rest of its weights over fsdp; an expert has places for 1.25 times its even share of tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

from bench.common import RESULTS, machine, table, write_json
from lowrank_jax.memory import DoesNotFitError
from lowrank_jax.plan_table import human_bytes
from train import config as configs
from train import preview

LOG = RESULTS / "fit.jsonl"
LENGTH = 2048
MODELS = ("llama2_7b", "llama2_13b", "llama2_70b", "mixtral_8x7b")
METHODS: dict[str, dict[str, Any]] = {
    "LoRA r=16": {"method": "lora", "rank": 16},
    "LaMDA r=32": {"method": "lamda", "rank": 32},
    "GaLore dual r=128": {"method": "subspace_update", "rank": 128},
    "full": {"method": "full"},
}
# The last number of a v4 or v5p slice counts its cores, two a chip.
CHIPS = {
    "v5e-1": "v5e:1x1", "v5e-8": "v5e:2x4", "v5e-64": "v5e:8x8", "v5p-16": "v5p:2x2x2", "v5p-256": "v5p:4x4x8", "v6e-8": "v6e:2x4",
}  # fmt: skip
SITES = r"layers/.*/(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def experiment(model: str, method: str, chips: int) -> Any:
    """A run over all of the chips."""
    config = configs.base()
    config.task, config.model.source = "causal_lm", model
    config.model.dtype = config.model.param_dtype = "bfloat16"
    config.model.remat = "full"
    fields = dict(METHODS[method])
    config.adapter = configs.rule(fields.pop("method"), SITES, **fields)
    config.head, config.steps, config.batch_size, config.mesh.fsdp = None, 100, chips, chips
    if model == "mixtral_8x7b":
        config.mesh.expert = math.gcd(chips, 8)
        config.mesh.fsdp, config.model.capacity_factor = chips // config.mesh.expert, 1.25
    return config


def measure(model: str, method: str, chips: str) -> dict[str, Any]:
    """One cell: what an update holds and takes on a chip, or why it does not fit."""
    from lowrank_jax.memory import topology_devices

    topology, began = CHIPS[chips], time.perf_counter()
    config = experiment(model, method, len(topology_devices(topology)))
    mesh = preview.mesh(config, topology)
    shapes = preview.abstract_model(config, 2, mesh)
    row: dict[str, Any] = {"model": model, "method": method, "chips": chips, "mesh": dict(mesh.shape)}
    try:
        plan = preview.make_plan(config, shapes)
        found = preview.needs(config, shapes, plan, mesh, config.steps, 0, LENGTH)
    except DoesNotFitError as error:
        return row | {"refused": str(error), "compile_seconds": time.perf_counter() - began}
    report, kind = found.report, preview.chips.CHIPS[mesh.devices.flat[0].device_kind]
    return row | {
        "base": found.base, "adapters": found.adapters, "optimizer": found.optimizer, "activations": found.activations,
        "peak": report.peak, "flops": report.flops, "sent": report.sent, "seconds": report.seconds,
        "utilisation": found.useful / report.seconds / kind.flops, "compile_seconds": time.perf_counter() - began,
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """The finished cells."""
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def shown(row: dict[str, Any] | None) -> str:
    """A cell as text."""
    if row is None:
        return "-"
    if "peak" not in row:
        return "no"
    return f"{human_bytes(row['peak'])}, {row['seconds']:.2g} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    options = parser.parse_args()
    done = {(row["model"], row["method"], row["chips"]) for row in rows()}
    for model in options.models:
        for chips in options.chips:
            for method in options.methods:
                if (model, method, chips) in done:
                    continue
                row = measure(model, method, chips)
                with LOG.open("a") as stream:
                    stream.write(json.dumps(row | {"jax": machine()["jax"]}) + "\n")
                print(f"{model:14} {method:18} {chips:8} {shown(row)}  ({row['compile_seconds']:.0f} s)", flush=True)
    found = {(row["model"], row["method"], row["chips"]): row for row in rows()}
    write_json("fit", {"length": LENGTH, "rows": list(found.values())})
    cells = [
        [model, method, *(shown(found.get((model, method, c))) for c in CHIPS)]
        for model in MODELS
        for method in METHODS
    ]
    table(("model", "method", *CHIPS), cells, "Peak a chip and a step's predicted time; one row of 2,048 tokens a chip")


if __name__ == "__main__":
    main()
