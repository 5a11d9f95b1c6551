"""LaMDA++: who gets how much rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr


def with_spectrum(sigma, seed, n_in=24, n_out=20):
    """A weight of Frobenius norm 1 with the given singular values in random directions."""
    random = np.random.default_rng(seed)
    u, v = (np.linalg.qr(random.standard_normal((n, n)))[0][:, : len(sigma)] for n in (n_in, n_out))
    weight = (u * sigma) @ v.T
    return jnp.asarray(weight / np.linalg.norm(weight), jnp.float32)


FLAT, MIDDLE, STEEP = np.ones(20), 0.85 ** np.arange(20), 0.5 ** np.arange(20)


def ranks(weights, method=None):
    """``{name: rank}`` that a plan gives to ``{name: weight}``."""
    params = {name: {"kernel": weight} for name, weight in weights.items()}
    plan = lr.plan(params, {".*": method or lr.lamda_pp(rank=4)})
    return {entry.site.module: dict(entry.method.config)["rank"] for entry in plan.entries}


def test_the_flatter_spectrum_gets_more_rank():
    got = ranks({"flat": with_spectrum(FLAT, 0), "middle": with_spectrum(MIDDLE, 1), "steep": with_spectrum(STEEP, 2)})
    assert got["flat"] > got["middle"] > got["steep"] >= 1
    assert sum(got.values()) == 3 * 4


def test_scaling_a_weight_changes_nothing():
    """An unnormalised score would favour the large weight, whatever its spectrum."""
    weights = {"flat": with_spectrum(FLAT, 0), "steep": with_spectrum(STEEP, 1)}
    expected = ranks(weights)
    assert expected["flat"] > expected["steep"]
    for factor in (100.0, -1e-3):
        assert ranks({**weights, "steep": factor * weights["steep"]}) == expected


def test_equal_spectra_get_equal_ranks():
    assert ranks({f"layer_{n}": with_spectrum(MIDDLE, n) for n in range(5)}) == {f"layer_{n}": 4 for n in range(5)}


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_rank_budget_is_spent_exactly(n):
    decays = np.linspace(0.5, 1.0, n)
    got = ranks(
        {f"w{i}": with_spectrum(decay ** np.arange(20), i) for i, decay in enumerate(decays)}, lr.lamda_pp(rank=5)
    )
    assert sum(got.values()) == 5 * n
    assert all(1 <= r <= 10 for r in got.values())
    assert [got[f"w{i}"] for i in range(n)] == sorted(got.values())


@pytest.mark.parametrize(("budget", "cost"), [("core", lambda r: r * r), ("parameters", lambda r: 44 * r)])
def test_other_budgets_are_never_exceeded(budget, cost):
    got = ranks(
        {f"w{i}": with_spectrum(d ** np.arange(20), i) for i, d in enumerate((0.5, 0.8, 0.9, 1.0))},
        lr.lamda_pp(rank=4, budget=budget),
    )
    assert 0.6 * 4 * cost(4) <= sum(map(cost, got.values())) <= 4 * cost(4)


def test_candidates_are_the_only_ranks():
    got = ranks(
        {f"w{i}": with_spectrum(d ** np.arange(20), i) for i, d in enumerate((0.5, 0.7, 0.9, 1.0))},
        lr.lamda_pp(rank=4, candidates=(2, 4, 8)),
    )
    assert set(got.values()) <= {2, 4, 8} and sum(got.values()) <= 16
    assert got["w0"] < got["w3"]


def test_noise_does_not_lower_a_rank():
    other, low = with_spectrum(MIDDLE, 0), with_spectrum(np.ones(3), 1)
    noisy = low + 0.1 * jnp.asarray(np.random.default_rng(2).standard_normal(low.shape), jnp.float32)
    assert ranks({"other": other, "low": noisy})["low"] >= ranks({"other": other, "low": low})["low"]


def test_weights_are_compared_within_their_shape():
    """At a fixed rank a small weight always shows more of its energy: it must not lose its rank to a large one for that."""
    large, small = with_spectrum(FLAT, 0), with_spectrum(np.ones(8), 1, n_in=8, n_out=8)
    assert ranks({"large": large, "small": small}) == {"large": 4, "small": 4}
    together = ranks({"large": large, "small": small}, lr.lamda_pp(rank=4, compare="all"))
    assert together["large"] > together["small"]


def test_the_order_of_the_weights_does_not_matter():
    weights = {f"w{i}": with_spectrum(d ** np.arange(20), i) for i, d in enumerate((0.6, 0.6, 0.9, 0.9, 1.0))}
    assert ranks(dict(reversed(weights.items()))) == ranks(weights)


def test_a_stack_gets_a_rank_for_each_layer():
    stack = jnp.stack([with_spectrum(s, n) for n, s in enumerate((FLAT, STEEP, MIDDLE))])
    params = {"layers": {"kernel": stack, "bias": jnp.zeros((3, 20))}}
    plan = lr.plan(params, {".*": lr.lamda_pp(rank=4)})
    rank = dict(plan.entries[0].method.config)["rank"]
    alone = ranks({f"layer_{n}": stack[n] for n in range(3)})
    assert rank == tuple(alone.values()) and sum(rank) == 12 and rank[0] > rank[2] > rank[1]
    assert plan.entries[0].method.name == "lamda"
    adapters = lr.init(jax.random.key(0), params, plan)
    assert adapters.sites["layers/kernel"]["m"].shape == (3, max(rank), max(rank))
    assert plan.count(9, 10) == sum(r * r for r in rank)


def test_ranks_need_the_weights():
    abstract = {"x": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}
    with pytest.raises(ValueError, match="lamda_pp reads the weights to allocate ranks; x/kernel is only a shape"):
        lr.plan(abstract, {"x": lr.lamda_pp(rank=2)})


@pytest.mark.parametrize("fields", [{"budget": "bytes"}, {"compare": "names"}, {"rank": 0}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"lamda_pp\\({next(iter(fields))}="):
        lr.lamda_pp(**fields)
