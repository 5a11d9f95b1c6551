"""What holds of every shape and type: merged and applied are one map, folding can be undone, and files keep every bit."""

from __future__ import annotations

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import FACTORED, method, plans

import lowrank_jax as lr
from lowrank_jax.adapters import Adapters
from lowrank_jax.checkpoint import Base, load_adapter, save_adapter
from lowrank_jax.forms.base import Call
from lowrank_jax.sites import flatten

# Few sizes, as XLA compiles every operation anew for every shape.
_SIZES = st.sampled_from((1, 2, 5))


def _leaves(plan: lr.Plan, make) -> Adapters:
    """An adapter of this plan with leaves of whatever numbers ``make(shape, leaf)`` gives."""
    sites = {
        e.site.path: {name: make((*e.local.batch_shape, *leaf.shape), leaf) for name, leaf in e.leaves.items()}
        for e in plan.entries
    }
    return Adapters(sites, {}, plan)


@st.composite
def _cases(draw):
    """One weight, alone or in a stack, in float32, and an adapter with random leaves."""
    n_in, n_out, stack = draw(_SIZES), draw(_SIZES), draw(st.sampled_from(((), (3,))))
    dice = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def number(shape, leaf=None):
        return jnp.asarray(dice.uniform(0.5, 1.5, shape) * dice.choice((-1, 1), shape), jnp.float32)

    params = {"x": {"kernel": number((*stack, n_in, n_out))}}
    sites = lr.sites(params, {"x": "b" * len(stack) + "io"})
    rule = method(draw, min(n_in, n_out), FACTORED)
    layers = draw(st.sets(st.integers(0, 2), min_size=1)) if stack else None
    plan = lr.plan(params, {"x": lr.on_layers(rule, sorted(layers)) if layers else rule}, sites=sites)
    return params, _leaves(plan, number), number((*stack, 4, n_in))


def _outputs(params, adapters, x):
    kernel = params["x"]["kernel"]
    (form,) = lr.expand(adapters).values()
    with jax.default_matmul_precision("highest"):
        call = Call("dense", x, x @ kernel, kernel, lambda x, w: x @ w)
        return np.asarray(form.apply(call)), np.asarray(x @ lr.merge(params, adapters)["x"]["kernel"])


@settings(max_examples=30)
@given(_cases())
def test_merged_and_applied_are_one_map_and_folding_can_be_undone(case):
    params, adapters, x = case
    applied, merged = _outputs(params, adapters, x)
    np.testing.assert_allclose(applied, merged, rtol=1e-5, atol=1e-5 * np.abs(merged).max())

    base, folded = lr.fold(params, adapters)
    for again in _outputs(base, folded, x):
        np.testing.assert_allclose(again, merged, rtol=1e-5, atol=1e-5 * np.abs(merged).max())
    back, unfolded = lr.unfold(base, folded)
    for name, leaf in flatten(adapters.sites).items():
        np.testing.assert_array_equal(flatten(unfolded.sites)[name], leaf, err_msg=name)
    assert unfolded.plan == adapters.plan and not unfolded.folded
    np.testing.assert_allclose(back["x"]["kernel"], params["x"]["kernel"], rtol=1e-5, atol=1e-5)


@given(plans(), st.sampled_from((jnp.float32, jnp.bfloat16, jnp.float16)), st.integers(0, 2**32 - 1))
def test_a_file_keeps_every_bit_of_every_type(case, dtype, seed):
    tree, plan = case
    dice = np.random.default_rng(seed)

    def bits(shape, leaf):  # infinities, subnormal numbers and NaNs of all kinds among them
        kind = jnp.dtype(leaf.dtype or dtype)
        return np.frombuffer(dice.bytes(int(np.prod(shape)) * kind.itemsize), kind).reshape(shape)

    adapters = _leaves(plan, bits)
    with tempfile.TemporaryDirectory() as place:
        where = save_adapter(f"{place}/adapter", adapters, Base("any", "0"))
        again = load_adapter(where, tree)
    assert again.plan == plan
    assert flatten(again.sites).keys() == flatten(adapters.sites).keys()
    for name, leaf in flatten(adapters.sites).items():
        got = np.asarray(flatten(again.sites)[name])
        assert (got.shape, got.dtype, got.tobytes()) == (leaf.shape, leaf.dtype, leaf.tobytes()), name
