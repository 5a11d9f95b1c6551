"""Sharing budgets out: on the host from scores, and inside jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.allocate import Item, allocate
from lowrank_jax.optim import cubic_budget, keep_best, share_out


def test_the_cubic_schedule_of_the_paper():
    assert int(cubic_budget(400, 100, 700, 144, 72)) == 72 + 72 // 8
    steps = np.arange(1001)
    got = np.asarray(jax.jit(jax.vmap(lambda s, stop: cubic_budget(s, 100, stop, 144, 72), (0, None)))(steps, 700))
    exact = [72 + (72 * (700 - min(max(s, 100), 700)) ** 3) // 600**3 for s in steps.tolist()]
    assert got.tolist() == exact


@pytest.mark.parametrize("budget", [0, 1, 4, 7, 100])
def test_share_out_spends_exactly_and_best_first(budget):
    random = np.random.default_rng(budget)
    scores, limits = random.integers(0, 3, 12).astype(np.float32), random.integers(0, 4, 12)
    got = np.asarray(jax.jit(share_out)(jnp.asarray(scores), limits, budget))
    left, expected = budget, np.zeros(12, int)
    for n in sorted(range(12), key=lambda n: (-scores[n], n)):
        expected[n] = min(limits[n], left)
        left -= expected[n]
    assert got.tolist() == expected.tolist() and got.sum() == min(budget, limits.sum())


def test_keep_best_is_exact_with_ties_and_global():
    scores = {"one": jnp.zeros((2, 3)), "two": jnp.array([[5.0, 0.0]])}
    kept = jax.jit(lambda budget: keep_best(scores, {"one": 1, "two": 1}, budget))(4)
    assert kept["one"].tolist() == [[True, True, True], [False, False, False]] and kept["two"].tolist() == [
        [True, False]
    ]


def test_keep_best_pays_by_weight():
    scores = {"wide": jnp.array([3.0, 1.0]), "narrow": jnp.array([2.0, 0.5])}
    kept = keep_best(scores, {"wide": 3, "narrow": 1}, 6)
    assert kept["wide"].tolist() == [True, False] and kept["narrow"].tolist() == [True, False]


def test_a_budget_of_parameters_is_never_exceeded_on_the_host():
    sizes = {"a": (8, 8), "b": (64, 16), "c": (16, 128)}
    items = [Item(n, 1.0 + k, min(s), lambda r, s=s: r * sum(s)) for k, (n, s) in enumerate(sizes.items())]
    ranks = allocate(items, target=4, lowest=1, highest=8)
    spent = sum(ranks[n] * sum(s) for n, s in sizes.items())
    assert spent <= 4 * sum(map(sum, sizes.values())) < spent + max(map(sum, sizes.values()))
