"""VeRA: one pair of random matrices for all weights, made of a seed where it is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import kernel

import lowrank_jax as lr
from lowrank_jax.forms import Call

PARAMS = {name: {"kernel": jnp.zeros(shape)} for name, shape in {"q": (12, 10), "v": (12, 10), "up": (12, 30)}.items()}


def vera(**fields):
    return lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, {".*": lr.vera(rank=4, **fields)}))


def deltas(adapters, d, c):
    """Every weight's update with these vectors, cut to size, in float64."""
    given = {p: {"d": jnp.asarray(d), "c": jnp.asarray(c[: leaves["c"].size])} for p, leaves in adapters.sites.items()}
    forms = lr.expand(adapters.replace(sites=given))
    return {p: np.asarray(form.delta(PARAMS[p[:-7]]["kernel"]), np.float64) for p, form in forms.items()}


@pytest.mark.parametrize("store", [False, True])
def test_all_weights_share_the_matrices(store):
    """Equal vectors give equal updates; a wider weight's update begins with the narrower's. A seed for each site would fail both."""
    d, c = np.random.default_rng(0).standard_normal((2, 30)).astype(np.float32)
    found = deltas(vera(store=store), d[:4], c)
    assert (found["q/kernel"] == found["v/kernel"]).all()
    np.testing.assert_allclose(found["up/kernel"][:, :10], found["q/kernel"], atol=1e-6)
    assert np.linalg.matrix_rank(np.hstack([found["q/kernel"], found["up/kernel"]]), tol=1e-5) == 4


def test_the_vectors_act_where_pefts_do():
    """``B (lambda_d * A x) * lambda_b`` with A, B given, as torch lays them out: ``[r, in]`` and ``[out, r]``, sliced from the widest."""
    adapters, random = vera(store=True), np.random.default_rng(1)
    a, b = random.standard_normal((4, 12)), random.standard_normal((30, 4))
    (name,) = adapters.shared
    assert jax.tree.map(jnp.shape, adapters.shared[name]) == {"a": (12, 4), "b": (4, 30)}
    adapters = adapters.replace(shared={name: {"a": jnp.asarray(a.T, jnp.float32), "b": jnp.asarray(b.T, jnp.float32)}})
    d, c, x = random.standard_normal(4), random.standard_normal(30), random.standard_normal(12)
    for path, delta in deltas(adapters, np.float32(d), np.float32(c)).items():
        n_out = PARAMS[path[:-7]]["kernel"].shape[1]
        np.testing.assert_allclose(x @ delta, (b[:n_out] @ (d * (a @ x))) * c[:n_out], atol=1e-4)


def test_where_it_starts():
    adapters = vera(d_initial=0.3)
    assert (np.asarray(adapters.sites["up/kernel"]["d"]) == np.float32(0.3)).all()
    assert not adapters.sites["up/kernel"]["c"].any()
    (shared,) = adapters.shared.values()
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), shared) == {"seed": ((2,), "uint32")}
    params = {"x": {"kernel": jnp.zeros((300, 200))}}
    form = lr.expand(lr.init(jax.random.key(1), params, lr.plan(params, {"x": lr.vera(rank=256)})))["x/kernel"]
    pair = form.replace(gam=jnp.ones_like(form.gam)).as_low_rank()
    for factor, fan_in in ((pair.a, 300), (pair.b, 256)):
        bound = (6 / fan_in) ** 0.5
        assert 0.999 * bound < np.abs(factor).max() < bound
        assert abs(np.var(factor) / (2 / fan_in) - 1) < 0.02
        assert abs(np.mean(factor)) < 0.02 * bound
    assert abs(np.corrcoef(np.ravel(pair.a)[:50000], np.ravel(pair.b)[:50000])[0, 1]) < 0.02


@pytest.mark.parametrize(("rank", "tokens", "limit"), [(256, 8, 5 * 256 * 256), (16, 4096, 16 * 4096 * 256 / 2)])
def test_a_stack_holds_one_copy_of_the_matrices_and_no_inputs(rank, tokens, limit):
    """A gradient through 16 layers of width 256, whose matrices would be 32 x 256 x 256 numbers and inputs 16 x 4096 x 256."""
    params = {"x": {"kernel": jnp.zeros((16, 256, 256)), "bias": jnp.zeros((16, 256))}}
    adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"x/kernel": lr.vera(rank=rank)}))
    train, frozen = lr.partition(adapters)

    def loss(train, x):
        def layer(x, form):
            return x + form.apply(Call("dense", x, jnp.zeros_like(x), jnp.zeros((256, 256)), jnp.matmul)), None

        return jnp.sum(jax.lax.scan(layer, x, lr.expand(lr.join(train, frozen))["x/kernel"])[0] ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(train, kernel(tokens, 256)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * limit


@pytest.mark.parametrize("fields", [{"rank": 0}, {"dropout": 1.0}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"vera\\({next(iter(fields))}="):
        lr.vera(**fields)
