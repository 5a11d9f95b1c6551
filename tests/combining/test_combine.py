"""Combining adapters: weighted sums are exact, merges of task vectors are the papers', one adapter alone stays what it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, delta, kernel, params_of

import lowrank_jax as lr
from lowrank_jax.forms import UnsupportedError

WEIGHT, STACK = kernel(10, 8), kernel(3, 10, 8)
PARAMS = params_of(WEIGHT)
METHODS = {
    "lora": lr.lora(3, 7), "rslora": lr.lora(3, 7, rank_stabilised=True), "lamda": lr.lamda(3, 6), "pissa": lr.pissa(2, 6),
    "lora_xs": lr.lora_xs(3, 7), "full": lr.full(), "dora": lr.dora(2, 6), "vera": lr.vera(rank=3),
    "chain": lr.build("chain", {"parts": (("lora", (("rank", 1),)), ("lora", (("rank", 2), ("alpha", 6.0))))}),
}  # fmt: skip


def moved(method, weight=WEIGHT, seed=0):
    """An adapter far from its start."""
    return move(adapt(weight, method), seed)


def move(adapters, seed):
    random = np.random.default_rng(seed)
    noise = lambda x: 0.3 * jnp.asarray(random.standard_normal(x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(lambda x: x + noise(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, adapters)


def update(adapters, weight=WEIGHT):
    """What merging adds to the weight, in float64; of no other path than through `merge`."""
    merged = lr.merge(params_of(weight), adapters)["layer"]["kernel"]
    return np.asarray(merged, np.float64) - np.asarray(weight, np.float64)


def rank_of(adapters):
    return dict(adapters.plan.entries[0].method.config)["rank"]


def same_bits(one, two):
    return one.plan == two.plan and jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), one, two))


@pytest.mark.parametrize("weight", [WEIGHT, STACK], ids=["matrix", "stack"])
@pytest.mark.parametrize("weights", [(0.7, -0.4, 2.0), (-1.0, 0.0, 0.5)], ids=str)
def test_a_weighted_sum_of_low_rank_updates_is_exact(weights, weight):
    """C50: ranks and scales differ, weights may be negative; nothing is decomposed."""
    parts = [moved(METHODS[name], weight, seed) for seed, name in enumerate(("lora", "pissa", "lora_xs"))]
    both, error = lr.combine(parts, weights)
    expected = sum(w * update(part, weight) for w, part in zip(weights, parts, strict=True))
    np.testing.assert_allclose(delta(both, weight), expected, atol=2e-5)
    assert error[PATH] < 1e-6
    wide = sum(rank for w, rank in zip(weights, (3, 4, 3), strict=True) if w)
    assert rank_of(both) == min(wide, 8)


@pytest.mark.parametrize("name", METHODS)
def test_one_adapter_with_weight_one_is_itself(name):
    """C50, where PEFT changes the outputs of rsLoRA and DoRA adapters."""
    adapters = moved(METHODS[name])
    for how in ({"method": "sum"}, {"method": "svd"}, {"method": "linear"}, {"method": "ties", "density": 1.0},
                {"method": "dare", "density": 1.0, "key": jax.random.key(0)}):  # fmt: skip
        alone, error = lr.combine([adapters], [1.0], **how)
        assert same_bits(alone, adapters) and error == {PATH: 0.0}
        assert same_bits(lr.combine([moved(lr.lora(1)), adapters], [0.0, 1.0], **how).adapters, adapters)


@pytest.mark.parametrize("name", METHODS)
def test_any_method_is_summed_through_its_update(name):
    """DoRA's and full updates depend on the weight: they are summed as matrices, into a full weight or, with a rank, into a LoRA."""
    one, two = moved(METHODS[name]), moved(lr.lora(2, 5), seed=1)
    both = lr.combine([one, two], [0.5, -2.0], params=PARAMS).adapters
    expected = 0.5 * update(one) - 2 * update(two)
    np.testing.assert_allclose(update(both), expected, atol=1e-5)
    assert both.plan.entries[0].method.name == ("full" if name in ("full", "dora") else "lora")
    cut, error = lr.combine([one, two], [0.5, -2.0], params=PARAMS, rank=2)
    s = np.linalg.svd(expected, compute_uv=False)
    best = np.sqrt((s[2:] ** 2).sum() / (s**2).sum())
    assert cut.plan.entries[0].method == lr.lora(2)
    assert error[PATH] == pytest.approx(best, rel=1e-3)
    assert np.linalg.norm(update(cut) - expected) / np.linalg.norm(expected) == pytest.approx(best, rel=1e-3)


