"""The BERT family by itself: heads, layouts, padding, dropout, types."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_params

from lowrank_jax import models
from lowrank_jax.models import BertConfig

TOKENS = jnp.asarray(np.random.default_rng(0).integers(5, 97, (2, 8)))
HEADS = [
    ({"task": "classify", "num_labels": 3}, (2, 3)),
    ({"task": "classify", "num_labels": 3, "classifier_pooling": "mean"}, (2, 3)),
    ({"task": "classify", "num_labels": 3, "architecture": "roberta"}, (2, 3)),
    ({"task": "mlm"}, (2, 8, 97)),
    ({"task": "mlm", "architecture": "roberta"}, (2, 8, 97)),
]


def make(**changes):
    config = BertConfig.tiny(**changes)
    return models.build(config), random_params(config)


@functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def run(model, params, tokens=TOKENS, **kwargs):
    return model.apply({"params": params}, tokens, **kwargs)


@pytest.mark.parametrize(("changes", "shape"), HEADS)
def test_shapes_scan_remat_and_axes(changes, shape) -> None:
    model, params = make(**changes)
    out = run(model, params)
    assert out.shape == shape
    scanned = models.build(dataclasses.replace(model.config, scan_layers=True, remat="dots"))
    np.testing.assert_allclose(run(scanned, models.stack_layers(params)), out, atol=1e-5)


def test_encoder_gives_hidden_states_and_the_pooled_first_token() -> None:
    model, params = make()
    hidden, pooled = run(model, params)
    assert hidden.shape == (2, 8, 64) and pooled.shape == (2, 64)
    expected = jnp.tanh(hidden[:, 0] @ params["pooler"]["kernel"] + params["pooler"]["bias"])
    np.testing.assert_allclose(pooled, expected, atol=1e-5)
    bare, params = make(use_pooler=False)
    assert "pooler" not in params and run(bare, params).pooled is None


def test_parameter_paths_read_well() -> None:
    _, params = make()
    assert params["encoder"]["layers_0"]["attention"]["query"]["kernel"].shape == (64, 64)
    _, params = make(scan_layers=True)
    assert params["encoder"]["layers"]["attention"]["query"]["kernel"].shape == (2, 64, 64)


@pytest.mark.parametrize(("changes", "shape"), HEADS[:3])
def test_padding_changes_no_class(changes, shape) -> None:
    model, params = make(**changes)
    pad = jnp.full((2, 3), model.config.pad_token_id)
    mask = jnp.array([[1] * 8 + [0] * 3] * 2)
    padded = run(model, params, jnp.concatenate([TOKENS, pad], 1), attention_mask=mask)
    np.testing.assert_allclose(padded, run(model, params), atol=1e-5)
    unmasked = run(model, params, jnp.concatenate([TOKENS, pad], 1))
    assert np.abs(unmasked - padded).max() > 1e-3, "the test would pass without any mask"


def test_mean_pooling_reads_the_mean() -> None:
    model, params = make(task="classify", classifier_pooling="mean")
    assert "pooler" not in params
    encoder = models.build(dataclasses.replace(model.config, task="encoder", use_pooler=False))
    mask = jnp.array([[1] * 8, [1] * 5 + [0] * 3])
    body = {name: params[name] for name in ("embeddings", "encoder")}
    hidden = np.asarray(run(encoder, body, attention_mask=mask).hidden)
    mean = np.stack([hidden[0].mean(0), hidden[1, :5].mean(0)])
    expected = mean @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(run(model, params, attention_mask=mask), expected, atol=1e-5)


def test_dropout_is_random_only_in_training_and_keeps_the_mean() -> None:
    model, params = make(task="classify", num_labels=3)
    still = run(model, params)
    train = jax.jit(lambda key: run(model, params, deterministic=False, rngs={"dropout": key}))
    a, b = train(jax.random.key(1)), train(jax.random.key(2))
    assert np.abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(a, train(jax.random.key(1)))
    off, _ = make(
        task="classify",
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=1e-9,
        classifier_dropout=0.0,
    )
    # A rate of almost nothing takes the path with dropout, which must compute the same attention.
    mask = jnp.array([[1] * 8, [1] * 5 + [0] * 3])
    path = run(off, params, attention_mask=mask, deterministic=False, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_allclose(path, run(model, params, attention_mask=mask), atol=1e-5)
    assert still.shape == a.shape


def test_scanned_layers_drop_different_units() -> None:
    model, params = make(scan_layers=True, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    key = {"dropout": jax.random.key(0)}
    _, state = model.apply(
        {"params": params}, TOKENS, deterministic=False, rngs=key, capture_intermediates=True, mutable=["intermediates"]
    )
    dropped = state["intermediates"]["encoder"]["layers"]["Dropout_0"]["__call__"][0] == 0
    assert dropped[0].any() and (dropped[0] != dropped[1]).any()


def test_roberta_counts_positions_from_the_pad_token() -> None:
    model, params = make(architecture="roberta")
    pad = jnp.full((2, 2), 1)
    mask = jnp.array([[0] * 2 + [1] * 8] * 2)
    left = run(model, params, jnp.concatenate([pad, TOKENS], 1), attention_mask=mask).hidden
    np.testing.assert_allclose(left[:, 2:], run(model, params).hidden, atol=1e-5)


def test_bfloat16_runs_close_to_float32() -> None:
    model, params = make(task="mlm")
    half = models.build(dataclasses.replace(model.config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    out = run(half, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))
    expected = run(model, params)
    assert out.dtype == jnp.bfloat16
    assert np.abs(out.astype(jnp.float32) - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_too_long_sequences_are_refused(architecture: str) -> None:
    model, params = make(architecture=architecture)
    longest = {"bert": 40, "roberta": 38}[architecture]
    assert run(model, params, jnp.full((1, longest), 9)).hidden.shape[1] == longest
    with pytest.raises(ValueError, match=str(longest)):
        run(model, params, jnp.full((1, longest + 1), 9))
