"""Abstract adapters have the shapes of real ones, and a topology that cannot be is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lr
from lowrank_jax.memory import TopologyError, abstract_adapters, compile_report, topology_mesh


@pytest.mark.parametrize(
    "method", [lr.lora(rank=2), lr.lamda(rank=3), lr.pissa(rank=2), lr.lora_xs(rank=2), lr.full()], ids=lambda m: m.name
)
def test_abstract_adapters_are_shaped_like_real_ones(method):
    params = {"layers": {"kernel": jax.random.normal(jax.random.key(0), (2, 6, 8)), "bias": jnp.zeros((2, 8))}}
    plan = lr.plan(params, {"layers/kernel": method})
    real, abstract = lr.init(jax.random.key(1), params, plan), abstract_adapters(plan)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(real.sites) == shapes(abstract.sites)


def test_a_donated_argument_is_not_counted_twice():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    step = lambda x: x + 1  # noqa: E731
    assert compile_report(step, [x], donate=[0]).peak == 256 * 256 * 4
    assert compile_report(step, [x]).peak == 2 * 256 * 256 * 4


def test_a_topology_that_cannot_be_is_refused():
    # Without libtpu the message says what to install; with it, that there is no such topology.
    with pytest.raises(TopologyError, match="libtpu|no topology"):
        topology_mesh("v99:3x7", {"data": 1})
