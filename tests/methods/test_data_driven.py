"""LoRA-GA, CorDA, LoRA-SB, SVFit, LoLDU, CoLoRA: where they start, by the equations of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, delta, kernel, leaves_of, params_of
from scipy.linalg import lu

import lowrank_jax as lr
from lowrank_jax.sites import flatten
from lowrank_jax.stats.statistics import Statistics, fingerprint

K, G = kernel(12, 10), kernel(12, 10, seed=5)
SPREAD = np.diag(np.float32(2.0) ** np.arange(6, -6, -1))
C = jnp.asarray((lambda m: m @ SPREAD @ m.T)(np.linalg.qr(np.asarray(kernel(12, 12, seed=6)))[0]))
RANK, SCALE = 4, 2.0


def start(method, weight=K, **values):
    """The adapter of a method that is given these statistics."""
    found = Statistics({kind: {PATH: value} for kind, value in values.items()}, {PATH: fingerprint(weight)})
    plan = lr.plan(params_of(weight), {"layer/kernel": method}, statistics=found)
    return lr.init(jax.random.key(0), params_of(weight), plan, statistics=found)


def residual(adapters, weight=K):
    """What the base is once the anchor is folded into it."""
    return np.asarray(lr.fold(params_of(weight), adapters)[0]["layer"]["kernel"], np.float64)


def svd(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)


def truncated(matrix, rank):
    u, s, vt = svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("size", ["stable", "gd", "unit"])
def test_lora_ga_first_moves_along_the_best_approximation_of_the_gradient(size):
    method = lr.lora_ga(rank=RANK, alpha=RANK * SCALE, rank_stabilised=False, size=size, svd="exact")
    p = leaves_of(start(method, gradient=G))
    c = {"stable": 10**0.25 / 4, "gd": 1 / SCALE, "unit": 1.0}[size]
    np.testing.assert_allclose(p["a"].T @ p["a"], c**2 * np.eye(RANK), atol=1e-5)
    np.testing.assert_allclose(p["b"] @ p["b"].T, c**2 * np.eye(RANK), atol=1e-5)
    g = np.asarray(G, np.float64)
    moved = p["a"] @ p["a"].T @ g + g @ p["b"].T @ p["b"]
    assert np.linalg.norm(moved / c**2 - truncated(G, 2 * RANK)) < 1e-5 * np.linalg.norm(g)
    # The control: the same singular directions on both sides move twice along the first r and not at all along the others.
    u, _, vt = svd(G)
    same = u[:, :RANK] @ u[:, :RANK].T @ g + g @ vt[:RANK].T @ vt[:RANK]
    assert np.linalg.norm(same - truncated(G, 2 * RANK)) > 0.1 * np.linalg.norm(g)


def test_lora_ga_starts_at_the_base():
    adapters = start(lr.lora_ga(rank=RANK), gradient=G)
    p = leaves_of(adapters)
    scale = 16 / RANK**0.5
    np.testing.assert_allclose(residual(adapters) + scale * p["a"] @ p["b"], K, atol=1e-5)
    with pytest.raises(ValueError, match="lora_ga at layer/kernel: rank 6 is not between 1 and 5"):
        start(lr.lora_ga(rank=6), gradient=G)


@pytest.mark.parametrize("mode", ["instruction_previewed", "knowledge_preserved"])
def test_corda_takes_components_that_the_inputs_orient(mode):
    adapters = start(lr.corda(rank=RANK, alpha=RANK * SCALE, mode=mode, damping=1e-6), covariance=C)
    p = leaves_of(adapters)
    np.testing.assert_allclose(residual(adapters) + SCALE * p["a"] @ p["b"], K, atol=1e-4)
    c = np.asarray(C, np.float64)
    u, s, vt = svd(c @ np.asarray(K, np.float64))
    chosen = slice(None, RANK) if mode == "instruction_previewed" else slice(10 - RANK, None)
    expected = (u[:, chosen] * s[chosen]) @ vt[chosen]
    np.testing.assert_allclose(c @ (SCALE * p["a"] @ p["b"]), expected, atol=2e-3 * s[0])


def test_corda_with_plain_inputs_is_pissa_and_otherwise_keeps_more_of_the_context():
    pissa = leaves_of(adapt(K, lr.pissa(rank=RANK, svd="exact")))
    plain = leaves_of(start(lr.corda(rank=RANK, damping=1e-6), covariance=jnp.eye(12)))
    np.testing.assert_allclose(plain["a"] @ plain["b"], pissa["a"] @ pissa["b"], atol=1e-4)
    c, k = np.asarray(C, np.float64), np.asarray(K, np.float64)
    kept = start(lr.corda(rank=RANK, mode="knowledge_preserved", damping=1e-6), covariance=C)
    minor = k - truncated(K, 10 - RANK)  # what dropping the least singular values of the weight itself takes away
    lost = np.linalg.norm(c @ (k - residual(kept)))
    assert lost < 0.9 * np.linalg.norm(c @ minor)


def test_corda_survives_a_covariance_without_an_inverse():
    for c in (jnp.zeros((12, 12)), jnp.diag(jnp.arange(12) < 3).astype(jnp.float32)):
        adapters = start(lr.corda(rank=RANK), covariance=c)
        assert all(np.isfinite(leaf).all() for leaf in leaves_of(adapters).values())
        np.testing.assert_allclose(K + delta(adapters, K), K, atol=1e-5)


@pytest.mark.parametrize("mode", ["instruction_previewed", "knowledge_preserved"])
def test_corda_does_not_depend_on_the_unit_of_the_inputs(mode):
    one, other = (leaves_of(start(lr.corda(rank=RANK, mode=mode), covariance=s * C)) for s in (1.0, 1e6))
    for name in ("a", "b"):
        np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-4 * np.abs(one[name]).max())


def test_lora_sb_starts_one_step_ahead_and_lowers_the_loss():
    rate = 1e-3
    adapters = start(lr.lora_sb(rank=RANK, rate=rate, svd="exact"), gradient=G)
    p = leaves_of(adapters)
    np.testing.assert_allclose(p["a"].T @ p["a"], np.eye(RANK), atol=1e-5)
    np.testing.assert_allclose(p["b"] @ p["b"].T, np.eye(RANK), atol=1e-5)
    values = np.diagonal(p["m"])
    assert (np.diff(values) <= 0).all() and not (p["m"] - np.diag(values)).any()
    np.testing.assert_allclose(delta(adapters, K), truncated(-rate * np.sign(G), RANK), atol=1e-6)
    x, target = kernel(7, 12, seed=1), kernel(7, 10, seed=2)
    loss = lambda w: jnp.mean((x @ w - target) ** 2)  # noqa: E731
    ahead = start(lr.lora_sb(rank=RANK, rate=rate), gradient=jax.grad(loss)(K))
    assert loss(K + delta(ahead, K)) < loss(K)  # subtracted from the base it would be equal


def test_svfit_turns_singular_values_and_nothing_else():
    adapters = adapt(K, lr.svfit(rank=10, svd="exact"))
    assert not np.asarray(delta(adapters, K)).any()
    np.testing.assert_allclose(residual(adapters), 0, atol=1e-5)
    values = np.linspace(-3, 4, 10)
    moved = adapters.replace(sites={PATH: {**adapters.sites[PATH], "e": jnp.asarray(values, jnp.float32)}})
    merged = np.asarray(K + delta(moved, K))
    np.testing.assert_allclose(svd(merged)[1], sorted(np.abs(values), reverse=True), atol=1e-4)
    u, _, vt = svd(K)
    framed = u.T @ np.asarray(delta(moved, K), np.float64) @ vt.T
    np.testing.assert_allclose(framed - np.diag(np.diagonal(framed)), 0, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 10), (10, 12), (3, 9, 9)])
def test_loldu_factors_the_weight_and_leaves_nothing_at_full_rank(shape):
    weight = kernel(*shape)
    full = min(shape[-2:])
    adapters = adapt(weight, lr.loldu(rank=full, alpha=full))
    np.testing.assert_allclose(residual(adapters, weight), 0, atol=1e-4)
    assert not np.asarray(delta(adapters, weight)).any()
    some = adapt(weight, lr.loldu(rank=4, alpha=8))
    p = leaves_of(some)
    anchor = 2 * np.einsum("...ir,...r,...ro->...io", p["a"], p["e0"], p["b"])
    np.testing.assert_allclose(residual(some, weight) + anchor, weight, atol=1e-4)
    # a is unit upper triangular transposed: ones on its diagonal, zeros above.
    top = p["a"][..., :4, :]
    np.testing.assert_allclose(np.diagonal(top, axis1=-2, axis2=-1), 1, atol=1e-6)
    assert not np.triu(top, 1).any()


def test_loldu_of_a_weight_that_ignores_inputs_has_no_long_directions():
    # Their pivots are zero, or nearly, and the rows of U behind them are not.
    weight = kernel(12, 10) * jnp.ones((12, 1)).at[jnp.array([2, 5])].set(jnp.array([[0.0], [1e-7]]))
    p = leaves_of(adapt(weight, lr.loldu(rank=10)))
    assert np.abs(p["a"]).max() < 10
    np.testing.assert_allclose(np.einsum("ir,r,ro->io", p["a"], p["e"], p["b"]), weight, atol=1e-5)
    p = leaves_of(adapt(jnp.zeros((12, 10)), lr.loldu(rank=10)))
    np.testing.assert_array_equal(p["a"], np.eye(12, 10))
    assert not p["e"].any()


@pytest.mark.parametrize("method", [lr.svfit(rank=RANK, svd="exact"), lr.loldu(rank=RANK, alpha=RANK)])
def test_a_trained_diagonal_gets_the_gradient_in_its_frame(method):
    adapters = adapt(K, method)
    train, frozen = lr.partition(adapters)
    assert set(train[PATH]) == {"e"}
    gradient = jax.grad(lambda train: jnp.vdot(G, delta(lr.join(train, frozen), K)))(train)[PATH]["e"]
    if method.name == "svfit":
        left, _, right = svd(K)
        left, right = left[:, :RANK], right[:RANK]
    else:  # of the transpose, as the paper has it
        permutation, lower, upper = lu(np.asarray(K, np.float64).T)
        left, right = (upper / np.diag(upper)[:, None])[:RANK].T, (permutation @ lower)[:, :RANK].T
    np.testing.assert_allclose(gradient, np.einsum("ir,io,ro->r", left, np.asarray(G), right), atol=1e-4)


def test_loldu_of_a_singular_weight_is_finite():
    adapters = adapt(kernel(12, 2) @ kernel(2, 10, seed=3), lr.loldu(rank=10))
    assert all(np.isfinite(leaf).all() for leaf in leaves_of(adapters).values())


def test_colora_shares_one_budget_among_weights_of_all_shapes():
    params = {"small": {"kernel": kernel(12, 10)}, "large": {"kernel": kernel(30, 20)}}
    flat = flatten(params)
    contribution = {"small/kernel": jnp.float32(3), "large/kernel": jnp.float32(1)}
    found = Statistics({"contribution": contribution}, {path: fingerprint(w) for path, w in flat.items()})
    for budget, total in (("parameters", 4 * (22 + 50)), ("rank", 8)):
        plan = lr.plan(params, {".*": lr.colora(rank=4, budget=budget)}, statistics=found)
        ranks = {e.site.path: dict(e.method.config)["rank"] for e in plan.entries}
        assert ranks["small/kernel"] > 4 > ranks["large/kernel"]
        spent = plan.trainable if budget == "parameters" else sum(ranks.values())
        assert total - (22 if budget == "parameters" else 1) < spent <= total


def test_colora_scales_all_layers_alike():
    alone, stack = {f"layers_{n}": {"kernel": kernel(12, 10, seed=n)} for n in range(3)}, kernel(3, 12, 10)
    values = jnp.array([0.2, 2.0, 0.8])
    found = [
        (params_of(stack), {PATH: values}),
        (alone, {f"layers_{n}/kernel": values[n] for n in range(3)}),
    ]
    scales = set()
    for params, contribution in found:
        prints = {path: fingerprint(flatten(params)[path]) for path in contribution}
        plan = lr.plan(
            params,
            {".*kernel": lr.colora(rank=4, alpha=8)},
            statistics=Statistics({"contribution": contribution}, prints),
        )
        forms = lr.expand(lr.init(jax.random.key(0), params, plan))
        scales |= {form.scale for form in forms.values()}
    assert scales == {2.0}


def test_colora_gives_rank_to_what_contributes_within_the_budget():
    weight = kernel(3, 12, 10)
    found = Statistics({"contribution": {PATH: jnp.array([0.2, 2.0, 0.8])}}, {PATH: fingerprint(weight)})
    plan = lr.plan(params_of(weight), {"layer/kernel": lr.colora(rank=4, budget="rank")}, statistics=found)
    ranks = dict(plan.entries[0].method.config)["rank"]
    assert sum(ranks) == 12 and ranks[0] < ranks[2] < ranks[1]
    assert dict(plan.entries[0].method.config)["alpha"] / max(ranks) == 1
    equal = Statistics({"contribution": {PATH: jnp.ones(3)}}, {PATH: fingerprint(weight)})
    plan = lr.plan(params_of(weight), {"layer/kernel": lr.colora(rank=4)}, statistics=equal)
    assert dict(plan.entries[0].method.config)["rank"] == (4, 4, 4)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: lr.lora_ga(size="big"), r"lora_ga\(size="), (lambda: lr.lora_ga(gamma=0), r"lora_ga\(gamma="),
        (lambda: lr.corda(mode="both"), r"corda\(mode="), (lambda: lr.corda(damping=0), r"corda\(damping="),
        (lambda: lr.corda(svd="full"), r"corda\(svd="),
        (lambda: lr.lora_sb(rate=-1), r"lora_sb\(rank=32, rate="), (lambda: lr.svfit(svd="full"), r"svfit\(svd="),
        (lambda: lr.colora(budget="bytes"), r"colora\(budget="), (lambda: lr.colora(rank=0), r"colora\(rank="),
    ],
)  # fmt: skip
def test_bad_fields_are_refused(make, field):
    with pytest.raises(ValueError, match=field):
        make()


def test_statistics_that_are_missing_or_of_another_weight_are_refused():
    plan = lr.plan(params_of(K), {"layer/kernel": lr.lora_ga(rank=2)})
    with pytest.raises(ValueError, match="lora_ga at layer/kernel needs the gradient.*lowrank_jax.collect"):
        lr.init(jax.random.key(0), params_of(K), plan)
    other = Statistics({"gradient": {PATH: G}}, {PATH: fingerprint(kernel(12, 10, seed=9))})
    with pytest.raises(ValueError, match="layer/kernel: its gradient was collected on another weight"):
        lr.init(jax.random.key(0), params_of(K), plan, statistics=other)
    wrong = Statistics({"covariance": {PATH: C}}, {PATH: fingerprint(K)})
    with pytest.raises(ValueError, match="layer/kernel: its gradient was not collected"):
        lr.init(jax.random.key(0), params_of(K), plan, statistics=wrong)
    with pytest.raises(ValueError, match="colora at layer/kernel needs the contribution"):
        lr.plan(params_of(K), {"layer/kernel": lr.colora(rank=2)})
