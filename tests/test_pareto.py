"""Directions that no objective objects to: the linear program against scipy's, its two modes, and the min-norm point."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import kernel
from scipy.optimize import linprog, minimize

from lowrank_jax.pareto import descent_weights, gradient_gram, guide_weights, pareto_direction
from lowrank_jax.pareto.simplex import linear_program, min_norm_weights

SIZES = (2, 3, 5)


def random_gradients(m, seed, conflict=0.0, size=8):
    """Gradients ``[m, size]`` and a guide; ``conflict`` turns every other one against a common direction."""
    random = np.random.default_rng(seed)
    common = random.standard_normal(size)
    signs = np.where(np.arange(m) % 2, -1.0, 1.0)[:, None]
    g = random.standard_normal((m, size)) + conflict * signs * common
    return jnp.asarray(g, jnp.float32), jnp.asarray(random.standard_normal(size), jnp.float32)


def cases(m, count=12):
    for seed, conflict in itertools.product(range(count), (0.0, 1.0, 3.0)):
        g, guide = random_gradients(m, 100 * m + seed, conflict)
        against = -np.linalg.pinv(g) @ np.arange(1.0, m + 1)
        yield g, jnp.asarray(against, jnp.float32) if seed % 3 == 0 else guide


def by_scipy(objective, rows, bounds):
    finite = np.isfinite(bounds)
    return linprog(
        -np.asarray(objective, np.float64), -np.asarray(rows, np.float64)[finite], -np.asarray(bounds, np.float64)[finite],
        np.ones((1, len(objective))), [1.0], method="highs",
    )  # fmt: skip


def check_weights(weights):
    assert (weights >= 0).all() and np.asarray(weights, np.float64).sum() == pytest.approx(1, abs=1e-6)


# The program.


@pytest.mark.parametrize("m", SIZES)
def test_the_program_is_scipy_s(m):
    random = np.random.default_rng(m)
    solved = [0, 0]
    for n in range(40):
        objective, rows, bounds = (
            random.standard_normal(m),
            random.standard_normal((m, m)),
            random.standard_normal(m) - 0.7,
        )
        if n % 3 == 0:
            bounds[0] = -np.inf
        expected = by_scipy(objective, rows, bounds)
        weights, feasible = linear_program(*(jnp.asarray(x, jnp.float32) for x in (objective, rows, bounds)))
        solved[bool(feasible)] += 1
        assert bool(feasible) == expected.success
        if feasible:
            check_weights(weights)
            np.testing.assert_allclose(weights, expected.x, atol=2e-5)
    assert min(solved) > 2  # both outcomes were seen


def test_without_constraints_the_best_objective_takes_all():
    weights, feasible = linear_program(jnp.array([1.0, 3.0, 2.0]), jnp.zeros((0, 3)), jnp.zeros(0))
    assert weights.tolist() == [0, 1, 0] and bool(feasible)


def test_scales_of_objective_and_constraints_do_not_matter():
    objective, rows, bounds = kernel(3), kernel(2, 3, seed=1), jnp.array([-0.2, 0.1])
    expected, feasible = linear_program(objective, rows, bounds)
    assert bool(feasible)
    for a, b in itertools.product((1e-12, 1e12), repeat=2):
        row_scales = jnp.array([a, b])
        got, feasible = linear_program(a * objective, rows * row_scales[:, None], bounds * row_scales)
        assert bool(feasible)
        np.testing.assert_allclose(got, expected, atol=1e-5)


# The modes.


def test_opposed_gradients_leave_the_third():
    """The separating check: the constraints make the first two equal, and more of the third is more descent."""
    g = jnp.array([[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0], [0.0, 0.0, 0.5]])
    weights, feasible = descent_weights(gradient_gram(g))
    assert weights.tolist() == [0, 0, 1] and bool(feasible)
    # Without the constraints the sum of the inner products would have no reason to keep the first two equal.
    skewed = g.at[1].set(jnp.array([-1.1, -2.2, 0.0])).at[2].set(jnp.array([0.0, 0.0, 0.01]))
    assert descent_weights(gradient_gram(skewed))[0][2] > 0.999


@pytest.mark.parametrize("m", SIZES)
def test_descent_is_scipy_s_and_a_common_descent(m):
    bound = 0
    for g, guide in cases(m):
        g64, v64 = np.asarray(g, np.float64), np.asarray(guide, np.float64)
        gram, alignment = g64 @ g64.T, g64 @ v64
        rows = np.vstack([gram, alignment])
        expected = by_scipy(gram.sum(0), rows, [0.0] * m + [min(alignment.max(), 0)])
        weights, feasible = descent_weights(gradient_gram(g), g @ guide)
        check_weights(weights)
        d = np.asarray(weights, np.float64) @ g64
        assert (g64 @ d >= -1e-4 * np.abs(gram).max()).all()  # no objective rises
        assert bool(feasible) == expected.success
        if expected.success:
            assert gram.sum(0) @ weights == pytest.approx(-expected.fun, rel=1e-3)
            bound += gram.sum(0) @ weights < gram.sum(0).max() * (1 - 1e-4)
        else:
            relaxed = by_scipy(gram.sum(0), gram, [0.0] * m)
            assert gram.sum(0) @ weights == pytest.approx(-relaxed.fun, rel=1e-3)
        # Not even asked for: without a guide there is no such constraint.
        assert bool(descent_weights(gradient_gram(g))[1])
    assert bound > 5  # the constraints often bind


@pytest.mark.parametrize("m", SIZES)
def test_guide_is_scipy_s(m):
    seen = set()
    for g, guide in cases(m):
        g64, v64 = np.asarray(g, np.float64), np.asarray(guide, np.float64)
        gram, alignment = g64 @ g64.T, g64 @ v64
        bounds = np.where(alignment > 0, -np.inf, alignment) if (alignment > 0).any() else np.zeros(m)
        if (alignment > 0).any():
            bounds[alignment.argmax()] = 0
        expected = by_scipy(alignment, gram, bounds)
        weights, feasible = guide_weights(gradient_gram(g), g @ guide)
        assert expected.success and bool(feasible)
        check_weights(weights)
        assert alignment @ weights == pytest.approx(-expected.fun, abs=1e-4 * np.abs(alignment).max())
        seen.add(int((alignment > 0).sum()))
    assert {0, 1, 2} <= seen, seen


def test_the_modes_differ_where_the_guide_says_so():
    g = jnp.array([[2.0, 0.0], [1.0, 1.0]])
    guide = jnp.array([0.0, 1.0])
    assert descent_weights(gradient_gram(g), g @ guide)[0].tolist() == [1, 0]
    assert guide_weights(gradient_gram(g), g @ guide)[0].tolist() == [0, 1]


def test_the_objective_nearest_to_the_guide_does_not_rise():
    """Here that is a constraint which binds: without it, one half of the second and the third each would be better."""
    g = jnp.array([[-2.0, 1.0, -1.0], [1.0, 3.0, -2.0], [1.0, -2.0, 1.0]])
    weights, feasible = guide_weights(gradient_gram(g), g @ jnp.array([1.0, -2.0, -3.0]))
    np.testing.assert_allclose(weights, [4 / 55, 22 / 55, 29 / 55], atol=1e-6)
    assert bool(feasible) and abs((gradient_gram(g) @ weights)[2]) < 1e-5


def test_where_no_descent_agrees_with_the_guide_it_is_left_out_and_said():
    # The guide is against both; only the second alone is as little against it as the constraint asks, and that would raise the first.
    g, guide = jnp.array([[1.0, 0.0], [-0.5, 0.8]]), jnp.array([-1.0, -0.75])
    weights, feasible = descent_weights(gradient_gram(g), g @ guide)
    relaxed, fine = descent_weights(gradient_gram(g))
    assert not bool(feasible) and bool(fine)
    np.testing.assert_allclose(weights, relaxed)
    assert abs(weights[0] - 0.89 / 1.39) < 1e-5


@pytest.mark.parametrize("mode", ["descent", "guide", "min_norm"])
def test_objectives_in_another_order_have_weights_in_that_order(mode):
    direction = jax.jit(lambda g, v: pareto_direction(g, v, mode))
    for seed in range(3):
        g, guide = (np.asarray(x) for x in random_gradients(4, seed, 1.0))
        expected = direction(g, guide)
        for order in itertools.permutations(range(4)):
            got = direction(g[list(order)], guide)
            np.testing.assert_allclose(got.weights, np.asarray(expected.weights)[list(order)], atol=1e-4)
            np.testing.assert_allclose(got.direction, expected.direction, atol=1e-4)


@pytest.mark.parametrize("mode", ["descent", "guide", "min_norm"])
def test_a_single_objective_has_all_the_weight(mode):
    for sign in (1.0, -1.0):
        got = pareto_direction(kernel(1, 5), sign * kernel(5, seed=1), mode)
        assert got.weights.tolist() == [1] and (got.direction == kernel(1, 5)[0]).all()


def test_the_size_of_gradients_does_not_matter():
    for seed, size in itertools.product(range(5), (1e-14, 1e14)):
        g, guide = random_gradients(3, seed, 1.0)
        for mode in ("descent", "guide", "min_norm"):
            expected, got = (pareto_direction(s * g, s * guide, mode) for s in (1.0, size))
            np.testing.assert_allclose(got.weights, expected.weights, atol=1e-4)


# The min-norm point.


def test_two_objectives_have_the_formula():
    solve = jax.jit(min_norm_weights)
    for seed, length in itertools.product(range(20), (0.1, 1.0, 10.0)):
        g, _ = random_gradients(2, seed, 0.5, size=3)
        a, b = np.asarray(g, np.float64) * [[1.0], [length]]
        first = np.clip((b - a) @ b / ((a - b) @ (a - b)), 0, 1)
        np.testing.assert_allclose(
            solve(gradient_gram(g * jnp.array([[1.0], [length]]))), [first, 1 - first], atol=1e-5
        )


@pytest.mark.parametrize("m", SIZES)
def test_the_min_norm_point_is_the_nearest_of_the_hull(m):
    inner = 0
    for g, _ in cases(m, count=6):
        gram = np.asarray(g, np.float64) @ np.asarray(g, np.float64).T
        weights = min_norm_weights(gradient_gram(g))
        check_weights(weights)
        w = np.asarray(weights, np.float64)
        norm = w @ gram @ w
        # The optimality condition: no corner is on the near side of the plane through the point.
        assert (gram @ w >= norm - 1e-4 * np.abs(gram).max()).all()
        found = minimize(
            lambda x, gram=gram: x @ gram @ x, np.full(m, 1 / m), jac=lambda x, gram=gram: 2 * gram @ x, bounds=[(0, 1)] * m,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1}, options={"ftol": 1e-12},
        )  # fmt: skip
        assert norm <= found.fun * (1 + 1e-4) + 1e-5
        inner += (w > 1e-6).sum() > 1
    assert inner > 3


def test_dependent_and_vanishing_gradients():
    same = jnp.ones((3, 2))
    for mode in ("descent", "min_norm"):
        got = pareto_direction(same, mode=mode)
        np.testing.assert_allclose(got.direction, jnp.ones(2), rtol=1e-5)
    triangle = jnp.array([[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]])
    for mode in ("descent", "min_norm"):
        got = pareto_direction(triangle, mode=mode)
        np.testing.assert_allclose(got.weights, np.full(3, 1 / 3), atol=1e-4)
        np.testing.assert_allclose(got.direction, jnp.zeros(2), atol=1e-4)
    for mode in ("descent", "min_norm"):
        got = pareto_direction(jnp.zeros((3, 2)), mode=mode)
        check_weights(np.asarray(got.weights))
        assert not got.direction.any()


# Trees.


def losses(params, x):
    y = jnp.tanh(x @ params["layer"]["kernel"]) + params["bias"]
    return jnp.stack([jnp.mean((y - x[:, :3]) ** 2), jnp.mean((y - 1) ** 2), jnp.mean(jnp.sin(3 * y + x[:, 1:]))])


def test_trees_of_gradients_of_stacked_losses():
    params, x = {"layer": {"kernel": kernel(4, 3)}, "bias": jnp.zeros(3)}, kernel(6, 4, seed=1)
    gradients, at = jax.jit(lambda p: (jax.jacrev(losses)(p, x), losses(p, x)))(params)
    guide = jax.jit(jax.grad(lambda p: losses(p, x + 0.3)[0]))(params)
    flat = np.concatenate([leaf.reshape(3, -1) for leaf in jax.tree.leaves(gradients)], 1)
    flat_guide = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(guide)])
    np.testing.assert_allclose(gradient_gram(gradients), flat @ flat.T, rtol=1e-4, atol=1e-6)

    @jax.jit
    def directions():
        alone = {mode: pareto_direction(flat, flat_guide, mode) for mode in ("descent", "guide")}
        return {mode: (pareto_direction(gradients, guide, mode), one) for mode, one in alone.items()}

    for tree, alone in directions().values():
        np.testing.assert_allclose(tree.weights, alone.weights, atol=1e-4)
        np.testing.assert_allclose(tree.direction["layer"]["kernel"].ravel(), alone.direction[3:], atol=1e-4)
    step = jax.tree.map(lambda p, d: p - 1e-3 * d, params, directions()["descent"][0].direction)
    assert (losses(step, x) <= at + 1e-6).all()


def test_half_precision():
    g, guide = random_gradients(3, 0, 1.0, size=1000)
    narrow, narrow_guide = g.astype(jnp.bfloat16), guide.astype(jnp.bfloat16)
    assert gradient_gram(narrow).dtype == jnp.float32
    exact = np.asarray(narrow, np.float64)
    # float32's rounding of sums of 1,000 products; sums in bfloat16 are off by 4e-3.
    np.testing.assert_allclose(gradient_gram(narrow), exact @ exact.T, rtol=1e-5)
    got = pareto_direction(narrow, narrow_guide, "guide")
    assert got.direction.dtype == jnp.bfloat16 and got.weights.dtype == jnp.float32


def test_many_problems_at_once():
    g = jnp.stack([random_gradients(3, seed, 1.0)[0] for seed in range(4)])
    together = jax.vmap(lambda g: pareto_direction(g))(g)
    for n in range(4):
        np.testing.assert_allclose(together.weights[n], pareto_direction(g[n]).weights, atol=1e-6)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="pareto: 7 objectives.*at most 6"):
        pareto_direction(jnp.ones((7, 3)))
    with pytest.raises(ValueError, match=r"pareto: a/b of shape \[2, 3\].*3 objectives.*stack"):
        gradient_gram({"a": {"a": jnp.ones((3, 1)), "b": jnp.ones((2, 3))}})
    with pytest.raises(ValueError, match="pareto: no gradients"):
        pareto_direction({})
    with pytest.raises(ValueError, match=r"pareto_direction\(mode='up'\).*'descent', 'guide', 'min_norm'"):
        pareto_direction(jnp.ones((2, 3)), mode="up")
    with pytest.raises(ValueError, match=r"pareto_direction\(mode='guide'\).*needs guide"):
        pareto_direction(jnp.ones((2, 3)), mode="guide")
    with pytest.raises(ValueError, match=r"guide.*x of shape \[4\].*\[3\]"):
        pareto_direction({"x": jnp.ones((2, 3))}, {"x": jnp.ones(4)})
    with pytest.raises(ValueError, match="guide.*another tree"):
        pareto_direction({"x": jnp.ones((2, 3))}, {"y": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"linear_program: .*rows \[2, 2\].*\[k, 3\]"):
        linear_program(jnp.ones(3), jnp.ones((2, 2)), jnp.ones(2))
