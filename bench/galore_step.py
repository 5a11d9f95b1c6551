"""Step time of GaLore and its relatives over AdamW's, refreshes spread over the steps between them.

    python -m bench.galore_step               # the paper's 60m, batch 2 x 128, float32; about ten minutes on two cores

Every run trains all of the model: attention and MLP matrices through the method, the rest by Adam. Runs take turns in one process, weights
and state are donated. A refresh step finds all subspaces; what it takes beyond an ordinary step (for the dual, which refreshes in a call
of its own, all that the call takes) is divided by the period:

    over AdamW = (step + refresh / period) / AdamW's step
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

import lowrank_jax as lr
from bench.common import interleaved, table, write_json
from bench.optimizer_state import MATRICES
from lowrank_jax import models
from lowrank_jax.models.llama_sizes import GALORE_RANKS, galore_paper
from lowrank_jax.sites import flatten

RATE, SCALE = 1e-3, 0.25


def loss_of(model: nn.Module, params: Any, adapters: lr.Adapters | None, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token, float32."""
    variables = {"params": params}
    logits = model.apply(variables, tokens) if adapters is None else lr.linen.apply(model, params, adapters, tokens)
    logits = logits[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def dense_step(model: nn.Module, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """``(params, state, tokens) -> (params, state, loss)``."""

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(lambda params: loss_of(model, params, None, tokens))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def adapter_step(model: nn.Module, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """``(trained, state, adapters, frozen, tokens) -> (trained, state, loss)``: an adapter and some of the weights are trained.

    ``trained``: of `lowrank_jax.partition`, and weights by path. ``adapters``: the rest of them. ``frozen``: the other weights by path.
    """

    def step(trained: Any, state: Any, adapters: lr.Adapters, frozen: Mapping[str, Any], tokens: jax.Array) -> Any:
        def loss_at(trained: Any) -> jax.Array:
            coordinates, weights = trained
            params = traverse_util.unflatten_dict({**frozen, **weights}, sep="/")
            return loss_of(model, params, lr.join(coordinates, adapters), tokens)

        loss, gradients = jax.value_and_grad(loss_at)(trained)
        updates, state = tx.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    return step


def divide(params: Any, plan: lr.Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights outside a plan and those in it, by path."""
    flat = flatten(params)
    outside = {path: leaf for path, leaf in flat.items() if path not in plan.by_path}
    return outside, {path: flat[path] for path in plan.by_path}


def with_rate(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(tx, optax.scale_by_learning_rate(RATE))


def dual_optimizer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Of ``(coordinates, weights)``: GaLore's scale is of the coordinates alone."""
    return with_rate(optax.chain(inner, optax.stateless(lambda u, _: (jax.tree.map(lambda x: SCALE * x, u[0]), u[1]))))


class Dense:
    """A run whose gradients are dense. ``refresh``: a step as the first is, which finds the subspaces."""

    def __init__(self, model: nn.Module, params: Any, tokens: jax.Array, tx: optax.GradientTransformation):
        tx = with_rate(tx)
        self._run = jax.jit(dense_step(model, tx), donate_argnums=(0, 1))
        self._params, self._tokens = jax.tree.map(jnp.copy, params), tokens
        self._state = tx.init(params)

    def step(self) -> jax.Array:
        self._params, self._state, loss = self._run(self._params, self._state, self._tokens)
        return loss

    def refresh(self) -> jax.Array:
        first, *others = self._state
        self._state = (first._replace(count=jnp.zeros((), jnp.int32)), *others)
        return self.step()


class Dual:
    """A run of `lowrank_jax.dual_galore`; a refresh is a call of its own."""

    def __init__(
        self, model: nn.Module, params: Any, tokens: jax.Array, inner: optax.GradientTransformation, plan: lr.Plan
    ):
        self._plan, self._tokens = plan, tokens
        self._params = jax.tree.map(jnp.copy, params)
        self._adapters = lr.init(jax.random.key(1), params, plan)
        tx = dual_optimizer(inner)
        self._state = tx.init((lr.partition(self._adapters)[0], divide(params, plan)[0]))
        self._run = jax.jit(adapter_step(model, tx), donate_argnums=(0, 1))
        refresh = lr.dual_galore.refresher(lambda params, adapters, batch: loss_of(model, params, adapters, batch))
        self._refresh = jax.jit(refresh, donate_argnums=(0, 1))

    def step(self) -> jax.Array:
        (train, adapters), (outside, inside) = lr.partition(self._adapters), divide(self._params, self._plan)
        (train, outside), self._state, loss = self._run((train, outside), self._state, adapters, inside, self._tokens)
        self._adapters = lr.join(train, adapters)
        self._params = traverse_util.unflatten_dict({**inside, **outside}, sep="/")
        return loss

    def refresh(self) -> Any:
        self._params, self._adapters = self._refresh(self._params, self._adapters, self._tokens, jax.random.key(2))
        return self._adapters.sites


def runs(size: str, layers: int | None, batch: tuple[int, int], period: int) -> tuple[dict[str, Dense | Dual], int]:
    """Every run by its name, AdamW first, and their rank."""
    config, rank = galore_paper(size, scan_layers=True), GALORE_RANKS[size]
    if layers:
        config = galore_paper(size, scan_layers=True, num_hidden_layers=layers)
    model = models.build(config)
    tokens = jax.random.randint(jax.random.key(0), batch, 0, config.vocab_size)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    about: dict[str, Any] = {
        "targets": [MATRICES],
        "sites": lr.linen.sites(model, params, tokens),
        "refresh_every": period,
    }
    plan = lr.plan(params, {MATRICES: lr.subspace_update(rank=rank)}, sites=about["sites"])
    adam, adam_8bit = optax.scale_by_adam(), lr.optim.scale_by_adam_8bit()
    dense = {
        "AdamW": adam,
        "GaLore": lr.optim.galore(adam, rank, scale=SCALE, **about),
        "8-bit AdamW": adam_8bit,
        "8-bit GaLore": lr.optim.galore(adam_8bit, rank, scale=SCALE, **about),
        "FRUGAL, density 0.25": lr.optim.frugal(adam, 0.25, **about),
    }
    out: dict[str, Dense | Dual] = {name: Dense(model, params, tokens, tx) for name, tx in dense.items()}
    out |= {
        "dual GaLore": Dual(model, params, tokens, adam, plan),
        "8-bit dual GaLore": Dual(model, params, tokens, adam_8bit, plan),
    }
    return out, rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="60m", choices=sorted(GALORE_RANKS))
    parser.add_argument("--layers", type=int, help="as many instead of the model's")
    parser.add_argument("--batch", type=int, nargs=2, default=(2, 128), metavar=("ROWS", "TOKENS"))
    parser.add_argument("--period", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    made, rank = runs(options.size, options.layers, tuple(options.batch), options.period)
    # Compiled and at its first subspaces before the clock runs; no later refresh falls into the rounds.
    calls: dict[str, Callable[[], Any]] = {}
    for name, run in made.items():
        calls[name] = run.step
        if "AdamW" not in name:
            jax.block_until_ready(run.refresh())
            print(f"{name} compiled", flush=True)
    seconds = interleaved(calls, options.repeats)
    refreshes = interleaved({name: run.refresh for name, run in made.items() if "AdamW" not in name}, 3)
    rows = {}
    for name, times in seconds.items():
        step, refresh = statistics.median(times), 0.0
        if name in refreshes:
            refresh = statistics.median(refreshes[name]) - (0 if isinstance(made[name], Dual) else step)
        ratio = statistics.median(t / f for t, f in zip(times, seconds["AdamW"], strict=True))
        amortised = refresh / options.period / statistics.median(seconds["AdamW"])
        rows[name] = {"step": step, "refresh": refresh, "step_over": ratio, "over": ratio + amortised}
    title = (
        f"{options.size}, {options.layers or 'all'} layers, rank {rank}, batch {options.batch[0]} x {options.batch[1]}, float32, "
        f"refresh every {options.period} steps, {options.repeats} rounds"
    )
    shown = [
        (name, f"{1000 * r['step']:.0f}", f"{1000 * r['refresh']:.0f}", f"{r['step_over']:.3f}", f"{r['over']:.3f}",
         "" if "AdamW" in name else "yes" if r["over"] <= 1.1 else "no")
        for name, r in rows.items()
    ]  # fmt: skip
    columns = ("run", "step ms", "refresh ms", "step over AdamW's", "with refreshes", "at most 1.10")
    table(columns, shown, title)
    write_json("galore_step", {"what": title, "rows": rows})


if __name__ == "__main__":
    main()
