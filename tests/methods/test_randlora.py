"""RandLoRA: full rank from scaled random products, without a dense update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, training

import lowrank_jax as lr
from lowrank_jax.forms import Call


def moved(adapters, seed=0):
    random = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(random.standard_normal(x.shape), jnp.float32)  # noqa: E731
    return adapters.replace(sites=jax.tree.map(draw, adapters.sites))


@pytest.mark.parametrize("shape", [(64, 80), (80, 64), (64, 64)])
def test_the_update_has_full_rank(shape):
    """With r = 16. One pair of vectors, as VeRA has, or one ``b`` for all bases gives 16."""
    form = lr.expand(moved(adapt(kernel(*shape), lr.randlora(rank=16))))[PATH].as_low_rank()
    a, mid, b = (np.asarray(x, np.float64) for x in (form.a, form.mid, form.b))  # the least singular values are small
    assert np.linalg.matrix_rank((a * mid) @ b) == 64


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
def test_it_is_what_peft_computes(shape):
    """With torch's layouts: A ``[r, 1, m]``, B ``[d, n, r]``, lambda ``[r, n]``, gamma ``[n, m]``, both flattened as they lie."""
    n_in, n_out = shape
    rank, m, d, n = 2, 6, max(shape), 3
    random = np.random.default_rng(0)
    a, b = random.standard_normal((rank, 1, 7)), random.standard_normal((11, 4, rank))  # of wider weights
    lam, gam = random.standard_normal((rank, n)), random.standard_normal((n, m))
    right = b[:d, :n].reshape(d, n * rank)
    left = (lam[:, :, None] * a[:, :, :m] * gam).reshape(rank * n, m)
    torch_delta = right @ left if n_in == m else left.T @ right.T  # [out, in]

    params = {"layer": {"kernel": jnp.zeros(shape)}, "wide": {"kernel": jnp.zeros((7, 11))}}
    plan = lr.plan(params, {".*": lr.randlora(rank=rank, alpha=3 * rank, store=True)})
    adapters = lr.init(jax.random.key(0), params, plan)
    (name,) = adapters.shared
    assert jax.tree.map(jnp.shape, adapters.shared[name]) == {"a": (rank, 7), "b": (11, 4, rank)}
    given = {"lam": jnp.asarray(lam.T, jnp.float32), "gam": jnp.asarray(gam, jnp.float32)}
    adapters = adapters.replace(
        sites={**adapters.sites, PATH: given},
        shared={name: {"a": jnp.asarray(a[:, 0], jnp.float32), "b": jnp.asarray(b, jnp.float32)}},
    )
    np.testing.assert_allclose(delta(adapters, kernel(*shape)), 3 * torch_delta.T, atol=1e-4)


def test_where_it_starts():
    weight = kernel(60, 90)
    adapters = adapt(weight, lr.randlora(rank=32))
    p = leaves_of(adapters)
    assert p["lam"].shape == (2, 32) and not p["lam"].any()
    assert p["gam"].shape == (2, 60) and (p["gam"] == np.float32(1 / 60)).all()
    (shared,) = adapters.shared.values()
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), shared) == {"seed": ((2,), "uint32")}
    assert lr.expand(adapters)[PATH].scale == 20
    history = [leaves_of(a) for a in training(adapters, weight, optax.adamw(1e-3), 3)]
    assert (history[3]["lam"] != p["lam"]).all() and (history[3]["gam"] != p["gam"]).all()


@pytest.mark.parametrize(
    ("entries", "density"), [("uniform", 1.0), ("sparse", 1 / 3), ("very_sparse", 256**-0.5)], ids=lambda x: str(x)[:7]
)
@pytest.mark.parametrize("store", [False, True])
def test_entries_have_variance_one(entries, density, store):
    adapters = adapt(kernel(256, 300), lr.randlora(rank=64, entries=entries, store=store))
    form = lr.expand(adapters)[PATH]
    pair = form.replace(lam=jnp.ones_like(form.lam), gam=jnp.ones_like(form.gam)).as_low_rank()
    for factor in (np.asarray(pair.a)[:, :64], np.asarray(pair.b)):
        error = 5 * (factor.size * density) ** -0.5
        assert abs((factor != 0).mean() - density) <= error * density
        assert abs(factor.mean()) < 5 * factor.size**-0.5 and abs(factor.var() - 1) < 2 * error
        assert entries == "uniform" or set(np.abs(factor[factor != 0])) == {np.float32(density**-0.5)}


def test_weights_share_their_bases():
    """Equal vectors give equal updates: no weight has bases of its own."""
    params = {name: {"kernel": jnp.zeros((8, 8))} for name in "qv"}
    adapters = moved(lr.init(jax.random.key(0), params, lr.plan(params, {".*": lr.randlora(rank=4)})))
    adapters = adapters.replace(sites=dict.fromkeys(adapters.sites, adapters.sites["q/kernel"]))
    q, v = (np.asarray(form.delta(jnp.zeros((8, 8)))) for form in lr.expand(adapters).values())
    assert (q == v).all() and q.any()


@pytest.mark.parametrize("at_once", [32, 128])
def test_no_dense_update_is_ever_whole(at_once):
    """One 1024 x 1024 weight, whose 32 bases together are as large as itself: 4 MiB."""
    weight, x = jnp.zeros((1024, 1024)), jnp.zeros((16, 1024))
    train, frozen = lr.partition(adapt(weight, lr.randlora(rank=32, at_once=at_once)))

    def factored(train):
        form = lr.expand(lr.join(train, frozen))[PATH]
        return (form.apply(Call("dense", x, jnp.zeros_like(x), weight, jnp.matmul)) ** 2).sum()

    def densely(train):
        return ((x @ lr.expand(lr.join(train, frozen))[PATH].delta(weight)) ** 2).sum()

    temporary = [
        jax.jit(jax.grad(f)).lower(train).compile().memory_analysis().temp_size_in_bytes for f in (factored, densely)
    ]
    assert temporary[0] < (32 + at_once) * 2**14 < 4 * 2**20 < temporary[1]


@pytest.mark.parametrize("fields", [{"rank": 0}, {"dropout": 1.0}, {"entries": "normal"}, {"at_once": 0}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}="):
        lr.randlora(**fields)
