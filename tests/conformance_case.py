"""One method on one model: what the laws look at, computed once, and the matrix of all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conformance_methods import METHODS
from conformance_models import BRIDGES, KINDS, LAYOUTS, Model, build, mesh_of
from conformance_row import Row

import lowrank_jax as lr
from lowrank_jax.sites import flatten
from train.sharding import spread


@dataclass(frozen=True)
class Case:
    """One method on one model. What several laws need is computed once."""

    row: Row
    bridge: str
    kind: str
    layout: str
    devices: tuple[int, int, int] = (2, 2, 2)

    def __str__(self) -> str:
        return f"{self.row.name}-{self.bridge}-{self.kind}-{self.layout}"

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        return mesh_of(self.devices) if self.layout == "mesh" else None

    @functools.cached_property
    def model(self) -> Model:
        return build(self.bridge, self.kind, self.layout, self.devices)

    @functools.cached_property
    def plan(self) -> lr.Plan:
        sites = {path: site for path, site in self.model.sites.items() if site.kind != "param"}
        return lr.plan(self.model.params, {".*": self.row.make()}, sites=sites, statistics=self.statistics)

    @functools.cached_property
    def statistics(self) -> lr.Statistics | None:
        """What the method needs, collected on this model."""
        method = self.row.make()
        what = sorted(method.needs - {"kernel"})
        if not what:
            return None
        sites = {path: site for path, site in self.model.sites.items() if site.kind in method.site_kinds}
        if what == ["contribution"]:
            tuned = jax.tree.map(lambda x: (x * 1.1).astype(x.dtype), self.model.params)
            return lr.contributions(
                self._statistic_loss, self.model.params, tuned, sites, [self.model.args], progress=False
            )
        return lr.collect(self._statistic_loss, self.model.params, sites, [self.model.args], what=what, progress=False)

    def _statistic_loss(self, params: Any, adapters: lr.Adapters, args: Any) -> jax.Array:
        y = self.model.apply(params, adapters, *args)
        return jnp.mean((y - _target(y.shape)) ** 2)

    @functools.cached_property
    def adapters(self) -> lr.Adapters:
        return lr.init(jax.random.key(1), self.model.params, self.plan, statistics=self.statistics)

    def moved(self, seed: int = 0) -> lr.Adapters:
        """Random, far from init, and the same numbers in every bridge and layout."""
        leaves, shared = _moved_leaves(self.row, self.kind, seed)
        laid = self.adapters.replace(sites=self.model.lay(leaves), shared=shared)
        place = lambda x, like: jax.device_put(x, like.sharding if self.layout == "mesh" and like.committed else None)  # noqa: E731
        return jax.tree.map(place, laid, self.adapters)

    @functools.cached_property
    def apply(self) -> Callable[..., jax.Array]:
        return jax.jit(functools.partial(self.model.apply, **self.signals))

    @functools.cached_property
    def signals(self) -> dict[str, Any]:
        row = self.row.signals
        return {} if row is None else {"signals": {name: jnp.asarray(value) for name, value in row.items()}}

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return lr.optim.with_methods(optax.adamw(1e-2, weight_decay=0.1), self.plan, total_steps=10)

    def start(self, train: Any, optimizer: optax.GradientTransformation | None = None) -> Any:
        """The optimizer's state, on the mesh from the start: where it came there by the first update, the second would compile again."""
        return spread((optimizer or self.optimizer).init(train), self.mesh)

    def task_loss(self, train: Any, frozen: lr.Adapters, params: Any) -> jax.Array:
        y = self.model.apply(params, lr.join(train, frozen), *self.model.args, **self.signals)
        return jnp.mean((y - _target(y.shape)) ** 2)

    def loss(self, train: Any, frozen: lr.Adapters, params: Any) -> jax.Array:
        return self.task_loss(train, frozen, params) + lr.penalty(params, lr.join(train, frozen))

    @property
    def mergeable(self) -> bool:
        record = self.row.make().form.record
        assert record.delta == (self.row.update is not None)
        bare = [e for e in self.plan.entries if f"{e.site.module}/bias" not in flatten(self.model.params)]
        return record.delta and not (self.row.adds_bias and bare)

    @functools.cached_property
    def step(self) -> Callable[..., Any]:
        def step(train: Any, frozen: lr.Adapters, params: Any, state: Any) -> Any:
            loss, gradient = jax.value_and_grad(self.loss)(train, frozen, params)
            updates, state = self.optimizer.update(gradient, state, train)
            return optax.apply_updates(train, updates), state, loss, gradient

        if self.mesh is None:
            return jax.jit(step)
        train, _ = lr.partition(self.adapters)
        trained, state = jax.tree.map(lambda x: x.sharding, (train, self.start(train)))
        return jax.jit(step, out_shardings=(trained, state, None, trained))


case_of = functools.cache(Case)


def cases(rows: Sequence[Row] = tuple(METHODS)) -> Iterator[Case]:
    """Every method on every kind of site and in every layout.

    Where a row says ``everywhere``, all of it through both bridges. Otherwise the mixed model, which has every kind of site, in every
    layout, and einsums with several in and out axes, the bridges taking turns.
    """
    for number, row in enumerate(rows):
        kinds = KINDS if row.everywhere else ("general",)
        matrix = [(kind, "plain") for kind in kinds] + [("mixed", layout) for layout in LAYOUTS]
        for n, (kind, layout) in enumerate(matrix):
            for bridge in BRIDGES if row.everywhere else [BRIDGES[(n + number) % 2]]:
                yield case_of(row, bridge, kind, layout)


@functools.cache
def _moved_leaves(row: Row, kind: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    adapters = case_of(row, "linen", kind, "plain").adapters
    random = np.random.default_rng(seed)

    def move(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return (
            leaf + 0.3 * random.standard_normal(leaf.shape).astype(leaf.dtype)
            if np.issubdtype(leaf.dtype, np.floating)
            else leaf
        )

    return jax.tree.map(move, adapters.sites), jax.tree.map(move, adapters.shared)


@functools.cache
def _target(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)
