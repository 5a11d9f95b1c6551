"""The Llama family by itself: layouts, remat, cache, packing, padding, windows, types."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from random_weights import random_params

from lowrank_jax import models
from lowrank_jax.models import LlamaConfig, RopeScaling

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 10)))
CONFIG = LlamaConfig.tiny()


def make(config: LlamaConfig = CONFIG):
    return models.build(config), random_params(config)


@functools.partial(jax.jit, static_argnums=0, static_argnames="return_hidden")
def logits(model, params, tokens=TOKENS, **kwargs):
    return model.apply({"params": params}, tokens, **kwargs)


def with_config(model, **changes):
    return models.build(dataclasses.replace(model.config, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "tie_word_embeddings": True,
            "qkv_bias": True,
            "qk_norm": True,
            "head_dim": 24,
            "rope_scaling": RopeScaling(kind="linear", factor=2.0),
        },
    ],
)
def test_scan_and_loop_give_the_same(changes) -> None:
    model, params = make(dataclasses.replace(CONFIG, **changes))
    scanned = with_config(model, scan_layers=True)
    stacked = models.stack_layers(params)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda s: s.shape, models.param_shapes(scanned.config))
    np.testing.assert_allclose(logits(scanned, stacked), logits(model, params), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, models.unstack_layers(stacked), params)


@pytest.mark.parametrize(("scan", "remat"), [(False, "full"), (True, "dots")])
def test_remat_changes_neither_values_nor_gradients(scan: bool, remat: str) -> None:
    model, params = make(dataclasses.replace(CONFIG, scan_layers=scan))

    def loss(model):
        return jax.jit(jax.value_and_grad(lambda p: logits(model, p).var()))(params)

    value, gradient = loss(model)
    again, regradient = loss(with_config(model, remat=remat))
    np.testing.assert_allclose(again, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), regradient, gradient)


def test_full_remat_saves_fewer_residuals() -> None:
    model, params = make(dataclasses.replace(CONFIG, num_hidden_layers=6, scan_layers=True))
    tokens = jnp.ones((4, 64), jnp.int32)

    def temporary(model) -> int:
        step = jax.jit(jax.grad(lambda p: logits(model, p, tokens).var()))
        return step.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporary(with_config(model, remat="full")) < 0.7 * temporary(model)


@pytest.mark.parametrize(("scan", "window"), [(False, None), (True, 3)])
def test_decoding_with_a_cache_equals_the_full_pass(scan: bool, window: int | None) -> None:
    model, params = make(dataclasses.replace(CONFIG, scan_layers=scan, sliding_window=window))
    expected = logits(model, params)
    cache = models.init_cache(model.config, 2, 12)
    first, cache = logits(model, params, TOKENS[:, :4], cache=cache)
    parts = [first]
    for i in range(4, 10):
        part, cache = logits(model, params, TOKENS[:, i : i + 1], cache=cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=1e-4)
    assert int(cache["index"]) == 10


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_do_not_see_each_other(window: int | None) -> None:
    model, params = make(dataclasses.replace(CONFIG, sliding_window=window))
    segments = jnp.array([[1] * 4 + [2] * 6] * 2)
    positions = jnp.array([list(range(4)) + list(range(6))] * 2)
    packed = logits(model, params, segment_ids=segments, positions=positions)
    alone = [logits(model, params, TOKENS[:, :4]), logits(model, params, TOKENS[:, 4:])]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-4)
    # Rotary positions are relative: a segment may as well keep counting.
    np.testing.assert_allclose(logits(model, params, segment_ids=segments), packed, atol=1e-4)


@pytest.mark.parametrize("window", [None, 3])
def test_padding_at_either_side_changes_nothing(window: int | None) -> None:
    model, params = make(dataclasses.replace(CONFIG, sliding_window=window))
    alone = logits(model, params, TOKENS[:, :6])
    junk = jnp.full((2, 4), 7)
    ones, zeros = jnp.ones((2, 6), jnp.int32), jnp.zeros((2, 4), jnp.int32)
    left = logits(
        model, params, jnp.concatenate([junk, TOKENS[:, :6]], 1), attention_mask=jnp.concatenate([zeros, ones], 1)
    )
    right = logits(
        model, params, jnp.concatenate([TOKENS[:, :6], junk], 1), attention_mask=jnp.concatenate([ones, zeros], 1)
    )
    np.testing.assert_allclose(left[:, 4:], alone, atol=1e-4)
    np.testing.assert_allclose(right[:, :6], alone, atol=1e-4)
    assert np.isfinite(left).all(), "a row that sees no key must not give NaN"


def test_a_token_sees_only_the_past_within_the_window() -> None:
    model, params = make(dataclasses.replace(CONFIG, sliding_window=3, num_hidden_layers=1))
    base = logits(model, params)
    changed = logits(model, params, TOKENS.at[:, 4].add(1) % 97)
    moved = np.abs(np.asarray(changed - base)).max(axis=(0, 2)) > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 3 + [False] * 3


def test_bfloat16_runs_close_to_float32() -> None:
    model, params = make()
    half = with_config(model, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    out = logits(half, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))
    expected = logits(model, params)
    assert out.dtype == jnp.bfloat16
    assert np.abs(out.astype(jnp.float32) - expected).max() < 0.05 * np.abs(expected).max()


def test_logits_at_one_place_and_hidden_states() -> None:
    model, params = make()
    everywhere = logits(model, params)
    np.testing.assert_allclose(
        logits(model, params, logits_at=jnp.array([3, 9])), everywhere[jnp.arange(2), jnp.array([3, 9])], atol=1e-5
    )
    hidden = logits(model, params, return_hidden=True)
    np.testing.assert_allclose(hidden @ params["lm_head"]["kernel"], everywhere, atol=1e-4)


def test_untied_and_tied_heads_have_the_parameters_they_need() -> None:
    _, params = make()
    _, tied = make(dataclasses.replace(CONFIG, tie_word_embeddings=True))
    paths = set(traverse_util.flatten_dict(params, sep="/"))
    assert {"layers_0/attention/q_proj/kernel", "layers_1/mlp/gate_proj/kernel", "lm_head/kernel"} <= paths
    assert paths - set(traverse_util.flatten_dict(tied, sep="/")) == {"lm_head/kernel"}


def test_key_value_heads_are_never_repeated() -> None:
    """No array of the forward pass is as large as keys repeated for every query head in all key positions would be."""
    config = dataclasses.replace(CONFIG, num_attention_heads=8, num_key_value_heads=1, head_dim=16, num_hidden_layers=1)
    model, params = make(config)
    cache = models.init_cache(config, 2, 4096)
    step = jax.jit(lambda p, t, c: logits(model, p, t, cache=c))
    temporary = step.lower(params, TOKENS[:, :1], cache).compile().memory_analysis().temp_size_in_bytes
    repeated = 2 * 4096 * 8 * 16 * 4
    # Two such copies would be needed, one of keys and one of values.
    assert temporary < repeated


def test_parameter_counts_of_published_shapes() -> None:
    def count(config) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(models.param_shapes(config)))

    assert count(models.llama2_7b()) == 6_738_415_616
    assert count(models.smollm2_135m()) == 134_515_008
    assert count(models.minilm_l6()) == 22_713_216
    assert count(models.roberta_base(task="mlm")) == 124_697_433


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"tokens": jnp.ones(3, jnp.int32)}, "batch, length"),
        ({"segment_ids": jnp.ones((2, 10)), "cache": models.init_cache(CONFIG, 2, 10)}, "segment_ids"),
    ],
)
def test_bad_calls_are_refused(kwargs, words: str) -> None:
    model, params = make()
    with pytest.raises(ValueError, match=words):
        logits(model, params, **{"tokens": TOKENS, **kwargs})
