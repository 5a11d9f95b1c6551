"""A Llama asked for losses: those of its logits, a chunk of tokens at a time, adapters on the head included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_weights import random_params

import lowrank_jax as lr
from lowrank_jax import models
from lowrank_jax.models import LlamaConfig
from train.tasks import causal_lm

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 11)))
BATCH = {"tokens": TOKENS, "loss_mask": jnp.arange(11) < jnp.array([[11], [8]])}


def case(tied: bool, method: lr.Method, chunk: int):
    config = LlamaConfig.tiny(tie_word_embeddings=tied, scan_layers=True, loss_chunk=chunk)
    params = random_params(config)
    head = "embed_tokens" if tied else "lm_head"
    found = lr.linen.sites(models.build(config), params, TOKENS)
    plan = lr.plan(params, {f"{head}/.*": method, "layers/.*/(q_proj|up_proj)": lr.lora(rank=2)}, sites=found)
    adapters = lr.init(jax.random.key(0), params, plan)
    # Away from the start, where half of the gradients are zero.
    adapters = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), adapters)
    return models.build(config), params, adapters


def plain(model, params, adapters):
    logits = lr.linen.apply(model, params, adapters, TOKENS)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:])
    return jnp.sum(losses * BATCH["loss_mask"][:, 1:])


def ours(model, params, adapters):
    task = causal_lm()
    return task.loss(task.logits(lr.linen.adapted(model, adapters), {"params": params}, BATCH, None), BATCH)[0]


@pytest.mark.parametrize("method", [lr.lora(rank=3), lr.dora(rank=3), lr.full()], ids=lambda m: m.name)
@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_gradients_with_an_adapted_head(tied, method):
    if tied and method.name == "dora":
        method = lr.lamda(rank=3, init="svd_zero")
    model, params, adapters = case(tied, method, chunk=6)
    value = jax.jit(jax.value_and_grad(lambda p, a, f: f(model, p, a), (0, 1)), static_argnums=2)
    (expected, gradients), (loss, found) = (value(params, adapters, f) for f in (plain, ours))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients[1].sites))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), found, gradients)
    head = next(path for path in adapters.sites if "layers" not in path)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(gradients[1].sites[head]))


def test_dropout_on_the_head_draws_anew_in_every_chunk():
    model, params, adapters = case(False, lr.lora(rank=3, dropout=0.5), chunk=2)
    same = jnp.zeros_like(TOKENS)
    losses = lr.linen.apply(model, params, adapters, same, targets=same, rngs={"dropout": jax.random.key(1)})
    assert len(np.unique(np.round(losses[0], 5))) > 5


def test_compiled_gradient_never_holds_the_logits():
    config = LlamaConfig.tiny(vocab_size=8192, hidden_size=32, num_hidden_layers=1)
    batch = {"tokens": jnp.zeros((16, 64), jnp.int32), "loss_mask": jnp.ones((16, 64), bool)}

    def temporaries(chunk: int) -> int:
        model, task = models.build(dataclasses.replace(config, loss_chunk=chunk)), causal_lm()

        def loss(params):
            return task.loss(task.logits(model.apply, {"params": params}, batch, None), batch)[0]

        compiled = jax.jit(jax.grad(loss)).lower(models.param_shapes(config)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 16 * 64 * 8192 * 4
    assert temporaries(0) > logits > 2 * temporaries(64)


@pytest.mark.parametrize("extra", [{"return_hidden": True}, {"logits_at": jnp.array([1, 1])}])
def test_targets_with_what_they_exclude_are_refused(extra):
    model = models.build(LlamaConfig.tiny())
    with pytest.raises(ValueError, match="targets"):
        jax.eval_shape(lambda: model.apply({"params": random_params(model.config)}, TOKENS, targets=TOKENS, **extra))


def test_a_negative_chunk_is_refused():
    with pytest.raises(models.ModelConfigError, match="loss_chunk"):
        LlamaConfig.tiny(loss_chunk=-1)
