"""MoSA: experts differ from the start on their own entries only, whatever the optimizer does, and together they are the adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import PATH, adapt, kernel, params_of

import lowrank_jax as lr
from lowrank_jax import seeded
from lowrank_jax.forms import Call
from lowrank_jax.methods.mosa import owners

N_IN, N_OUT, WIDTH, EXPERTS = 12, 10, 6, 3
K, BIAS, X = kernel(N_IN, N_OUT), kernel(N_OUT, seed=1), kernel(7, N_IN, seed=2)
CALL = Call("dense", X, X @ K + BIAS, K, jnp.matmul, None, BIAS)


def mosa(**fields):
    return lr.mosa(**{"width": WIDTH, "experts": EXPERTS, "dropout": 0.0, "scale": 1.0, **fields})


def trained(method, steps=20):
    """After steps of two forward passes each, with weight decay and momentum."""
    adapters = adapt(K, method)
    train, frozen = lr.partition(adapters)
    tx = lr.optim.with_methods(optax.adamw(1e-2, weight_decay=0.5), adapters.plan, steps)

    def loss(train, key):
        outputs = [lr.expand(lr.join(train, frozen), k)[PATH].apply(CALL) for k in jax.random.split(key)]
        return jnp.mean((outputs[0] - kernel(7, N_OUT, seed=3)) ** 2) + lr.symmetric_kl(*outputs)

    @jax.jit
    def step(train, state, key):
        updates, state = tx.update(jax.grad(loss)(train, key), state, train)
        return optax.apply_updates(train, updates), state

    state = tx.init(train)
    for n in range(steps):
        train, state = step(train, state, jax.random.key(n))
    return adapters, lr.join(train, frozen)


def drawn(adapters, name, draws=60):
    """The distinct factors that training steps act with, and how often each is drawn."""
    expand = jax.jit(jax.vmap(lambda key: getattr(lr.expand(adapters, key)[PATH], name)))
    every = np.asarray(expand(jax.random.split(jax.random.key(5), draws)))
    return np.unique(every, axis=0, return_counts=True)


@pytest.mark.parametrize("share", ["down", "up", None])
def test_experts_keep_to_their_entries_and_add_up(share):
    before, after = trained(mosa(share=share))
    merged, start = lr.expand(after)[PATH], lr.expand(before)[PATH]
    for name in ("down", "up"):
        experts, counts = drawn(after, name)
        whole, first = np.asarray(getattr(merged, name)), np.asarray(getattr(start, name))
        if name == share:
            assert len(experts) == 1 and (experts[0] == whole).all()
            continue
        assert len(experts) == EXPERTS and counts.min() > 6
        changed = experts != first
        # Every entry belongs to one expert and has moved there; sizes are equal.
        assert (changed.sum(0) == 1).all()
        assert {int(c.sum()) for c in changed} == {first.size // EXPERTS}
        np.testing.assert_allclose(first + (experts - first).sum(0), whole, rtol=0, atol=1e-6)
        if name == "down":  # the release's "add" would count the start once for each expert
            assert np.abs(experts.sum(0) - whole).max() > np.abs(first).max()


def test_one_expert_is_the_plain_adapter():
    _, after = trained(mosa(experts=1, share=None))
    plain = lr.expand(lr.compact(after))[PATH]
    assert lr.compact(after).plan.entries[0].method == lr.bottleneck(
        width=WIDTH, reduction=12, scale=1.0, init="zero_up"
    )
    for key in (None, jax.random.key(0)):
        assert (lr.expand(after, key)[PATH].apply(CALL) == plain.apply(CALL)).all()


def test_counts_as_the_plain_adapter():
    plain = lr.bottleneck(width=WIDTH)
    assert adapt(K, mosa(experts=4)).plan.trainable == adapt(K, plain).plan.trainable


@pytest.mark.parametrize(("shape", "experts"), [((8, 6), 4), ((7, 5), 4), ((3,), 5), ((64, 64), 2)])
def test_entries_are_dealt_out_evenly_and_at_random(shape, experts):
    seed = jnp.array([1, 2], jnp.uint32)
    dealt = np.asarray(owners(seed, shape, experts))
    sizes = np.bincount(dealt.ravel(), minlength=experts)
    assert dealt.shape == shape and sizes.max() - sizes.min() <= 1
    assert (np.asarray(owners(seed, shape, experts)) == dealt).all()
    if dealt.size > 100:
        other = np.asarray(owners(jnp.array([1, 3], jnp.uint32), shape, experts))
        # Independent deals agree in half of 2048 pairs, five standard deviations either way.
        assert abs((other == dealt).mean() - 0.5) < 5 * 0.5 / 2048**0.5
        assert abs(dealt[:, ::2].mean() - 0.5) < 5 * 0.5 / 2048**0.5


def test_sites_layers_and_factors_draw_for_themselves():
    params = {name: {"kernel": kernel(2, N_IN, N_OUT), "bias": jnp.zeros((2, N_OUT))} for name in ("one", "two")}
    adapters = lr.init(jax.random.key(0), params, lr.plan(params, {".*": mosa(share=None)}))
    adapters = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, adapters)
    whole = lr.expand(adapters)

    def expert(now, all_of_it, seed):
        """Which expert a factor acts with: the one whose entries are all there."""
        owner = owners(seed, now.shape, EXPERTS)
        return jnp.argmax(jnp.stack([((now == all_of_it) | (owner != e)).all() for e in range(EXPERTS)]))

    def which(key):
        return jnp.stack([
            expert(getattr(form, name)[layer], getattr(whole[path], name)[layer],
                   seeded.fold(adapters.sites[path]["seed"][layer], n))
            for path, form in lr.expand(adapters, key).items() for n, name in enumerate(("down", "up")) for layer in range(2)
        ])  # fmt: skip

    draws = np.asarray(jax.jit(jax.vmap(which))(jax.random.split(jax.random.key(1), 300)))
    assert draws.shape == (300, 8)
    frequency = np.stack([np.bincount(column, minlength=EXPERTS) for column in draws.T]) / 300
    assert np.abs(frequency - 1 / 3).max() < 5 * (2 / 9 / 300) ** 0.5
    agree = np.array([(a == b).mean() for n, a in enumerate(draws.T) for b in draws.T[:n]])
    assert np.abs(agree - 1 / 3).max() < 5 * (2 / 9 / 300) ** 0.5


def test_starts_at_the_base_with_a_uniform_input_side():
    adapters = adapt(kernel(300, 200), mosa(width=50, position="parallel"))
    p = adapters.sites[PATH]
    assert 0.98 * 300**-0.5 < np.abs(p["down"]).max() <= 300**-0.5 and abs(np.mean(p["down"])) < 0.02 * 300**-0.5
    assert not any(np.asarray(p[name]).any() for name in ("up", "down_bias", "up_bias"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 0}, r"mosa\(experts=0\)"),
        ({"share": "both"}, r"mosa\(share='both'\): expected one of"),
        ({"activation": "mish"}, r"mosa\(activation='mish'\): expected one of"),
        ({"position": "before"}, r"mosa\(position='before'\): expected one of"),
        ({"width": 0}, r"mosa\(width=0\)"),
        ({"dropout": 2.0}, r"mosa\(dropout=2.0\)"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        lr.mosa(**fields)


def test_a_linear_mixture_merges():
    adapters = adapt(K, mosa(activation=None, bias=False))
    assert lr.merge(params_of(K), adapters)["layer"]["kernel"].shape == K.shape
