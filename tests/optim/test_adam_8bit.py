"""Eight-bit moments: the codebook, its errors, and Adam that hardly notices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_jax.optim import galore, scale_by_adam_8bit
from lowrank_jax.optim.blockwise import Quantised, codebook, dequantise_blockwise, quantise_blockwise


@pytest.mark.parametrize("signed", [True, False])
def test_the_codebook_has_256_values_over_seven_decades(signed):
    book = codebook(signed)
    assert len(set(book.tolist())) == 256 and (np.diff(book) > 0).all()
    assert book.max() == 1 and 0 in book and (book.min() < 0) == signed
    smallest = np.abs(book[book != 0]).min()
    assert 1e-7 < smallest < 1e-6


@pytest.mark.parametrize(("block", "expected"), [(64, 0.0095), (256, 0.0108), (2048, 0.0125)])
def test_errors_on_gaussian_numbers(block, expected):
    """The relative errors that an independent numpy calculation gave."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(2**18), jnp.float32)
    error = dequantise_blockwise(quantise_blockwise(x, True, block)) - x
    assert abs(float(jnp.linalg.norm(error) / jnp.linalg.norm(x)) / expected - 1) < 0.06


def test_small_numbers_keep_their_order_of_magnitude_and_zero_stays_zero():
    """A linear map would make zero of a hundred-thousandth of the largest."""
    x = jnp.array([1.0, 1e-5, -1e-5, 0.0])
    back = dequantise_blockwise(quantise_blockwise(x))
    # So far below the largest there are two codes to a decade: the order of magnitude is what is left, and what is asserted.
    np.testing.assert_allclose(back[1:3], x[1:3], rtol=0.5)
    assert back[0] == 1 and back[3] == 0
    unsigned = dequantise_blockwise(quantise_blockwise(jnp.array([0.0, 3e-6, 2.0]), False))
    assert unsigned[0] == 0 and 1e-6 < unsigned[1] < 6e-6 and unsigned[2] == 2
    assert (dequantise_blockwise(quantise_blockwise(jnp.zeros(7), block=4)) == 0).all()


