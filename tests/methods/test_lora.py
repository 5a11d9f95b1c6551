"""LoRA: scales, starting values, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, kernel, leaves_of

import lowrank_jax as lr
from lowrank_jax.forms import Call

K = kernel(400, 300)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"rank": 4}, 1),
        ({"rank": 4, "alpha": 8}, 2),
        ({"rank": 16, "alpha": 8, "rank_stabilised": True}, 2),
        ({"rank": 16, "rank_stabilised": True}, 4),
    ],
)
def test_scale(fields, scale):
    assert lr.expand(adapt(K, lr.lora(**fields)))[PATH].scale == scale


def test_kaiming_init_is_uniform_and_b_is_zero():
    p, bound = leaves_of(adapt(K, lr.lora(rank=8))), 400**-0.5
    assert not p["b"].any()
    assert 0.98 * bound < np.abs(p["a"]).max() <= bound
    assert abs(p["a"].mean()) < 0.05 * bound
    np.testing.assert_allclose(p["a"].std(), bound / 3**0.5, rtol=0.03)


def test_gaussian_init_has_deviation_one_over_rank():
    a = leaves_of(adapt(K, lr.lora(rank=8, init="gaussian")))["a"]
    np.testing.assert_allclose(a.std(), 1 / 8, rtol=0.05)
    assert np.abs(a).max() > 3 / 8


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    form = lr.expand(adapt(K, lr.lora(rank=8, dropout=0.25)))[PATH].replace(b=kernel(8, 300))
    x = kernel(1, 400, seed=5)
    call = Call("dense", x, jnp.zeros((1, 300)), K, jnp.matmul)
    plain = form.apply(call)
    np.testing.assert_allclose(plain, x @ form.delta(K), rtol=1e-4, atol=1e-4)
    dropped = jax.vmap(lambda key: form.apply(call._replace(rng=key)))(jax.random.split(jax.random.key(0), 2000))
    spread = dropped.std(0) / 2000**0.5
    assert (np.abs(dropped.mean(0) - plain) < 5 * spread).all()
    assert float(dropped.std()) > 0.1


@pytest.mark.parametrize("fields", [{"init": "xavier"}, {"dropout": 1.0}, {"dropout": -0.1}, {"rank": 0}, {"rank": -2}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}="):
        lr.lora(**fields)


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(TypeError, match="lora has no field 'aplha'; did you mean 'alpha'"):
        lr.lora(aplha=4)


def test_positional_and_named_fields_make_the_same_method():
    assert lr.lora(4, 8) == lr.lora(alpha=8, rank=4) != lr.lora(rank=4)
    assert lr.build("lora", dict(lr.lora(4, 8).config)) == lr.lora(4, 8)