def test_cutting_the_sum_to_a_rank():
    parts = [moved(lr.lora(2, 5)), moved(lr.lora(3), seed=1)]
    by_default, error = lr.combine(parts, [1.0, 1.0], "svd")
    assert rank_of(by_default) == 3 and 0 < error[PATH] < 1
    by_rank = lr.combine(parts, [1.0, 1.0], rank=3).adapters
    np.testing.assert_allclose(update(by_default), update(by_rank), atol=1e-6)
    almost, error = lr.combine(parts, [1.0, 1.0], "svd", rank=0.9)
    assert rank_of(almost) < 5 and error[PATH] <= np.sqrt(0.1)
    with pytest.raises(ValueError, match=f"full at {PATH} has no rank of its own; give 'svd' a rank="):
        lr.combine([moved(lr.full()), parts[0]], [1.0, 1.0], "svd", params=PARAMS)


def test_linear_has_the_cross_terms_that_the_sum_has_not():
    """By PEFT's formula, the sign of a negative weight on one factor only."""
    one, two = moved(lr.lora(2, 5)), moved(lr.lora(2, 3), seed=1)
    got = lr.combine([one, two], [0.5, -2.0], "linear").adapters
    f, g = (jax.tree.map(lambda x: np.asarray(x, np.float64), x.sites[PATH]) for x in (one, two))
    left, right = np.sqrt(0.5 * 2.5), np.sqrt(2 * 1.5)
    expected = (left * f["a"] - right * g["a"]) @ (left * f["b"] + right * g["b"])
    np.testing.assert_allclose(update(got), expected, atol=1e-5)
    assert rank_of(got) == 2
    assert np.abs(update(got) - (0.5 * update(one) - 2 * update(two))).max() > 0.1
    with pytest.raises(ValueError, match=rf"at {PATH} they have \[2, 3\]; use 'sum' or 'svd'"):
        lr.combine([one, moved(lr.lora(3))], [1.0, 1.0], "linear")
    with pytest.raises(UnsupportedError, match=f"full at {PATH} has none that are low-rank; use 'sum'"):
        lr.combine([one, moved(lr.full())], [1.0, 1.0], "linear", params=PARAMS)


def numpy_trim(vector, density):
    """All but the largest entries of a flat vector are zero."""
    kept = np.argsort(-np.abs(vector), kind="stable")[: int(density * len(vector))]
    return np.where(np.isin(np.arange(len(vector)), kept), vector, 0)


def numpy_ties(vectors, sign="total"):
    """Algorithm 1 of the paper, entry by entry, without its scale."""
    out = np.zeros(vectors.shape[1])
    for p, column in enumerate(vectors.T):
        more = np.sign(column).sum() if sign == "frequency" else 0
        elected = np.sign(more or column.sum())
        agree = [value for value in column if np.sign(value) == elected != 0]
        out[p] = np.mean(agree) if agree else 0
    return out


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("scope", ["model", "matrix"])
def test_ties_is_the_paper(scope, sign):
    """Two weights of different magnitude: over the model, most of the smaller one's entries go; over a matrix its share is kept."""
    params = {"one": {"kernel": WEIGHT}, "two": {"kernel": WEIGHT[:6]}}
    random = np.random.default_rng(0)
    changes = [{"one/kernel": random.standard_normal((10, 8)), "two/kernel": 0.2 * random.standard_normal((6, 8))}
               for _ in range(3)]  # fmt: skip
    parts = []
    for change in changes:
        adapters = lr.init(jax.random.key(0), params, lr.plan(params, {".*": lr.full()}))
        weights = {p: {"weight": leaves["weight"] + change[p]} for p, leaves in adapters.sites.items()}
        parts.append(adapters.replace(sites=weights))
    weights = [1.0, -0.5, 2.0]
    got = lr.combine(parts, weights, "ties", params=params, density=0.3, scope=scope, sign=sign).adapters
    flat = [np.concatenate([change[p].ravel() for p in sorted(change)]) for change in changes]
    if scope == "model":
        trimmed = [numpy_trim(x, 0.3) for x in flat]
    else:
        trimmed = [np.concatenate([numpy_trim(x[:80], 0.3), numpy_trim(x[80:], 0.3)]) for x in flat]
    expected = numpy_ties(np.stack([w * x for w, x in zip(weights, trimmed, strict=True)]), sign)
    for path, wanted in (("one/kernel", expected[:80]), ("two/kernel", expected[80:])):
        base = params[path[:3]]["kernel"]
        np.testing.assert_allclose(got.sites[path]["weight"] - base, wanted.reshape(base.shape), atol=1e-6)
    small = np.count_nonzero(trimmed[0][80:])
    assert small == 14 if scope == "matrix" else small < 7