def test_nearest_codes_are_taken_and_blocks_are_on_their_own():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 100)), jnp.float32)
    q = quantise_blockwise(x, True, 64)
    assert q.codes.shape == (5, 64) and q.codes.dtype == jnp.uint8
    flat = np.pad(np.ravel(x), (0, 20)).reshape(5, 64)
    book = codebook(True)
    nearest = np.abs(flat[..., None] / np.abs(flat).max(-1)[:, None, None] - book).min(-1)
    got = np.abs(flat / np.abs(flat).max(-1)[:, None] - book[np.asarray(q.codes)])
    np.testing.assert_allclose(got, nearest, atol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_the_nearest_and_decodes_to_its_value(signed):
    """Against a search in the codebook, in float64; a number within a float's rounding of a middle may go either way."""
    book = codebook(signed).astype(np.float64)
    decoded = dequantise_blockwise(Quantised(jnp.arange(256, dtype=jnp.uint8)[None], jnp.ones(1), (256,), signed))
    np.testing.assert_allclose(decoded, book, rtol=3e-7)
    random = np.random.default_rng(2)
    x = (random.uniform(-1 if signed else 0, 1, 2**18) * 10 ** random.uniform(-9, 0, 2**18)).astype(np.float32)
    x[::256] = 1.0  # the scale of every block
    codes = np.ravel(quantise_blockwise(jnp.asarray(x), signed).codes)
    middles = (book[1:] + book[:-1]) / 2
    wrong = codes != np.searchsorted(middles, x.astype(np.float64))
    assert (np.abs(x[wrong, None] / middles - 1).min(-1, initial=1) < 1e-5).all() and wrong.mean() < 1e-4


def test_a_stack_is_updated_slice_by_slice_as_a_whole_would_be():
    """And decoded moments of the whole stack do not exist."""
    stack = jax.random.normal(jax.random.key(0), (16, 64, 128))
    tx = scale_by_adam_8bit()
    states = tx.init({"w": stack}), [tx.init({"w": x}) for x in stack]
    for seed in range(3):
        g = jax.random.normal(jax.random.key(seed), stack.shape)
        whole, first = jax.jit(tx.update)({"w": g}, states[0])
        parts = [jax.jit(tx.update)({"w": x}, s) for x, s in zip(g, states[1], strict=True)]
        states = first, [s for _, s in parts]
        np.testing.assert_allclose(whole["w"], jnp.stack([u["w"] for u, _ in parts]), rtol=2e-5, atol=1e-6)
    temporary = []
    for x in (stack, stack.reshape(-1, 128)):
        arguments = {"w": x}, tx.init({"w": x})
        compiled = jax.jit(tx.update, donate_argnums=(0, 1)).lower(*arguments).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[0] < 0.7 * temporary[1]


def test_training_is_close_to_adams():
    random = np.random.default_rng(0)
    target = jnp.asarray(random.standard_normal((96, 64)), jnp.float32)
    inputs = jnp.asarray(random.standard_normal((32, 256, 96)), jnp.float32)

    def run(scaler):
        tx = optax.chain(scaler, optax.scale_by_learning_rate(0.02))
        params = {"w": jnp.zeros((96, 64)), "b": jnp.zeros(64)}
        loss = lambda p, x: ((x @ p["w"] + p["b"] - x @ target) ** 2).mean()  # noqa: E731

        def step(carry, x):
            p, s = carry
            value, g = jax.value_and_grad(loss)(p, x)
            updates, s = tx.update(g, s, p)
            return (optax.apply_updates(p, updates), s), value

        (params, state), losses = jax.jit(lambda c: jax.lax.scan(step, c, jnp.tile(inputs, (6, 1, 1))))(
            (params, tx.init(params))
        )
        return params, state, losses

    _, state, losses = run(scale_by_adam_8bit())
    _, _, reference = run(optax.scale_by_adam())
    assert isinstance(state[0].mu["w"], Quantised) and state[0].mu["b"].dtype == jnp.float32
    assert losses[-1] < 0.01 * losses[0] and abs(losses[-1] - reference[-1]) < 0.02 * losses[0]
    assert losses[-1] != reference[-1]


def test_small_leaves_are_adams_up_to_rounding():
    params = {"b": jnp.zeros(64)}
    ours, theirs = scale_by_adam_8bit(), optax.scale_by_adam()
    states = ours.init(params), theirs.init(params)
    for seed in range(3):
        g = {"b": jax.random.normal(jax.random.key(seed), (64,))}
        a, first = ours.update(g, states[0])
        b, second = theirs.update(g, states[1])
        states = first, second
        np.testing.assert_allclose(a["b"], b["b"], rtol=3e-5)


def test_bytes_and_galore_inside():
    params = {"w": {"kernel": jnp.ones((256, 512))}}
    size = lambda state: sum(x.nbytes for x in jax.tree.leaves(state))  # noqa: E731
    assert size(scale_by_adam_8bit().init(params)) <= 256 * 512 * 2 * (1 + 4 / 256) + 64
    tx = galore(scale_by_adam_8bit(), 32, scale=1.0)
    assert size(tx.init(params)) <= 2 * 32 * 512 * (1 + 4 / 256) + 4 * 32 * 256 + 64
    g = {"w": {"kernel": jax.random.normal(jax.random.key(0), (256, 512))}}
    plain = galore(optax.scale_by_adam(), 32, scale=1.0)
    (a, _), (b, _) = (t.update(g, t.init(params), params) for t in (tx, plain))
    np.testing.assert_allclose(a["w"]["kernel"], b["w"]["kernel"], atol=1e-4)


def test_bad_fields_are_refused():
    with pytest.raises(ValueError, match=r"b2=1.0"):
        scale_by_adam_8bit(b2=1.0)
    with pytest.raises(ValueError, match="block=0"):
        scale_by_adam_8bit(block=0)
