"""Memory by the TPU compiler, without a TPU: who fits where.

    pip install -e '.[topology]'
    python -m bench.tpu_memory                # about twenty minutes on two cores

Compiles whole training steps (forward, backward, optimizer update; bfloat16 weights and compute, float32 adapters and AdamW
state, batch 4 x 512) for one chip and reads the compiler's own account. Two models: Llama-2-7B shapes with adapters on all linear
layers, and an encoder of BERT-large's shapes without rematerialisation. LaMDA appears in both of its phases: `start` trains the
core and the second projection, `end` the core alone.
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

LLAMA = r".*/(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
BERT = r".*/(query|key|value|attention/output|mlp/intermediate|mlp/output)"
METHODS = {
    "full": (lr.full(), 0),
    "LoRA r=16": (lr.lora(rank=16), 0),
    "LaMDA r=32, start": (lr.lamda(rank=32), 0),
    "LaMDA r=32, end": (lr.lamda(rank=32), 99),
}


def training_step(model: Any, shapes: Any, method: lr.Method, pattern: str, step: int) -> tuple[Any, tuple, lr.Plan]:
    """A training step and its abstract arguments at one step of a run of 100."""
    tokens = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    plan = lr.plan(shapes, {pattern: method}, sites=lr.linen.sites(model, shapes, tokens))
    adapters = abstract_adapters(plan)
    if plan.entries[0].method.anchor is not None:
        adapters = adapters.replace(folded=True)
    train, frozen = lr.partition(adapters, step, 100)
    frozen = _without_anchors(frozen)
    tx = lr.optim.with_methods(optax.adamw(1e-4), plan, 100)

    def run(train: Any, state: Any, frozen: Any, params: Any, tokens: Any) -> Any:
        def loss_of(train: Any) -> Any:
            logits = lr.linen.apply(model, params, lr.join(train, frozen), tokens)
            if not hasattr(logits, "astype"):  # an encoder's hidden states
                return (logits.hidden.astype(jnp.float32) ** 2).mean()
            return optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
            ).mean()

        loss, gradients = jax.value_and_grad(loss_of)(train)
        updates, new_state = tx.update(gradients, state, train)
        return optax.apply_updates(train, updates), new_state, loss

    return run, (train, jax.eval_shape(tx.init, train), frozen, shapes, tokens), plan


def _without_anchors(frozen: lr.Adapters) -> lr.Adapters:
    """A folded run holds its anchors on the host; they are no argument of the step."""
    sites = {
        path: {name: leaf for name, leaf in leaves.items() if not frozen.plan.by_path[path].leaves[name].anchor}
        for path, leaves in frozen.sites.items()
    }
    return frozen.replace(sites=sites)


def measure(family: str, remat: str, name: str, topology: str) -> dict[str, Any]:
    method, step = METHODS[name]
    if family == "llama2-7b":
        config, pattern = models.llama2_7b(), LLAMA
    else:
        config = models.BertConfig(
            vocab_size=30522, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        )
        pattern = BERT
    config = dataclasses.replace(config, scan_layers=True, remat=remat, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    shapes = models.param_shapes(config)
    run, args, plan = training_step(models.build(config), shapes, method, pattern, step)
    # Full fine-tuning trains the weights themselves: the base it starts from is not kept beside them on the chip.
    chip = NamedSharding(topology_mesh(topology, {}), PartitionSpec())
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip), args)
    base = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    row = {
        "model": family, "remat": remat, "method": name, "topology": topology, "trainable": plan.count(step, 100),
        "base_gib": base / 2**30, "peak_gib": None, "rest_gib": None,
    }  # fmt: skip
    try:
        report = compile_report(run, args, donate=(0, 1))
    except DoesNotFitError as error:
        return row | {"refused": str(error)}
    return row | {
        "peak_gib": report.peak / 2**30,
        "rest_gib": (report.peak - base) / 2**30,
        "temp_gib": report.temp / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x2x1", help="chips to compile for; one of them is used")
    options = parser.parse_args()
    cells = [("bert-large", "none", name, options.topology) for name in METHODS]
    cells += [("llama2-7b", remat, name, options.topology) for remat in ("full", "none", "dots") for name in METHODS]
    cells += [("llama2-7b", "full", name, "v5e:2x2") for name in list(METHODS)[1:]]
    rows = []
    for cell in cells:
        rows.append(measure(*cell))
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        write_json("tpu_memory", {"batch": [4, 512], "rows": rows})
    show = lambda value: "does not fit" if value is None else f"{value:.2f}"  # noqa: E731
    shown = [
        (
            r["model"],
            r["topology"],
            r["remat"],
            r["method"],
            f"{r['trainable']:,}",
            show(r["peak_gib"]),
            show(r["rest_gib"]),
        )
        for r in rows
    ]
    columns = ("model", "chip", "remat", "method", "trainable", "peak GiB", "beyond base weights GiB")
    table(columns, shown, "One chip, batch 4 x 512")


if __name__ == "__main__":
    main()
