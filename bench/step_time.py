"""Step time against the frozen floor, and against peers on the same model.

    python -m bench.step_time                       # SmolLM2-135M shapes, batch 4 x 128, float32; a quarter of an hour on two cores
    python -m bench.step_time --wide                # one layer as wide as Llama-2-7B's

A step is value_and_grad for the trained leaves plus AdamW. The floor is what any adapter must pay: the base's forward and the
backward of its activations. Runs take turns in one process, and a ratio is the median over rounds of the step's time over the
floor's in the same round. `expected` counts the multiplications of the linear layers: an adapter of rank r adds to a d_in x d_out
weight r (d_in + d_out) [+ r^2] per token in the forward and the same in the backward of activations, and what its own gradients
take. qwix's LoRA runs on the same model where qwix is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lr
from bench.common import interleaved, table, write_json
from lowrank_jax import models

LINEAR = r".*/(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
METHODS = {
    "LoRA r=16": (lr.lora(rank=16), 0),
    "PiSSA r=16": (lr.pissa(rank=16), 0),
    "LoRA-XS r=32": (lr.lora_xs(rank=32), 0),
    "LaMDA r=32, start": (lr.lamda(rank=32), 0),
    "LaMDA r=32, end": (lr.lamda(rank=32), 99),
    "full": (lr.full(), 0),
}


def config_of(wide: bool, layers: int | None) -> models.LlamaConfig:
    """SmolLM2-135M's shapes, or one layer of Llama-2-7B with a small vocabulary."""
    if wide:
        return dataclasses.replace(models.llama2_7b(), num_hidden_layers=1, vocab_size=512, scan_layers=True)
    config = dataclasses.replace(models.smollm2_135m(), scan_layers=True)
    return config if layers is None else dataclasses.replace(config, num_hidden_layers=layers)


def loss_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def floor(model: nn.Module, params: Any, tokens: jax.Array) -> Any:
    """Forward, and backward of the activations: the gradient for what the first layer reads."""

    @jax.jit
    def run(params: Any, nudge: jax.Array) -> Any:
        def loss(nudge: jax.Array) -> jax.Array:
            def add(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
                y = next_fun(*args, **kwargs)
                return y + nudge if isinstance(context.module, nn.Embed) and context.method_name == "__call__" else y

            with nn.intercept_methods(add):
                return loss_of(model.apply({"params": params}, tokens), tokens)

        return jax.value_and_grad(loss)(nudge)

    nudge = jnp.zeros((*tokens.shape, model.config.hidden_size))
    return lambda: run(params, nudge)


def ours(model: nn.Module, params: Any, tokens: jax.Array, method: lr.Method, step: int) -> tuple[Any, lr.Plan]:
    plan = lr.plan(params, {LINEAR: method}, sites=lr.linen.sites(model, params, tokens))
    adapters = lr.init(jax.random.key(1), params, plan)
    params, adapters = lr.fold(params, adapters)
    train, frozen = lr.partition(adapters, step, 100)
    tx = lr.optim.with_methods(optax.adamw(1e-4), plan, 100)

    @jax.jit
    def run(train: Any, state: Any, frozen: Any, params: Any) -> Any:
        def loss(train: Any) -> jax.Array:
            return loss_of(lr.linen.apply(model, params, lr.join(train, frozen), tokens), tokens)

        value, gradients = jax.value_and_grad(loss)(train)
        updates, new_state = tx.update(gradients, state, train)
        return optax.apply_updates(train, updates), new_state, value

    state = tx.init(train)
    return (lambda: run(train, state, frozen, params)), plan


def qwix_lora(model: nn.Module, params: Any, tokens: jax.Array) -> Any:
    """LoRA r=16 of qwix on the same model and weights, trained leaves split from the rest."""
    import qwix
    from flax import traverse_util

    provider = qwix.LoraProvider(module_path=r".*(proj).*", rank=16, alpha=16.0)
    adapted = qwix.apply_lora_to_model(model, provider)
    every = traverse_util.flatten_dict(dict(adapted.init(jax.random.key(1), tokens)["params"]))
    base = traverse_util.flatten_dict(dict(params))
    train = {k: v for k, v in every.items() if k[-1].endswith(("_lora_a", "_lora_b"))}
    assert len(train) == 14, sorted(train)
    tx = optax.adamw(1e-4)

    @jax.jit
    def run(train: Any, state: Any, base: Any) -> Any:
        def loss(train: Any) -> jax.Array:
            return loss_of(adapted.apply({"params": traverse_util.unflatten_dict({**base, **train})}, tokens), tokens)

        value, gradients = jax.value_and_grad(loss)(train)
        updates, new_state = tx.update(gradients, state, train)
        return optax.apply_updates(train, updates), new_state, value

    state = tx.init(train)
    return lambda: run(train, state, base)


def expected(config: models.LlamaConfig, plan: lr.Plan, step: int) -> float:
    """Multiplications of a step over the floor's, linear layers and the output projection."""
    base = config.vocab_size * config.hidden_size
    own = 0
    for entry in plan.entries:
        site, layers = entry.site, entry.site.batch_shape[0]
        base += layers * site.n_in * site.n_out
        trained = {n for n, leaf in entry.leaves.items() if plan.is_trained(leaf, step, 100)}
        if "weight" in trained:
            own += layers * site.n_in * site.n_out
            continue
        r = dict(entry.method.config)["rank"]
        path = r * (site.n_in + site.n_out) + (r * r if "m" in entry.leaves else 0)
        gradients = sum(r * {"a": site.n_in, "b": site.n_out, "m": r}[n] for n in trained)
        own += layers * (2 * path + gradients)
    return 1 + own / (2 * base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--runs", type=int, default=11)
    options = parser.parse_args()
    config = config_of(options.wide, options.layers)
    model = models.build(config)
    tokens = jax.random.randint(jax.random.key(0), (4, 128), 0, config.vocab_size)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    forward = jax.jit(lambda p: loss_of(model.apply({"params": p}, tokens), tokens))
    calls: dict[str, Any] = {"forward": lambda: forward(params), "frozen floor": floor(model, params, tokens)}
    predicted = {}
    for name, (method, step) in METHODS.items():
        calls[name], plan = ours(model, params, tokens, method, step)
        predicted[name] = expected(config, plan, step)
    if importlib.util.find_spec("qwix"):
        calls["qwix LoRA r=16"] = qwix_lora(model, params, tokens)
    seconds = interleaved(calls, options.runs)
    rows = {}
    for name, times in seconds.items():
        ratios = [t / f for t, f in zip(times, seconds["frozen floor"], strict=True)]
        forwards = [t / f for t, f in zip(times, seconds["forward"], strict=True)]
        rows[name] = {
            "ms": 1000 * statistics.median(times),
            "over_floor": statistics.median(ratios),
            "expected": predicted.get(name),
            "over_forward": statistics.median(forwards),
        }
    title = (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, batch 4 x 128, float32, {options.runs} rounds"
    )
    table(
        ("step", "ms", "over the floor", "expected", "over its own forward"),
        [
            (
                n,
                f"{r['ms']:.0f}",
                f"{r['over_floor']:.3f}",
                f"{r['expected']:.3f}" if r["expected"] else "",
                f"{r['over_forward']:.2f}",
            )
            for n, r in rows.items()
        ],
        title,
    )
    write_json("step_time_wide" if options.wide else "step_time", {"what": title, "rows": rows})


if __name__ == "__main__":
    main()