def test_pruning_by_magnitude_and_a_rank():
    one, two = moved(lr.lora(3, 7)), moved(lr.lora(2), seed=1)
    got = lr.combine([one, two], [0.5, -1.0], "magnitude_prune", params=PARAMS, density=0.25).adapters
    trimmed = [numpy_trim(np.asarray(delta(x, WEIGHT), np.float64).ravel(), 0.25).reshape(10, 8) for x in (one, two)]
    expected = 0.5 * trimmed[0] - trimmed[1]
    np.testing.assert_allclose(update(got), expected, atol=1e-6)
    cut, error = lr.combine([one, two], [0.5, -1.0], "magnitude_prune", density=0.25, rank=4)  # needs no base
    assert rank_of(cut) == 4
    assert np.linalg.norm(update(cut) - expected) / np.linalg.norm(expected) == pytest.approx(error[PATH], rel=1e-3)


def test_dare_drops_independently_and_keeps_the_mean():
    """Every entry is either gone or rescaled; over keys the mean is the sum; nothing depends on the weight."""
    one, two = moved(lr.lora(3, 7)), moved(lr.lora(2), seed=1)
    deltas = [np.asarray(delta(x, WEIGHT), np.float64) for x in (one, two)]
    draw = lambda n, weights: update(lr.combine([one, two], weights, "dare", params=PARAMS, density=0.25,  # noqa: E731
                                                key=jax.random.key(n)).adapters)  # fmt: skip
    first, second = draw(0, [1.0, 0.0]), draw(0, [0.0, 1.0])
    for got, whole in ((first, deltas[0]), (second, deltas[1])):
        kept = np.abs(got) > 1e-5
        np.testing.assert_allclose(got, np.where(kept, 4 * whole, 0), atol=1e-5)
        assert 5 <= kept.sum() <= 40  # of 80 at a quarter each: 20, with a deviation of 3.9
    assert ((np.abs(first) > 1e-5) != (np.abs(second) > 1e-5)).any()
    np.testing.assert_allclose(draw(0, [0.5, -1.0]), 0.5 * first - second, atol=1e-5)
    mean = np.mean([draw(n, [1.0, 0.0]) for n in range(200)], 0)
    deviation = np.abs(deltas[0]) * np.sqrt(3 / 200)  # of the mean of 200 draws of (0 or 4) x
    assert (np.abs(mean - deltas[0]) <= 5 * deviation + 1e-5).all()


def test_dare_ties_elects_among_what_was_kept():
    one, two = moved(lr.lora(3, 7)), moved(lr.lora(2), seed=1)
    how = {"params": PARAMS, "density": 0.5, "key": jax.random.key(3)}
    alone = [update(lr.combine([one, two], w, "dare", **how).adapters) for w in ([1.0, 0.0], [0.0, -2.0])]
    got = update(lr.combine([one, two], [1.0, -2.0], "dare_ties", **how).adapters)
    clean = np.stack([np.where(np.abs(x) > 1e-5, x, 0).ravel() for x in alone])
    np.testing.assert_allclose(got.ravel(), numpy_ties(clean), atol=1e-5)


