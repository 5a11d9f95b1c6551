"""Any method as a LoRA: exact where the form is low-rank, the nearest LoRA of a rank elsewhere, or a clear refusal."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance_case import case_of
from conformance_methods import METHODS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from one_layer import PATH, adapt, delta, kernel, params_of

import lowrank_jax as lr
from lowrank_jax import checkpoint, shard
from lowrank_jax.forms import UnsupportedError
from lowrank_jax.sites import flatten

WEIGHT, STACK = kernel(10, 8), kernel(3, 10, 8)
LOW_RANK = [lr.lora(3, 7), lr.lamda(3, 6), lr.pissa(2, 6), lr.lora_xs(3, 7), lr.lora(3, 2, rank_stabilised=True)]


def moved(method, weight=WEIGHT, seed=0):
    """An adapter far from its start."""
    random = np.random.default_rng(seed)
    move = lambda x: x + 0.3 * jnp.asarray(random.standard_normal(x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(move, adapt(weight, method))


def exact_delta(adapters, weight=WEIGHT):
    """The update in float64, of one matrix."""
    return np.asarray(delta(adapters, weight), np.float64)


def rank_of(adapters):
    return dict(adapters.plan.entries[0].method.config)["rank"]


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_every_method_converts_or_says_why_not(row):
    """The LoRA is the update that merging adds, and what a smaller rank leaves out is what it says it leaves out."""
    case = case_of(row, "linen", "mixed", "plain")
    adapters, params = case.moved(), case.model.params
    base = flatten(params)
    merged = flatten(lr.merge(params, adapters)) if case.mergeable else {}
    if any((merged[path] != base[path]).any() for path in merged.keys() - adapters.sites.keys()) or not merged:
        with pytest.raises(UnsupportedError, match="kernel|embedding"):  # a bias that moves, or no linear update at all
            lr.to_lora(params, adapters)
        return
    converted, error = lr.to_lora(params, adapters)
    assert {e.method.name for e in converted.plan.entries} == {"lora"}
    assert error.keys() == case.plan.by_path.keys() and max(error.values()) < 1e-5
    smaller, error = lr.to_lora(None, converted, rank=2)
    for entry in case.plan.entries:
        path = entry.site.path
        whole, part = (_product(lr.pad(x, 99).sites[path]) for x in (converted, smaller))
        wanted = np.asarray(entry.site.canonical(merged[path] - base[path]), np.float64)
        assert conformance.difference(whole, wanted) <= conformance.TOLERANCE
        s = np.linalg.svd(wanted, compute_uv=False)
        best = np.sqrt((s[2:] ** 2).sum() / (s**2).sum())
        assert error[path] == pytest.approx(best, abs=2e-5)  # Eckart-Young: no matrix of that rank is nearer
        assert np.linalg.norm(wanted - part) / np.linalg.norm(wanted) == pytest.approx(best, abs=2e-5)


def _product(leaves):
    return np.asarray(leaves["a"], np.float64) @ np.asarray(leaves["b"], np.float64)


@pytest.mark.parametrize("method", LOW_RANK, ids=str)
@pytest.mark.parametrize("weight", [WEIGHT, STACK, kernel(8, 12)], ids=["matrix", "stack", "wide"])
def test_low_rank_forms_convert_exactly(method, weight):
    """By the formula in float64: no decomposition is made of them, so the ranks are those of the factors."""
    adapters = moved(method, weight)
    converted, error = lr.to_lora(None, adapters)
    f = {name: np.asarray(leaf, np.float64) for name, leaf in adapters.sites[PATH].items()}
    scale = {"lora": 7 / 3, "lamda": 2, "pissa": 3, "lora_xs": 7 / 3}[method.name]
    scale = 2 / np.sqrt(3) if dict(method.config).get("rank_stabilised") else scale
    expected = {
        "lora": lambda: f["a"] @ f["b"], "lora_xs": lambda: f["a"] @ f["m"] @ f["b"],
        "lamda": lambda: f["a"] @ (f["m"] @ f["b"] - f["m0"] @ f["b0"]), "pissa": lambda: f["a"] @ f["b"] - f["a0"] @ f["b0"],
    }[method.name]()  # fmt: skip
    np.testing.assert_allclose(delta(converted, weight), scale * expected, atol=3e-6)
    assert error == {PATH: 0.0}
    assert rank_of(converted) == {"pissa": 4}.get(method.name, 3)


def test_a_lora_within_the_rank_keeps_its_bits():
    adapters = moved(lr.lora(3, 7))
    for rank in (None, 3, 5):
        converted, error = lr.to_lora(None, adapters, rank)
        assert converted.plan == adapters.plan and error == {PATH: 0.0}
        assert converted.sites[PATH] is adapters.sites[PATH]
    assert rank_of(lr.to_lora(None, adapters, 2).adapters) == 2


def test_factors_wider_than_the_weight_become_as_small_as_it():
    """PiSSA with its anchor has twice its rank, more than the matrix here has."""
    adapters = moved(lr.pissa(6))
    converted, error = lr.to_lora(None, adapters)
    assert rank_of(converted) == 8 and error[PATH] < 1e-6
    np.testing.assert_allclose(delta(converted, WEIGHT), delta(adapters, WEIGHT), atol=1e-5)


@pytest.mark.parametrize("weight", [WEIGHT, STACK], ids=["matrix", "stack"])
def test_energy_chooses_the_smallest_rank_that_holds_it(weight):
    """C51: monotone, and by the singular values of a full update in float64."""
    adapters = moved(lr.full(), weight)
    update = exact_delta(adapters, weight).reshape(-1, 10, 8)
    energies = [np.cumsum(s**2) / (s**2).sum() for s in np.linalg.svd(update, compute_uv=False)]
    before, last = 0, 2.0
    for share in (0.1, 0.5, 0.8, 0.95, 0.999, 1.0):
        converted, error = lr.to_lora(params_of(weight), adapters, share)
        ranks = rank_of(converted)
        expected = tuple(int(np.argmax(e >= share - 1e-12)) + 1 for e in energies)
        assert (ranks if isinstance(ranks, tuple) else (ranks,) * len(energies)) == expected
        assert sum(expected) >= before and error[PATH] <= last
        assert error[PATH] <= np.sqrt(1 - share) + 1e-6
        before, last = sum(expected), error[PATH]
    assert error[PATH] < 1e-6


def test_layers_of_a_stack_have_their_own_ranks():
    adapters = adapt(STACK, lr.full())
    change = jnp.stack([kernel(10, r, seed=r) @ kernel(r, 8, seed=9) for r in (1, 4, 2)])
    adapters = adapters.replace(sites={PATH: {"weight": STACK + change}})
    # The weight plus its change is rounded: directions below that rounding are no part of the update.
    converted, error = lr.to_lora(params_of(STACK), adapters, 0.99999)
    assert rank_of(converted) == (1, 4, 2) and error[PATH] < 4e-3
    assert converted.sites[PATH]["a"].shape == (3, 10, 4)
    assert not converted.sites[PATH]["a"][0, :, 1:].any() and not converted.sites[PATH]["b"][2, 2:].any()
    assert converted.plan.trainable == (1 + 4 + 2) * 18
    np.testing.assert_allclose(delta(converted, STACK), change, atol=0.02)


@pytest.mark.parametrize("method", [lr.pissa(2, 6), lr.lora_xs(3)], ids=lambda m: m.name)
def test_only_some_layers_of_a_stack(method):
    adapters = moved(lr.on_layers(method, [2, 0]), STACK)
    converted, _ = lr.to_lora(params_of(STACK), adapters, 2)
    assert converted.plan.entries[0].layers == (2, 0)
    got, whole = delta(converted, STACK), delta(adapters, STACK)
    assert not got[1].any() and got[0].any() and got[2].any()
    if method.name == "lora_xs":
        full = lr.to_lora(params_of(STACK), adapters).adapters
        np.testing.assert_allclose(delta(full, STACK), whole, atol=1e-5)


def test_the_scale_is_one():
    config = dict(lr.to_lora(None, moved(lr.lora_xs(3, 7))).adapters.plan.entries[0].method.config)
    assert config["rank"] == 3 and config["alpha"] is None and not config["rank_stabilised"]


def test_an_adapter_that_changes_nothing_converts_to_nothing():
    converted, error = lr.to_lora(params_of(WEIGHT), adapt(WEIGHT, lr.full()))
    assert rank_of(converted) == 1 and error == {PATH: 0.0} and not delta(converted, WEIGHT).any()


def test_the_error_counts_the_rounding_to_the_storage_dtype():
    adapters = moved(lr.lora_xs(3, 7))
    converted, error = lr.to_lora(None, adapters, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(converted)} == {jnp.dtype(jnp.bfloat16)}
    wanted = exact_delta(adapters)
    got = np.asarray(converted.sites[PATH]["a"], np.float64) @ np.asarray(converted.sites[PATH]["b"], np.float64)
    assert error[PATH] == pytest.approx(np.linalg.norm(got - wanted) / np.linalg.norm(wanted), rel=1e-3)
    assert 1e-4 < error[PATH] < 1e-2


def test_randomised_decomposition():
    weight = kernel(64, 48)
    change = kernel(64, 4, seed=1) @ kernel(4, 48, seed=2)
    adapters = adapt(weight, lr.full()).replace(sites={PATH: {"weight": weight + change}})
    converted, error = lr.to_lora(params_of(weight), adapters, 4, svd="randomized")
    assert rank_of(converted) == 4 and error[PATH] < 1e-6
    for rank in (None, 0.5):
        with pytest.raises(ValueError, match="'randomized' needs a number of directions"):
            lr.to_lora(params_of(weight), adapters, rank, svd="randomized")


@pytest.mark.parametrize(
    "rank, message",
    [(0, "at least 1 direction"), (-2, "at least 1"), (0.0, "above 0 and at most 1"), (1.5, "above 0 and at most 1")],
)
def test_bad_ranks_are_refused(rank, message):
    with pytest.raises(ValueError, match=f"rank={rank}: .*{message}"):
        lr.to_lora(None, moved(lr.lora(2)), rank)


def test_a_tolerance_is_kept():
    adapters = moved(lr.full())
    error = lr.to_lora(params_of(WEIGHT), adapters, 4).error[PATH]
    assert lr.to_lora(params_of(WEIGHT), adapters, 4, tolerance=error).error[PATH] == error
    with pytest.raises(ValueError, match=f"rank 4 at {PATH} is .* more than tolerance=.* Allow a higher rank"):
        lr.to_lora(params_of(WEIGHT), adapters, 4, tolerance=0.99 * error)


def test_what_cannot_be_converted_says_so():
    params = params_of(WEIGHT)
    adapters = moved(lr.pissa(2))
    folded = lr.fold(params, adapters)[1]
    with pytest.raises(ValueError, match="to_lora: the adapter is folded into another base; unfold it first"):
        lr.to_lora(params, folded)
    with pytest.raises(ValueError, match="to_lora: the adapter is a stack; take one of it"):
        lr.to_lora(params, lr.stack([adapters]))
    with pytest.raises(ValueError, match=f"{PATH}: the update of full depends on the weight; pass params="):
        lr.to_lora(None, moved(lr.full()))
    with pytest.raises(ValueError, match=rf"{PATH} has shape \(8, 10\)"):
        lr.to_lora(params_of(WEIGHT.T), adapters)
    bad = adapters.replace(sites={PATH: {**adapters.sites[PATH], "a": adapters.sites[PATH]["a"].at[0].set(jnp.nan)}})
    with pytest.raises(ValueError, match=f"{PATH}: the update is not finite"):
        lr.to_lora(params, bad)
    unfolded = lr.unfold(*lr.fold(params, adapters))[1]
    assert lr.to_lora(params, unfolded).error == {PATH: 0.0}


def test_a_head_trained_in_full_may_stay():
    params = {"layer": {"kernel": WEIGHT}, "head": {"kernel": WEIGHT, "bias": jnp.zeros(8)}}
    adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.lora_xs(2), "head": lr.full()}))
    with pytest.raises(UnsupportedError, match="head/bias: full of a bias or norm is no LoRA; .* keep="):
        lr.to_lora(params, adapters)
    converted = lr.to_lora(params, adapters, keep=["head"]).adapters
    assert {p: e.method.name for p, e in converted.plan.by_path.items()} == {
        "layer/kernel": "lora", "head/kernel": "full", "head/bias": "full",
    }  # fmt: skip
    assert converted.sites["head/bias"] is adapters.sites["head/bias"]
    with pytest.raises(ValueError, match="keep='heat' matches no weight"):
        lr.to_lora(params, adapters, keep=["heat"])


def test_converted_adapters_save_load_and_export(tmp_path):
    adapters = lr.to_lora(params_of(STACK), moved(lr.full(), STACK), 0.9).adapters
    base = checkpoint.base_reference("one", params_of(STACK))
    loaded = checkpoint.load_adapter(checkpoint.save_adapter(tmp_path / "a", adapters, base), params_of(STACK), base)
    assert loaded.plan == adapters.plan
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), loaded, adapters))
    lr.peft.save(adapters, tmp_path / "peft", name_map={"layer": [f"layers.{n}" for n in range(3)]})


def test_leaves_lie_on_the_mesh_beside_their_kernels():
    mesh = shard.mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = {"layer": {"kernel": jax.device_put(WEIGHT, NamedSharding(mesh, P("fsdp", "tensor")))}}
    adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.full()}))
    leaves = lr.to_lora(params, adapters, 2).adapters.sites[PATH]
    assert leaves["a"].sharding.spec == P("fsdp", None) and leaves["b"].sharding.spec == P(None, "tensor")
    padded = lr.pad(lr.to_lora(params, adapters, 2).adapters, 4).sites[PATH]
    assert padded["a"].sharding.spec == P("fsdp", None) and padded["b"].sharding.spec == P(None, "tensor")


@pytest.mark.parametrize("weight", [WEIGHT, STACK], ids=["matrix", "stack"])
@pytest.mark.parametrize("alpha", [2, 7, 8])
def test_padding_keeps_the_update(alpha, weight):
    """The scale goes into b, once; where it is a power of two, to the bit."""
    adapters = moved(lr.lora(2, alpha), weight)
    padded = lr.pad(adapters, 5)
    assert dict(padded.plan.entries[0].method.config) == dict(lr.lora(5).config)
    a, b = padded.sites[PATH]["a"], padded.sites[PATH]["b"]
    assert a.shape[-1] == b.shape[-2] == 5 and not a[..., 2:].any() and not b[..., 2:, :].any()
    assert (a[..., :2] == adapters.sites[PATH]["a"]).all()
    wanted = np.float32(alpha / 2) * np.asarray(adapters.sites[PATH]["b"])
    assert (np.asarray(b[..., :2, :]) == wanted).all()


def test_padding_to_the_plan_of_another_lora():
    """Another alpha, ranks of its own for each layer, layers and sites that only the plan has."""
    params = {"layer": params_of(STACK)["layer"], "more": params_of(STACK)["layer"]}
    like = lr.plan(params, {"layer/kernel": lr.lora((2, 3, 4), 6), "more/kernel": lr.lora(2)})
    adapters = moved(lr.on_layers(lr.lora(2, 3), [1, 2]), STACK)
    padded = lr.pad(adapters, like)
    assert padded.plan == like
    np.testing.assert_allclose(delta(padded, STACK), delta(adapters, STACK), atol=1e-6)
    assert not any(leaf.any() for leaf in padded.sites["more/kernel"].values())
    assert {n: x.shape for n, x in padded.sites["more/kernel"].items()} == {"a": (3, 10, 2), "b": (3, 2, 8)}
    with pytest.raises(ValueError, match=f"{PATH} has rank 3, the plan has room for 2 .matrix 0 of its stack"):
        lr.pad(moved(lr.lora(3), STACK), like)
    with pytest.raises(ValueError, match=f"{PATH} has rank 1, the plan has room for 0 .matrix 0"):
        lr.pad(moved(lr.lora(1), STACK), adapters.plan)


def test_padding_keeps_the_dtype_unless_asked():
    adapters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), moved(lr.lora(2, 8)))
    padded = lr.pad(adapters, 3)
    assert {x.dtype for x in jax.tree.leaves(padded)} == {jnp.dtype(jnp.bfloat16)}
    assert (padded.sites[PATH]["b"][:2] == 4 * adapters.sites[PATH]["b"]).all()
    for like in (3, adapters.plan):
        assert {x.dtype for x in jax.tree.leaves(lr.pad(adapters, like, jnp.float32))} == {jnp.dtype(jnp.float32)}
    assert lr.pad(adapters, adapters.plan).sites[PATH]["b"] is adapters.sites[PATH]["b"]


def test_padding_refuses_what_does_not_fit():
    one = moved(lr.lora(2))
    with pytest.raises(ValueError, match=f"{PATH} has the method pissa; convert it"):
        lr.pad(moved(lr.pissa(2)), 4)
    with pytest.raises(ValueError, match=f"{PATH} has rank 2, the plan has room for 1"):
        lr.pad(one, 1)
    with pytest.raises(ValueError, match="rank=0"):
        lr.pad(one, 0)
    other = {"other": {"kernel": WEIGHT}}
    with pytest.raises(ValueError, match=f"{PATH} has no place in the plan; its sites are other/kernel"):
        lr.pad(one, lr.plan(other, {"other": lr.lora(2)}))
    with pytest.raises(ValueError, match=f"{PATH} is another weight in the plan"):
        lr.pad(one, lr.plan(params_of(WEIGHT.T), {"layer": lr.lora(2)}))
    assert rank_of(lr.pad(one, 99)) == 8
