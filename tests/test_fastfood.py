"""Random projections: the matrices they stand for, their exact adjoints, and what they keep of a length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance_rows.intrinsic import numpy_hadamard, numpy_permutation, numpy_projection

from lowrank_jax import fastfood, seeded
from lowrank_jax.fastfood import adjoint, fwht, project

SEED = jnp.array([3, 5], jnp.uint32)
PROJECTIONS = ("fastfood", "dense", "sparse")
SIZES = [(1000, 10), (60, 200), (64, 64), (1, 3)]  # (D, d): d above D, powers of two, and D = 1 too


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def matrix(projection, size, dimension):
    """P, one column for each unit vector."""
    columns = jax.jit(jax.vmap(lambda x: project(x, SEED, size, projection), out_axes=1))
    return np.asarray(columns(jnp.eye(dimension)), np.float64)


@pytest.mark.parametrize(("size", "dimension"), SIZES)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_it_is_the_matrix_of_the_paper_and_its_gradient_the_adjoint(projection, size, dimension):
    """Released Fastfood code goes forward with H and back with H / sqrt(L): its gradient is 1 / L of this one."""
    x, g = normal(dimension), normal(size, seed=1)

    @jax.jit
    def both_ways(x, g):
        y, pull = jax.vjp(lambda x: project(x, SEED, size, projection), x)
        return y, pull(g)[0], adjoint(g, SEED, dimension, projection)

    y, gradient, back = both_ways(x, g)
    assert y.shape == (size,) and back.shape == (dimension,) and y.dtype == back.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, back)
    assert abs(np.vdot(y, g) - np.vdot(x, back)) <= 1e-4 * np.linalg.norm(y) * np.linalg.norm(g)
    # H G Pi H B on the whole padded length, though a part of the first transform only is computed.
    p = numpy_projection(projection, np.asarray(SEED), size, dimension)
    for got, exact in ((y, p @ np.float64(x)), (back, p.T @ np.float64(g))):
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_columns_are_nearly_orthonormal(projection):
    size, dimension = 4096, 64
    p = matrix(projection, size, dimension)
    gram = p.T @ p
    np.testing.assert_allclose(np.diag(gram), 1, atol=1e-5)  # of Fastfood too, where D is a power of two
    off = gram[~np.eye(dimension, dtype=bool)] * size**0.5
    # Fastfood's products of columns are a transform of squares of normal numbers, whose variance is 2.
    expected = 2**0.5 if projection == "fastfood" else 1
    assert abs(np.sqrt((off**2).mean()) / expected - 1) < 0.2
    assert abs(off.mean()) < 0.1 and np.abs(off).max() < 5.5


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_expected_length_is_kept(projection):
    """Also where D is no power of two, so that a part of the padded output is cut off."""
    size, dimension, draws = 600, 50, 400
    seeds, x = seeded.seeds(jax.random.key(0), (draws,)), normal(dimension)
    y = jax.jit(jax.vmap(lambda seed: project(x, seed, size, projection)))(seeds)
    ratio = np.asarray((y**2).sum(-1) / (x**2).sum(), np.float64)
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / draws**0.5
    assert ratio.std() < 1.5 * (2 / size) ** 0.5
    # No coordinate gets more than its share, and their signs are fair.
    share = np.asarray((y**2).mean(0) / (x**2).sum() * size, np.float64)
    assert share.min() > 0.5 and share.max() < 1.7
    assert np.abs(np.asarray(y.mean(0) / jnp.sqrt((y**2).mean(0)))).max() * draws**0.5 < 5


def test_the_transform_is_hadamards():
    for length in (1, 2, 8, 256, 1024):
        x = normal(3, length)
        np.testing.assert_allclose(fwht(x), x @ numpy_hadamard(length), atol=1e-5 * length**0.5 * 4)
    assert (fwht(fwht(jnp.arange(512.0))) == 512 * jnp.arange(512.0)).all()  # integers: exactly its own inverse


@pytest.mark.parametrize("projection", ["dense", "sparse"])
def test_columns_made_in_parts_are_the_same(projection, monkeypatch):
    x, g = normal(37), normal(100, seed=1)
    made = []
    for at_once, count in ((2**22, 1), (40, {"dense": 37, "sparse": 10}[projection])):
        monkeypatch.setattr(fastfood, "_AT_ONCE", at_once)
        assert fastfood._parts(37, 100, projection)[0] == count
        made.append(jax.jit(lambda x, g: (project(x, SEED, 100, projection), adjoint(g, SEED, 37, projection)))(x, g))
    for one, other in zip(*made, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 7, 10])
def test_the_permutation_has_its_inverse(bits):
    there, back = (np.asarray(fastfood._permutation(SEED, bits, inverse)) for inverse in (False, True))
    assert sorted(there) == list(range(2**bits))
    np.testing.assert_array_equal(there[back], np.arange(2**bits))
    np.testing.assert_array_equal(there, numpy_permutation(np.asarray(SEED), 2**bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_permutations_are_as_irregular_as_drawn_ones(bits):
    """Over seeds: where a place goes is uniform, and so is how far from it another one goes. Half a length apart is the hardest."""
    length, draws = 2**bits, 40_000
    seeds = seeded.seeds(jax.random.key(1), (draws,))
    to = np.asarray(jax.jit(jax.vmap(lambda seed: fastfood._permutation(seed, bits)))(seeds))
    for place, step in ((0, 1), (3, length // 2), (5, length // 4)):
        for values, cells in ((to[:, place], length), ((to[:, place + step] - to[:, place]) % length, length - 1)):
            count = np.bincount(values, minlength=length)[length - cells :]
            chi = ((count - draws / cells) ** 2).sum() / (draws / cells)
            assert abs(chi - cells) < 5 * (2 * cells) ** 0.5, (place, step)
    fixed = (to == np.arange(length)).sum(-1)
    assert abs(fixed.mean() - 1) < 0.03 and abs(fixed.var() - 1) < 0.05  # as of a random permutation


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_storage_types_jit_and_batches_change_nothing(projection):
    x, seeds = normal(2, 9).astype(jnp.bfloat16), jnp.stack([SEED, SEED + 1])
    one = jax.jit(lambda x, seed: project(x, seed, 30, projection))
    both = jax.jit(jax.vmap(one))(x, seeds)
    assert both.dtype == jnp.float32
    for n in range(2):
        np.testing.assert_allclose(both[n], one(x[n].astype(jnp.float32), seeds[n]), atol=1e-6)
    assert np.abs(both[0] - one(x[0], seeds[1])).max() > 1e-2  # another seed, another subspace
    gradient = jax.jit(jax.grad(lambda x: one(x, SEED)[0]))(x[0])
    exact = numpy_projection(projection, np.asarray(SEED), 30, 9)[0]
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(jnp.float32), exact, rtol=0, atol=2.0**-8 * np.abs(exact).max())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"projection='hadamard'.*'fastfood', 'dense', 'sparse'"):
        project(jnp.ones(3), SEED, 8, "hadamard")
    with pytest.raises(ValueError, match=r"size=0: expected 1 to 2\*\*31"):
        project(jnp.ones(3), SEED, 0)
    with pytest.raises(ValueError, match=r"size=2147483649: expected 1 to 2\*\*31"):
        project(jnp.ones(3), SEED, 2**31 + 1)
    with pytest.raises(ValueError, match=r"dimension=0: expected"):
        adjoint(jnp.ones(3), SEED, 0)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\): expected \[d\]"):
        project(jnp.ones((2, 3)), SEED, 8)
    with pytest.raises(ValueError, match=r"y has shape \(\): expected \[D\]"):
        adjoint(jnp.ones(()), SEED, 8)
    with pytest.raises(ValueError, match=r"x has shape \(6,\).*power of two"):
        fwht(jnp.ones(6))
