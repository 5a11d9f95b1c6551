"""Pre-training memory by the TPU compiler, without a TPU: AdamW, GaLore, and GaLore one layer at a time.

    pip install -e '.[topology]'
    python -m bench.layerwise_memory                # or --sizes 60m 350m

Compiles whole training steps (forward, backward, optimizer, GaLore's refresh) of the GaLore paper's Llamas for one chip and reads the
compiler's own account. Weights, compute and moments are bfloat16 (8-bit moments where the name says so), one row of 256 tokens (2048 for
7B), every layer rematerialised. Rows that are measured again replace those of the result file.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import lowrank_jax as lr
from bench.common import RESULTS, table, write_json
from lowrank_jax import models
from lowrank_jax.memory import DoesNotFitError, compile_report, topology_mesh
from lowrank_jax.models.llama_parts import join_layers, llama_parts, split_layers
from lowrank_jax.models.llama_sizes import GALORE_RANKS, galore_paper
from lowrank_jax.optim import galore, scale_by_adam_8bit
from lowrank_jax.optim.layerwise import layerwise_update

# 5461, of the paper's 1B, is no multiple of 8: the TPU's layout for such a stack puts the layers within the matrices.
SIZES: dict[str, dict[str, int]] = {
    "60m": {},
    "350m": {},
    "1b": {},
    "1b, 5504 wide": {"intermediate_size": 5504},
    "7b": {},
}
ADAM, ADAM_8BIT = optax.scale_by_adam(), scale_by_adam_8bit()
# Adam in the subspaces of a layer, and Adam of the embedding and the head.
LAYERWISE = {
    "GaLore, layerwise": (ADAM, ADAM),
    "8-bit GaLore, layerwise": (ADAM_8BIT, ADAM_8BIT),
    "8-bit GaLore, layerwise, bfloat16 outside": (ADAM_8BIT, ADAM),
}
METHODS = ("AdamW", "GaLore", *LAYERWISE)


def config_of(size: str) -> models.LlamaConfig:
    options: dict[str, Any] = {"scan_layers": True, "remat": "full", "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    return galore_paper(size.partition(",")[0], **SIZES[size], **options)


def dense_step(config: models.LlamaConfig, method: str, rank: int, params: Any, batch: Any) -> tuple[Any, tuple]:
    """A step that holds all gradients, and its abstract arguments, the first two to be donated."""
    inner, tokens, model = ADAM, batch["tokens"], models.build(config)
    if method == "GaLore":
        found = lr.linen.sites(model, params, tokens)
        inner = galore(inner, rank, targets=[r".*/(attention|mlp)/.*"], sites=found)
    tx = optax.chain(inner, optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-2))

    def loss_of(params: Any, batch: Any) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch["tokens"])
        targets = batch["tokens"][:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), targets).mean()

    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step, (params, jax.eval_shape(tx.init, params), batch)


def layerwise_step(config: models.LlamaConfig, method: str, rank: int, params: Any, batch: Any) -> tuple[Any, tuple]:
    """The same step one layer at a time."""
    inside, outside = LAYERWISE[method]
    after = (optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-2))
    layerwise = layerwise_update(
        llama_parts(config), optax.chain(galore(inside, rank), *after), optax.chain(outside, *after)
    )

    def step(params: Any, state: Any, batch: Any) -> Any:
        stacked, rest, state, loss = layerwise.update(*split_layers(params), state, batch)
        return join_layers(stacked, rest), state, loss

    return step, (params, jax.eval_shape(layerwise.init, *split_layers(params)), batch)


def measure(size: str, method: str, topology: str) -> dict[str, Any]:
    config, rank, length = config_of(size), GALORE_RANKS[size.partition(",")[0]], 2048 if size == "7b" else 256
    params = models.param_shapes(config)
    batch = {"tokens": jax.ShapeDtypeStruct((1, length), jnp.int32)}
    make = layerwise_step if method in LAYERWISE else dense_step
    step, args = make(config, method, rank, params, batch)
    chip = NamedSharding(topology_mesh(topology, {}), PartitionSpec())
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip), args)
    weights, state = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in args[:2])
    row = {
        "size": size, "method": method, "rank": rank, "tokens": length, "topology": topology, "weights_gib": weights / 2**30,
        "state_gib": state / 2**30, "peak_gib": None,
    }  # fmt: skip
    start = time.perf_counter()
    try:
        report = compile_report(step, args, donate=(0, 1))
    except DoesNotFitError as error:
        return row | {"refused": str(error)}
    return row | {
        "peak_gib": report.peak / 2**30,
        "temp_gib": report.temp / 2**30,
        "argument_gib": report.argument / 2**30,
        "compile_seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x2x1", help="chips to compile for; one of them is used")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    options = parser.parse_args()
    path = RESULTS / "layerwise_memory.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(row["size"], row["method"]): row for row in before}
    for size in options.sizes:
        for method in options.methods:
            rows[size, method] = measure(size, method, options.topology)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[size, method].items()}, flush=True)
            write_json("layerwise_memory", {"rows": list(rows.values())})
    show = lambda value: "does not fit" if value is None else f"{value:.2f}"  # noqa: E731
    columns = ("size", "method", "weights_gib", "state_gib", "peak_gib")
    shown = [(row["size"], row["method"], *(show(row[name]) for name in columns[2:])) for row in rows.values()]
    table(columns, shown, "One chip, one row of tokens")


if __name__ == "__main__":
    main()
