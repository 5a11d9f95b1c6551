"""Generation: against the full forward pass, with padding, sampling, ends, and an apply of the caller's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from random_weights import random_params

from lowrank_jax import models
from lowrank_jax.models import LlamaConfig, generate, stream
from lowrank_jax.models.generate import Sampling, next_token

MODEL = models.build(LlamaConfig.tiny(scan_layers=True, sliding_window=6))
PROMPT = jnp.asarray(np.random.default_rng(0).integers(5, 97, (2, 5)))
PARAMS = random_params(MODEL.config)


def by_hand(tokens, steps: int, apply=MODEL.apply) -> np.ndarray:
    """Greedy continuation by full passes without a cache; what stands to the right is not seen."""
    run = jax.jit(lambda tokens: jnp.argmax(apply({"params": PARAMS}, tokens), axis=-1))
    length = tokens.shape[1]
    tokens = np.pad(np.asarray(tokens), ((0, 0), (0, steps)))
    for i in range(length, length + steps):
        tokens[:, i] = run(tokens)[:, i - 1]
    return tokens


def test_greedy_equals_the_full_pass_and_the_stream() -> None:
    out = generate(MODEL, PARAMS, PROMPT, max_new_tokens=6)
    np.testing.assert_array_equal(out, by_hand(PROMPT, 6))
    streamed = np.stack(list(stream(MODEL, PARAMS, PROMPT, max_new_tokens=6)), axis=1)
    np.testing.assert_array_equal(streamed, out[:, 5:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_continue_as_they_do_alone(side: str) -> None:
    short = PROMPT[1:, :3]
    pad = jnp.zeros((1, 2), jnp.int32)
    row, mask = [pad, short], [pad, jnp.ones((1, 3), jnp.int32)]
    if side == "right":
        row, mask = row[::-1], mask[::-1]
    tokens = jnp.concatenate([PROMPT[:1], jnp.concatenate(row, 1)])
    masks = jnp.concatenate([jnp.ones((1, 5), jnp.int32), jnp.concatenate(mask, 1)])
    out = generate(MODEL, PARAMS, tokens, attention_mask=masks, max_new_tokens=6)
    np.testing.assert_array_equal(out[0, 5:], by_hand(PROMPT[:1], 6)[0, 5:])
    np.testing.assert_array_equal(out[1, 5:], by_hand(short, 6)[0, 3:])


def test_a_row_ends_at_its_end_token() -> None:
    free = np.asarray(generate(MODEL, PARAMS, PROMPT, max_new_tokens=6))[:, 5:]
    end = int(free[0, 2])
    out = np.asarray(generate(MODEL, PARAMS, PROMPT, max_new_tokens=6, eos_token_id=end, pad_token_id=96))[:, 5:]
    for row, was in zip(out, free, strict=True):
        hits = np.flatnonzero(was == end)
        length = hits[0] + 1 if len(hits) else 6
        np.testing.assert_array_equal(row[:length], was[:length])
        assert (row[length:] == 96).all()
    both = list(stream(MODEL, PARAMS, PROMPT[:1], max_new_tokens=6, eos_token_id=[end, 1]))
    assert len(both) == np.flatnonzero(free[0] == end)[0] + 1, "the stream stops once every row has ended"


def test_an_apply_of_the_callers_is_used() -> None:
    def double(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        return 2 * out if context.module.name == "v_proj" else out

    def apply(variables, *args, **kwargs):
        with nn.intercept_methods(double):
            return MODEL.apply(variables, *args, **kwargs)

    out = generate(MODEL, PARAMS, PROMPT, max_new_tokens=6, apply=apply)
    np.testing.assert_array_equal(out, by_hand(PROMPT, 6, apply))
    assert (out != generate(MODEL, PARAMS, PROMPT, max_new_tokens=6)).any()


def test_sampling_is_reproducible_and_has_the_right_frequencies() -> None:
    settings = {"max_new_tokens": 5, "temperature": 1.0}
    a = generate(MODEL, PARAMS, PROMPT, key=jax.random.key(1), **settings)
    np.testing.assert_array_equal(a, generate(MODEL, PARAMS, PROMPT, key=jax.random.key(1), **settings))
    streamed = np.stack(list(stream(MODEL, PARAMS, PROMPT, key=jax.random.key(1), **settings)), axis=1)
    np.testing.assert_array_equal(streamed, a[:, 5:])
    assert (a != generate(MODEL, PARAMS, PROMPT, key=jax.random.key(2), **settings)).any()

    probs = np.array([0.5, 0.3, 0.15, 0.05])
    rows = jnp.broadcast_to(jnp.log(jnp.asarray(probs)), (20000, 4))

    def frequencies(**sampling) -> np.ndarray:
        tokens = next_token(rows, Sampling(**sampling), jax.random.key(0))
        return np.bincount(np.asarray(tokens), minlength=4) / 20000

    np.testing.assert_allclose(frequencies(temperature=1.0), probs, atol=0.015)
    np.testing.assert_allclose(frequencies(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.015)
    # 0.5 alone does not reach 0.6, so the second stays; the third would be beyond.
    np.testing.assert_allclose(frequencies(temperature=1.0, top_p=0.6), [0.625, 0.375, 0, 0], atol=0.015)
    np.testing.assert_allclose(frequencies(temperature=1.0, top_p=0.4), [1, 0, 0, 0], atol=0)
    sharp = probs**2 / (probs**2).sum()
    np.testing.assert_allclose(frequencies(temperature=0.5), sharp, atol=0.015)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 1.0}, "key="),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"attention_mask": jnp.ones((2, 4))}, "attention_mask"),
        ({"tokens": jnp.ones(3, jnp.int32)}, "batch, length"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream])
def test_bad_settings_are_refused_at_the_call(function, kwargs, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        function(MODEL, PARAMS, **{"tokens": PROMPT, "max_new_tokens": 2, **kwargs})
