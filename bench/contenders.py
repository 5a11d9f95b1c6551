"""What bench/throughput.py compares: ways to train one Llama on the same batches, each an update that is fed from the host."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import lowrank_jax as lr
from bench.step_time import LINEAR, floor
from lowrank_jax import flops, models
from train import base, optimizer, tasks
from train import config as configs
from train.job import Job
from train.step import Stepper, make_update, start

SEED, TOTAL = 0, 1000
FLOOR = "frozen floor"
METHODS: dict[str, tuple[str, dict[str, Any], str, int]] = {  # method, fields, weights, phase
    "LoRA r=16": ("lora", {"rank": 16}, LINEAR, 0),
    "LaMDA r=32, first phase": ("lamda", {"rank": 32}, LINEAR, 0),
    "LaMDA r=32, last phase": ("lamda", {"rank": 32}, LINEAR, -1),
    "full": ("full", {}, ".*", 0),
}
PEERS = (
    {"qwix + tunix, LoRA r=16": False, "qwix + tunix with our loss": True} if importlib.util.find_spec("tunix") else {}
)

Batch = dict[str, np.ndarray]


@dataclasses.dataclass
class Contender:
    """One way to train.

    Attributes:
      update: makes an update on a batch and returns ``(sum of losses, what to divide it by)``, of all updates so far or of this one.
      products: FLOPs of an update's matrix products.
    """

    update: Callable[[Batch], tuple[Any, Any]]
    products: float


def model_of(width: int, layers: int) -> models.LlamaConfig:
    """A Llama of that width; the rotary base is the one that tunix's Llama has whatever its configuration says."""
    return models.LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, rope_theta=1e6, scan_layers=True,
    )  # fmt: skip


def weights(config: models.LlamaConfig) -> Any:
    """Random weights."""
    return jax.jit(models.build(config).init)(jax.random.key(SEED), jnp.ones((1, 2), jnp.int32))["params"]


def batches(config: models.LlamaConfig, rows: int, length: int) -> list[Batch]:
    """Batches as `train.data` gives them: nothing is padding, every token but the first is learned."""
    dice, shape = np.random.default_rng(SEED), (rows, length)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    fixed = {"loss_mask": positions > 0, "positions": positions, "segment_ids": np.ones(shape, np.int32)}
    return [fixed | {"tokens": dice.integers(1, config.vocab_size, shape, np.int32)} for _ in range(8)]


def run_config(name: str) -> ml_collections.ConfigDict:
    """The run of a method, all that is not named here at its default."""
    method, fields, pattern, _ = METHODS[name]
    config = configs.base()
    config.task, config.steps, config.weight_decay, config.seed = "causal_lm", TOTAL, 0.01, SEED
    config.adapter = configs.rule(method, pattern, **fields)
    return config


def ours(config: models.LlamaConfig, params: Any, name: str, batch: Batch) -> Contender:
    """Our update in a phase of a method, as `train.loop` makes it."""
    run, model, task = run_config(name), models.build(config), tasks.causal_lm()
    plan = lr.plan(params, configs.plan_rules(run), sites=lr.linen.sites(model, params, batch["tokens"]))
    tx, step = optimizer.make(run, plan, TOTAL), plan.phases(TOTAL)[METHODS[name][-1]]
    folded, adapters = base.under(run, params, lr.init(jax.random.key(SEED), params, plan))
    train, frozen = lr.partition(adapters, step, TOTAL)
    # What only loading and evaluation read stays empty.
    job = Job(
        config=run, task=task, model=model, params=params, model_config=config, plan=plan, total_steps=TOTAL,
        base=None, tokenizer=None, train=None, evaluation=None, test=None, statistics=None, mesh=None,
    )  # fmt: skip
    stepper, held = Stepper(job, tx), [start(train, tx.init(train), step)]
    products = flops.count(make_update(run, model, task, tx), held[0], frozen, folded, batch)

    def update(batch: Batch) -> tuple[Any, Any]:
        held.append(stepper(held.pop(), frozen, folded, batch))
        return held[0].loss, held[0].weight

    return Contender(update, products)


def ours_unscanned(config: models.LlamaConfig, params: Any, name: str, batch: Batch) -> Contender:
    """The same with a model whose layers are not scanned."""
    return ours(dataclasses.replace(config, scan_layers=False), models.unstack_layers(params), name, batch)


def peer(config: models.LlamaConfig, params: Any, name: str, batch: Batch) -> Contender:
    """The peer's update, with the optimizer of ours."""
    from bench import tunix_peer

    run = run_config("LoRA r=16")
    adamw = optax.adamw(optimizer.schedule(run, TOTAL), run.b1, run.b2, run.eps, weight_decay=run.weight_decay)
    tx = optax.chain(optax.clip_by_global_norm(run.clip), adamw)
    update, products = tunix_peer.lora(config, params, tx, run.adapter.rank, batch, our_loss=PEERS[name])
    return Contender(lambda batch: (update(batch), 1.0), products)


def frozen_floor(config: models.LlamaConfig, params: Any, batch: Batch) -> Contender:
    """Forward, and backward of the activations, always on the same tokens."""
    run = floor(models.build(config), params, jnp.asarray(batch["tokens"]))
    return Contender(lambda batch: (run()[0], 1.0), flops.count(run))


def everyone(config: models.LlamaConfig, batch: Batch) -> dict[str, Contender]:
    """All of them, on the same weights."""
    params = weights(config)
    found = {FLOOR: frozen_floor(config, params, batch)}
    found |= {name: ours(config, params, name, batch) for name in METHODS}
    for name in ("LoRA r=16", "LaMDA r=32, last phase"):
        found[f"{name}, layers not scanned"] = ours_unscanned(config, params, name, batch)
    return found | {name: peer(config, params, name, batch) for name in PEERS}
