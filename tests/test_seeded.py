"""Numbers made of seeds: the same for ever, uniform, unrelated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_seeded import numpy_fold, numpy_uniform, numpy_words

from lowrank_jax import seeded

SEED = jnp.array([123456789, 987654321], jnp.uint32)


def test_the_bits_are_those_of_the_format():
    assert (np.asarray(seeded.words(SEED, (3, 4, 5))) == numpy_words(SEED, (3, 4, 5))).all()
    assert (np.asarray(seeded.fold(SEED, 2)) == numpy_fold(SEED, 2)).all()
    assert (np.asarray(seeded.uniform(SEED, (7, 3))) == numpy_uniform(SEED, (7, 3))).all()
    assert seeded.words(SEED, (4,)).tolist() == GOLDEN


GOLDEN = [3164757495, 1854680845, 111407565, 2975064628]


@pytest.mark.parametrize("shape", [(1 << 18,), (512, 512), (64, 64, 64)])
def test_they_are_uniform_and_uncorrelated(shape):
    u = np.asarray(seeded.uniform(SEED, shape), np.float64)
    sigma = u.size**-0.5  # five standard deviations of each statistic below
    assert abs(u.mean()) < 5 * sigma / 3**0.5
    assert abs((u**2).mean() - 1 / 3) < 5 * sigma * (4 / 45) ** 0.5
    bits = np.unpackbits(np.asarray(seeded.words(SEED, shape)).view(np.uint8)).reshape(-1, 32).mean(0)
    assert np.abs(bits - 0.5).max() < 5 * sigma / 2
    for axis in range(u.ndim):
        assert abs((u * np.roll(u, 1, axis)).mean()) < 5 * sigma / 3
    for other in (seeded.fold(SEED, 0), SEED + jnp.array([1, 0], jnp.uint32), SEED + jnp.array([0, 1], jnp.uint32)):
        assert abs((u * np.asarray(seeded.uniform(other, shape))).mean()) < 5 * sigma / 3


def test_a_random_matrix_has_the_spectrum_of_one():
    """Linear relations between rows, which the sum of axis keys might leave, would show as a large singular value."""
    s = np.linalg.svd(np.asarray(seeded.uniform(SEED, (400, 400))) * 3**0.5 / 20, compute_uv=False)
    assert 1.9 < s[0] < 2.05 and s[-1] < 0.02


def test_neither_jit_nor_a_setting_of_jax_changes_them():
    plain = np.asarray(seeded.words(SEED, (6, 7)))
    batch = jax.jit(jax.vmap(lambda s: seeded.words(s, (6, 7))))(jnp.stack([SEED, seeded.fold(SEED, 3)]))
    assert (np.asarray(batch[0]) == plain).all() and (np.asarray(batch[1]) != plain).any()
    with jax.threefry_partitionable(False):
        assert (np.asarray(seeded.words(SEED, (6, 7))) == plain).all()


def test_seeds_differ():
    made = seeded.seeds(jax.random.key(0), (50,))
    assert made.dtype == jnp.uint32 and len(np.unique(np.asarray(made))) == 100
