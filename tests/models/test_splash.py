"""Splash attention, interpreted on the CPU: outputs and gradients are those of the plain attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_params

from lowrank_jax import models
from lowrank_jax.models import BertConfig, LlamaConfig, ModelConfigError, llama
from lowrank_jax.models.splash import splash_attention

CONFIG = LlamaConfig.tiny(head_dim=128, num_hidden_layers=1)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 130)))


def gradient(config, window, **kwargs):
    config = dataclasses.replace(config, sliding_window=window)
    model, params = models.build(config), random_params(dataclasses.replace(config, attention_implementation=None))

    def loss(params):
        losses = model.apply({"params": params}, TOKENS, targets=jnp.roll(TOKENS, -1, 1), **kwargs)
        return jnp.where(kwargs.get("attention_mask", True), losses, 0).sum(), losses

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize(
    ("window", "kwargs"),
    [
        (None, {"segment_ids": jnp.where(jnp.arange(130) < 50, 1, 2) * jnp.ones((2, 1), jnp.int32)}),
        (20, {"attention_mask": jnp.arange(130) < jnp.array([[130], [90]])}),
    ],
)
def test_outputs_and_gradients_are_those_of_plain_attention(monkeypatch, window, kwargs):
    (_, expected), wanted = gradient(CONFIG, window, **kwargs)
    monkeypatch.setattr(llama, "splash_attention", functools.partial(splash_attention, interpret=True))
    splash = dataclasses.replace(CONFIG, attention_implementation="splash", remat="adapter")
    (_, found), got = gradient(splash, window, **kwargs)
    real = np.broadcast_to(kwargs.get("attention_mask", True), TOKENS.shape)
    np.testing.assert_allclose(found[real], expected[real], atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(b).max() + 1)), got, wanted)


def test_where_splash_attention_does_not_apply():
    with pytest.raises(ModelConfigError, match="causal"):
        BertConfig.tiny(attention_implementation="splash")
    config = dataclasses.replace(CONFIG, attention_implementation="splash", sliding_window=4)
    with pytest.raises(ValueError, match="positions"):
        models.build(config).apply({"params": random_params(CONFIG)}, TOKENS, positions=jnp.zeros_like(TOKENS))


def test_decoding_with_a_cache_needs_no_kernel():
    plain, splash = (
        models.build(dataclasses.replace(CONFIG, attention_implementation=name)) for name in (None, "splash")
    )
    params, cache = random_params(CONFIG), models.init_cache(CONFIG, 2, 8)
    out = [m.apply({"params": params}, TOKENS[:, :4], cache=cache)[0] for m in (plain, splash)]
    np.testing.assert_array_equal(*out)
