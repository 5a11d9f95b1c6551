"""Losses against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lr


def test_symmetric_kl_is_the_mean_of_both_directions():
    a, b = (np.random.default_rng(n).standard_normal((4, 5)) * 3 for n in (0, 1))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    expected = 0.5 * ((p * np.log(p / q)).sum(-1) + (q * np.log(q / p)).sum(-1)).mean()
    np.testing.assert_allclose(lr.symmetric_kl(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-5)
    # What is aimed at is a constant: the gradient of cross entropy with soft targets, (p - q) / 2 over the batch.
    np.testing.assert_allclose(jax.grad(lr.symmetric_kl)(jnp.asarray(a), jnp.asarray(b)), (p - q) / 8, atol=1e-6)
    half = lr.symmetric_kl(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16))
    assert half.dtype == jnp.float32 and abs(half / expected - 1) < 0.02


def test_chunked_cross_entropy_is_the_plain_one_with_the_same_gradients():
    rng = np.random.default_rng(0)
    hidden, head = jnp.asarray(rng.normal(size=(3, 7, 8))), jnp.asarray(rng.normal(size=(8, 11)))
    targets = jnp.asarray(rng.integers(0, 11, (3, 7)))

    def mean(chunk, hidden, head):
        return jnp.mean(lr.chunked_cross_entropy(lambda x: x @ head, hidden, targets, chunk) * jnp.arange(7))

    plain = np.log(np.exp(hidden @ head).sum(-1)) - np.take_along_axis(hidden @ head, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(mean(0, hidden, head), np.mean(plain * np.arange(7)), rtol=1e-5)
    for chunk in (1, 6, 9, 21, 100):
        ours, whole = (jax.grad(mean, (1, 2))(n, hidden, head) for n in (chunk, 0))
        np.testing.assert_allclose(mean(chunk, hidden, head), mean(0, hidden, head), rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, whole)


def test_neither_whole_logits_nor_their_gradient_exist():
    tokens, width, vocab = 1024, 16, 4096
    args = (
        jax.ShapeDtypeStruct((2, tokens // 2, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((2, tokens // 2), jnp.int32),
    )

    def temporaries(chunk):
        def mean(hidden, head, targets):
            return lr.chunked_cross_entropy(lambda x: x @ head, hidden, targets, chunk).mean()

        compiled = jax.jit(jax.grad(mean, (0, 1))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = tokens * vocab * 4
    assert temporaries(0) > logits
    assert temporaries(64) < logits / 3
