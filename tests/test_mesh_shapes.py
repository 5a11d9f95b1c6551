"""Twenty updates on every division of eight devices end where one device's do.

Every method of the conformance table takes a turn with the ten divisions, LaMDA takes all, the bridges taking turns too;
``--every-mesh`` runs every method on every division.
"""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
import optax
import pytest
from conformance_case import case_of
from conformance_methods import METHODS
from conformance_models import BRIDGES

import lowrank_jax as lr
from lowrank_jax.forms import base

STEPS = 20
DIVISIONS = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(sizes) == 8]
ALWAYS = ("lamda",)


def pytest_generate_tests(metafunc):
    every = metafunc.config.getoption("--every-mesh")
    chosen = [
        (row, BRIDGES[(number // len(DIVISIONS) + n) % 2], sizes)
        for number, row in enumerate(METHODS)
        for n, sizes in enumerate(DIVISIONS)
        if every or row.name in ALWAYS or n == number % len(DIVISIONS)
    ]
    ids = [f"{row.name}-{bridge}-{'x'.join(map(str, sizes))}" for row, bridge, sizes in chosen]
    metafunc.parametrize(("row", "bridge", "sizes"), chosen, ids=ids)


@pytest.fixture(autouse=True)
def divide_everything(monkeypatch):
    """The models are so small that their leaves would be copied to every device."""
    monkeypatch.setattr(base, "REPLICATED_BELOW", 1)


def test_twenty_updates_agree_with_one_device(row, bridge, sizes):
    loss, train = _run(row, bridge, sizes)
    one_loss, one = _run(row, bridge, None)
    assert loss == pytest.approx(one_loss, rel=1e-5)
    assert len(set(one_loss)) > STEPS / 2  # it learns
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(train), jax.tree.leaves(one), strict=True):
        scale = max(np.abs(want).max(), 1e-3)
        assert np.abs(np.asarray(got, np.float64) - want).max() <= 1e-4 * scale, path


@functools.lru_cache(maxsize=4)
def _run(row, bridge, sizes):
    """Losses and trained leaves; ``sizes`` None: on one device."""
    case = case_of(row, bridge, "mixed", "remat") if sizes is None else case_of(row, bridge, "mixed", "mesh", sizes)
    # Adam divides by the gradient's size: an eps above rounding keeps what should not move from moving by rounding's sign.
    tx = lr.optim.with_methods(optax.adamw(1e-2, eps=1e-3, weight_decay=0.1), case.plan, total_steps=STEPS)
    assert case.signals is not None  # made here, not inside the trace
    (train, frozen), losses = lr.partition(case.moved()), []
    state = case.start(train, tx)

    def step(train, state, frozen, params):
        loss, gradient = jax.value_and_grad(case.loss)(train, frozen, params)
        updates, state = tx.update(gradient, state, train)
        return optax.apply_updates(train, updates), state, loss

    pinned, of_state = (None if sizes is None else jax.tree.map(lambda x: x.sharding, tree) for tree in (train, state))
    step = jax.jit(step, out_shardings=(pinned, of_state, None))
    for _ in range(STEPS):
        train, state, loss = step(train, state, frozen, case.model.params)
        losses.append(float(loss))
    if sizes is not None:
        assert jax.tree.map(lambda x: x.sharding, train) == pinned
    return losses, jax.tree.map(lambda x: np.asarray(x, np.float64), train)