@pytest.mark.parametrize("method", ["sum", "ties"])
def test_sites_and_layers_of_one_adapter_only(method):
    """What others do not change is their zero: it is neither averaged nor decomposed."""
    params = {"layer": params_of(STACK)["layer"], "more": {"kernel": WEIGHT}}
    make = lambda rules, seed: move(lr.init(jax.random.key(seed), params, lr.plan(params, rules)), seed)  # noqa: E731
    one = make({"layer/kernel": lr.on_layers(lr.lora(2, 5), [0, 1])}, 1)
    two = make({"layer/kernel": lr.on_layers(lr.lora(1), [1]), "more": lr.vera(rank=3)}, 2)
    how = {"density": 1.0} if method == "ties" else {}
    got = lr.combine([one, two], [1.0, 1.0], method, params=params, **how).adapters
    base = params["layer"]["kernel"]
    changes = [np.asarray(lr.merge(params, x)["layer"]["kernel"] - base, np.float64) for x in (one, two)]
    change = np.asarray(lr.merge(params, got)["layer"]["kernel"] - base, np.float64)
    np.testing.assert_allclose(change[0], changes[0][0], atol=1e-5)
    assert (lr.merge(params, got)["layer"]["kernel"][2] == base[2]).all()
    if method == "sum":
        np.testing.assert_allclose(change[1], changes[0][1] + changes[1][1], atol=1e-5)
        assert got.plan.by_path["layer/kernel"].layers == (0, 1)
        assert rank_of(got) == (2, 3)
    np.testing.assert_allclose(
        lr.merge(params, got)["more"]["kernel"], lr.merge(params, two)["more"]["kernel"], atol=1e-5
    )
    assert not got.shared


def test_biases_and_norms_are_task_vectors_too():
    params = {"norm": {"scale": jnp.ones(6)}, "layer": {"kernel": WEIGHT}}
    make = lambda seed: jax.tree.map(  # noqa: E731
        lambda x: x + seed,
        lr.init(jax.random.key(seed), params, lr.plan(params, {"norm": lr.full(), "layer": lr.lora(2)})),
    )
    got, error = lr.combine([make(1), make(2)], [1.0, -3.0], params=params, rank=2)
    assert {p: e.method.name for p, e in got.plan.by_path.items()} == {"norm/scale": "full", "layer/kernel": "lora"}
    np.testing.assert_allclose(lr.merge(params, got)["norm"]["scale"], np.full(6, 1 + 1 - 6), atol=1e-6)
    assert error["norm/scale"] == 0.0


def test_what_cannot_be_combined_says_so():
    one, two = moved(lr.lora(2)), moved(lr.lora(3))
    nonlinear = moved(lr.bottleneck(width=2, activation="gelu"))
    with pytest.raises(UnsupportedError, match=f"{PATH}: .*'gelu' is not a linear update.*see lowrank_jax.add"):
        lr.combine([one, nonlinear], [1.0, 1.0], params=PARAMS)
    with pytest.raises(ValueError, match=f"{PATH}: the update of full depends on the weight; pass params="):
        lr.combine([one, moved(lr.full())], [1.0, 1.0])
    with pytest.raises(ValueError, match=f"{PATH}: the result is a full weight.* pass params=, or rank="):
        lr.combine([one, two], [1.0, 1.0], "ties", density=0.5)
    with pytest.raises(ValueError, match="combine: the adapter is a stack"):
        lr.combine([lr.stack([one])], [1.0])
    with pytest.raises(ValueError, match="combine: the adapter is folded"):
        lr.combine([one, lr.fold(PARAMS, moved(lr.pissa(2)))[1]], [1.0, 1.0])
    other = lr.init(jax.random.key(0), params_of(WEIGHT.T), lr.plan(params_of(WEIGHT.T), {"layer": lr.lora(2)}))
    with pytest.raises(ValueError, match=f"{PATH} is another weight for one adapter"):
        lr.combine([one, other], [1.0, 1.0])


@pytest.mark.parametrize(
    "how, message",
    [
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"weights": [1.0, np.nan]}, "expected finite numbers"),
        ({"weights": [0.0, 0.0]}, "not all of them 0"),
        ({"method": "cat"}, "expected one of 'sum'"),
        ({"method": "ties"}, "they need it; 'ties' got None"),
        ({"density": 0.5}, "density= is for ties, dare"),
        ({"method": "ties", "density": 0.0}, r"expected a share in \(0, 1\]"),
        ({"method": "ties", "density": 1.5}, r"expected a share in \(0, 1\]"),
        ({"method": "dare", "density": 0.5}, "key= is for 'dare'"),
        ({"key": jax.random.key(0)}, "key= is for 'dare'"),
        ({"sign": "frequency"}, "'sum' elects no sign"),
        ({"sign": "most"}, "expected one of 'total', 'frequency'"),
        ({"scope": "layer"}, "expected one of 'model', 'matrix'"),
        ({"rank": 0}, "rank=0: expected at least 1"),
    ],
)
def test_bad_options_are_refused(how, message):
    how = {"weights": [1.0, 1.0], **how}
    with pytest.raises(ValueError, match=message):
        lr.combine([moved(lr.lora(2)), moved(lr.lora(3))], **how)
