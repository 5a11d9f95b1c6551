"""Training MiniLM on a classification task with one method: what bench/tweets.py and bench/methods.py share."""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lr
from configs.minilm_tweets import LINEAR
from lowrank_jax import assets, models
from lowrank_jax.models.tokenizer import load_tokenizer
from train import optimizer as optimizers
from train.data import Loader
from train.data import load as load_data

HEAD_RATE = 2e-3
MAX_LENGTH = 48


@functools.cache
def base(num_labels: int = 3) -> tuple[Any, Any, Any]:
    """The pretrained model with a fresh head, its parameters and its tokenizer."""
    folder = assets.fetch("minilm")
    loaded = models.load(folder, task="classify", num_labels=num_labels, classifier_pooling="mean", scan_layers=True)
    return loaded.model, loaded.params, load_tokenizer(folder)


def head_count(num_labels: int = 3) -> int:
    """Parameters of the classifier, trained by every method alike."""
    return 384 * num_labels + num_labels


@functools.cache
def data(task: str, split: str, seed: int, limit: int | None, glue: str | None = None) -> Loader:
    """Batches of 32 of a task: 'tweets', or 'glue/rte' and its like from the directory ``glue``."""
    where = None if task == "tweets" else pathlib.Path(glue or "") / task.partition("/")[2].upper()
    return load_data(
        task, split, base()[2], batch_size=32, max_length=MAX_LENGTH if where is None else 128, seed=seed, limit=limit,
        directory=where,
    )  # fmt: skip


def batch_of_full_width(labels: int) -> dict[str, Any]:
    """A fixed batch of 32 x 48 tokens, for times."""
    tokens = jax.random.randint(jax.random.key(0), (32, MAX_LENGTH), 1000, 20000)
    return {"tokens": tokens, "mask": jnp.ones_like(tokens), "label": jnp.arange(32) % labels}


def cosine(steps: Any) -> Any:
    """Linear warmup over the first tenth, then half a cosine to zero; ``steps`` may be traced."""
    return lambda count: jnp.minimum(count / (0.1 * steps), 0.5 + 0.5 * jnp.cos(jnp.pi * (count / steps - 0.1) / 0.9))


class Trainer:
    """One method's compiled steps for every learning rate, seed and length of run: these are arguments, so nothing compiles twice.

    Attributes:
      train: the loader of each seed's order. plan, statistics: of the method. init_seconds: of the last `start`, compilation included.
    """

    def __init__(self, method: lr.Method, train: Callable[[int], Loader], tuned: Any = None, pattern: str = LINEAR,
                 model_and_params: Any = None):  # fmt: skip
        self.train, labels = train, train(0).num_labels
        model, params = model_and_params or base(labels)[:2]
        self._params = params

        def loss_with(params: Any, adapters: lr.Adapters, batch: Any, **rngs: Any) -> jax.Array:
            logits = lr.linen.apply(model, params, adapters, batch["tokens"], attention_mask=batch["mask"], **rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        self.loss = loss_with
        rules = {pattern: method, "classifier": lr.full()}
        first = [next(train(0).iterator())] if method.needs - {"kernel"} else []
        self.statistics = None
        if "contribution" in method.needs:
            sites = {p: s for p, s in lr.sites(params).items() if lr.plan(params, {pattern: lr.lora(1)}).by_path.get(p)}
            self.statistics = lr.contributions(loss_with, params, tuned(), sites, first, progress=False)
        self.plan = lr.plan(params, rules, statistics=self.statistics)
        if method.needs & {"gradient", "covariance"}:
            self.statistics = lr.collect(loss_with, params, self.plan, first, progress=False)

        def optimizer(steps: Any) -> Any:
            adam = optax.chain(
                optax.clip_by_global_norm(1.0), optimizers.adam(self.plan), optax.scale_by_schedule(cosine(steps))
            )

            # The learning rates come before what the methods do to an update, as in train/optimizer.py.
            def rated(rate: Any) -> Any:
                return optax.stateless(lambda updates, _: {
                    path: jax.tree.map(lambda u, p=path: -u * (HEAD_RATE if "classifier" in p else rate), leaves)
                    for path, leaves in updates.items()
                })  # fmt: skip

            return lambda rate: lr.optim.with_methods(optax.chain(adam, rated(rate)), self.plan, steps)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(train: Any, state: Any, frozen: Any, params: Any, batch: Any, rate: Any, steps: Any, key: Any) -> Any:
            def objective(train: Any) -> Any:
                adapters = lr.join(train, frozen)
                loss = loss_with(params, adapters, batch, rngs={"dropout": key})
                return loss + lr.penalty(params, adapters, key), loss

            (_, loss), gradients = jax.value_and_grad(objective, has_aux=True)(train)
            updates, state = optimizer(steps)(rate).update(gradients, state, train)
            return optax.apply_updates(train, updates), state, loss

        @jax.jit
        def predict(params: Any, adapters: Any, batch: Any) -> Any:
            return lr.linen.apply(model, params, adapters, batch["tokens"], attention_mask=batch["mask"]).argmax(-1)

        self.step, self._predict, self._optimizer = step, predict, optimizer

    def start(self, steps: int, seed: int) -> tuple[Any, Any, lr.Adapters, Any]:
        """What a run begins with: folded base, train tree, frozen rest, optimizer state."""
        began = time.perf_counter()
        original = lr.init(jax.random.key(seed), self._params, self.plan, statistics=self.statistics)
        params, adapters = jax.block_until_ready(lr.fold(self._params, original))
        self.init_seconds = time.perf_counter() - began
        train, frozen = lr.partition(adapters, 0, steps)
        train = jax.tree.map(jnp.copy, train)  # the step donates it, and leaves may be shared with an anchor
        return params, train, frozen, self._optimizer(steps)(1.0).init(train)

    def run(self, steps: int, rate: float, seed: int) -> tuple[Any, lr.Adapters, float]:
        """Trains once; gives the (folded) base, the adapter and the last loss."""
        params, train, frozen, state = self.start(steps, seed)
        tx = self._optimizer(steps)(1.0)
        batches, key = self.train(seed).iterator(), jax.random.key(seed)
        phases, loss = self.plan.phases(steps), float("nan")
        for step in range(steps):
            if step and step in phases:
                train, frozen = lr.partition(lr.join(train, frozen), step, steps)
                state = lr.optim.carry_state(tx, state, train)
            train, state, loss = self.step(
                train, state, frozen, params, next(batches), rate, steps, jax.random.fold_in(key, step)
            )
        return params, lr.join(train, frozen), float(loss)

    def accuracy(self, params: Any, adapters: lr.Adapters, loader: Loader) -> tuple[float, int]:
        """Accuracy on every row of a loader, and how many there were."""
        right = seen = 0
        for batch in loader.evaluation_batches():
            valid = batch.pop("valid")
            right += int(((self._predict(params, adapters, batch) == batch["label"]) & valid).sum())
            seen += int(valid.sum())
        return right / seen, seen
