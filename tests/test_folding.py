"""Merging and folding: float32 sums, refusals, bits that stay."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, kernel, params_of

import lowrank_jax as lr
from lowrank_jax.folding import add_low_rank
from lowrank_jax.forms import UnsupportedError

PARAMS = {"one": {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((16, 12)), jnp.float32)}}


def moved(method, params=PARAMS, amount=0.05, pattern=".*"):
    adapters = lr.init(jax.random.key(0), params, lr.plan(params, {pattern: method}))
    return jax.tree.map(
        lambda x: x + amount * jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), x.dtype), adapters
    )


def test_a_bf16_merge_sums_in_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    adapters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), moved(lr.lora(4, 12)))
    p = {n: np.asarray(x, np.float64) for n, x in adapters.sites["one/kernel"].items()}
    exact = np.asarray(params["one"]["kernel"], np.float64) + 3 * p["a"] @ p["b"]
    merged = lr.merge(params, adapters)["one"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    half_ulp = 0.5 * 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    assert (np.abs(np.asarray(merged, np.float64) - exact) <= 1.001 * half_ulp).all()
    # The control: the same sum in bfloat16 breaks that bound.
    a, b = adapters.sites["one/kernel"]["a"], adapters.sites["one/kernel"]["b"]
    naive = np.asarray(params["one"]["kernel"] + (3 * (a @ b)).astype(jnp.bfloat16), np.float64)
    assert (np.abs(naive - exact) > 1.001 * half_ulp).any()


def test_small_updates_survive_a_float32_merge_of_a_bf16_adapter():
    adapters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), moved(lr.lora(4)))
    p = {n: np.asarray(x, np.float64) for n, x in adapters.sites["one/kernel"].items()}
    merged = lr.merge(PARAMS, adapters)["one"]["kernel"]
    np.testing.assert_allclose(merged, np.asarray(PARAMS["one"]["kernel"], np.float64) + p["a"] @ p["b"], atol=1e-6)


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_nonfinite_refuses_everything(where):
    params, adapters = PARAMS, moved(lr.pissa(2))
    if where == "base":
        params = {"one": {"kernel": PARAMS["one"]["kernel"].at[0, 0].set(jnp.inf)}}
    else:
        adapters.sites["one/kernel"]["a0"] = adapters.sites["one/kernel"]["a0"].at[0, 0].set(jnp.nan)
    for use in (lr.merge, lr.fold):
        with pytest.raises(ValueError, match="one/kernel: the merged weight is not finite.*nothing was merged"):
            use(params, adapters)


def test_merging_does_not_accumulate():
    adapters = moved(lr.lora(2))
    one, two = lr.merge(PARAMS, adapters), lr.merge(PARAMS, adapters)
    assert (one["one"]["kernel"] == two["one"]["kernel"]).all()
    assert jax.tree.structure(one) == jax.tree.structure(PARAMS)


def test_fold_and_unfold():
    adapters = moved(lr.lamda(3, 6))
    before = np.array(PARAMS["one"]["kernel"])
    params, folded = lr.fold(PARAMS, adapters)
    assert (np.asarray(PARAMS["one"]["kernel"]) == before).all()
    np.testing.assert_allclose(
        lr.merge(params, folded)["one"]["kernel"], lr.merge(PARAMS, adapters)["one"]["kernel"], atol=1e-5
    )
    back, unfolded = lr.unfold(params, folded)
    np.testing.assert_allclose(back["one"]["kernel"], before, atol=1e-6)
    assert not unfolded.folded
    with pytest.raises(ValueError, match="folded already"):
        lr.fold(params, folded)
    with pytest.raises(ValueError, match="not folded"):
        lr.unfold(PARAMS, adapters)


def test_a_method_without_anchor_folds_to_itself():
    adapters = moved(lr.lora(2))
    params, folded = lr.fold(PARAMS, adapters)
    assert params["one"]["kernel"] is PARAMS["one"]["kernel"] and folded.folded


def test_stacks_are_refused():
    stacked = lr.stack([moved(lr.pissa(2))] * 2)
    with pytest.raises(UnsupportedError, match="merge takes one adapter; pick one"):
        lr.merge(PARAMS, stacked)
    with pytest.raises(UnsupportedError, match="cannot be folded"):
        lr.fold(PARAMS, stacked)


def test_merging_works_under_jit():
    adapters = moved(lr.lamda(2))
    jitted = jax.jit(lr.merge)(PARAMS, adapters)["one"]["kernel"]
    np.testing.assert_allclose(jitted, lr.merge(PARAMS, adapters)["one"]["kernel"], atol=1e-6)


@pytest.mark.parametrize("compute", [jnp.bfloat16, jnp.float16])
def test_half_precision_models_run_near_their_merged_selves(compute):
    """The output keeps the model's dtype, and agrees as well as that dtype can."""
    model = nn.Dense(12, name="one", use_bias=False, dtype=compute, param_dtype=compute)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((5, 16)), compute)
    params = {"kernel": PARAMS["one"]["kernel"].astype(compute)}
    adapters = moved(lr.lora(4), params, amount=0.3)
    got = lr.linen.apply(model, params, adapters, x)
    wide = x.astype(jnp.float32) @ lr.merge({"kernel": params["kernel"].astype(jnp.float32)}, adapters)["kernel"]
    assert got.dtype == compute
    eps = float(jnp.finfo(compute).eps)
    assert np.abs(np.asarray(got, np.float32) - wide).max() <= 4 * eps * np.abs(wide).max()


def test_full_on_some_layers_leaves_the_others_alone():
    params = {"layers": {"kernel": jnp.arange(24.0).reshape(3, 4, 2), "bias": jnp.zeros((3, 2))}}
    adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layers/kernel": lr.on_layers(lr.full(), [1])}))
    moved = jax.tree.map(lambda x: x + 1, adapters)
    change = np.asarray(lr.merge(params, moved)["layers"]["kernel"] - params["layers"]["kernel"])
    assert (change[1] == 1).all() and not change[[0, 2]].any()


@pytest.mark.parametrize(
    "method",
    [lr.lora(4, 12), lr.subspace_update(4), lr.on_layers(lr.lora(2, 7), [1])],
    ids=("lora", "subspace", "layers"),
)
def test_adding_in_a_training_loop_is_merging(method):
    params = params_of(kernel(3, 16, 12))
    adapters = moved(method, params, pattern=PATH)
    added = jax.jit(add_low_rank)(params, adapters)
    np.testing.assert_allclose(
        added["layer"]["kernel"], lr.merge(params, adapters)["layer"]["kernel"], rtol=0, atol=2e-6
    )


def test_adding_refuses_what_is_no_low_rank_product():
    with pytest.raises(UnsupportedError, match="one/kernel: dora is no low-rank update; expected LowRank"):
        add_low_rank(PARAMS, moved(lr.dora(2)))
