"""The laws every method obeys, on every kind of site, through both bridges, in every layout.

A new method is one row of the table in `conformance_methods`. `conformance_case.cases` gives the matrix, `check` runs all laws on one case;
several laws share each compile. Numbers are compared with float64 numpy where the paper's formula gives them, and with the plain Linen
model where a layout or a bridge must not matter.
"""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance_case import Case, case_of, cases
from conformance_jaxpr import gradient_shapes
from conformance_row import Config, Row

import lowrank_jax as lr
from lowrank_jax import checkpoint
from lowrank_jax.forms import UnsupportedError
from lowrank_jax.plan import from_config
from lowrank_jax.sites import flatten, with_leaves

__all__ = ["cases", "check"]

TOLERANCE = 1e-5
STEPS = 4


def check(case: Case) -> None:
    """Runs every law on a case."""
    method = case.row.make()
    if not any(site.kind in method.site_kinds for site in case.model.sites.values()):
        kinds = ", ".join(sorted(method.site_kinds))
        with pytest.raises(ValueError, match=f"{method.name} applies to {kinds} weights only"):
            _ = case.plan
        return
    for law in LAWS:
        law(case)


def init_is_the_base(case: Case) -> None:
    """Law 1. The method's record says whether exactly."""
    base = case.model.run(case.model.params, *case.model.args)
    start = case.apply(case.model.params, case.adapters, *case.model.args)
    assert start.dtype == base.dtype
    assert {e.method.exact_init for e in case.plan.entries} == {case.row.init_tolerance == 0}
    assert difference(start, base) <= case.row.init_tolerance
    moved = case.apply(case.model.params, case.moved(), *case.model.args)
    assert np.isfinite(moved).all() and difference(moved, base) > 1e-2


def acts_as_its_update(case: Case) -> None:
    """Laws 2 and 3: the adapted model is the model with the paper's update added to its weights, and merging adds just that."""
    model, adapters = case.model, case.moved()
    before = jax.tree.map(lambda x: np.array(x), model.params)
    if not case.mergeable:
        with pytest.raises(UnsupportedError):
            lr.merge(model.params, adapters)
        return
    merged = lr.merge(model.params, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)
    exact = {**flatten(model.params), **_updated(case, adapters)}
    for path, weight in flatten(merged).items():
        assert weight.dtype == flatten(model.params)[path].dtype
        error = np.abs(np.asarray(weight, np.float64) - np.asarray(exact[path], np.float64))
        # In bfloat16 half a unit in the last place: the sum was made in float32 and rounded once.
        bound = 0.501 * _ulp_bf16(exact[path]) if weight.dtype == jnp.bfloat16 else 1e-6 * np.abs(exact[path]).max()
        assert (error <= bound).all(), path
    if not _factored(case):  # the update is in the weight itself, and so rounded as the weight is stored
        exact = {p: jnp.asarray(w, flatten(model.params)[p].dtype) for p, w in exact.items()}
    wide = with_leaves(model.params, {p: jnp.asarray(w, jnp.float32) for p, w in exact.items()})
    expected = model.run(wide, *model.args)
    assert difference(case.apply(model.params, adapters, *model.args), expected) <= TOLERANCE
    _assert_same_bits(before, model.params)


def merge_refuses_nonfinite(case: Case) -> None:
    """Law 3: NaN or infinity names the site and leaves everything as it was."""
    for bad in (jnp.nan, jnp.inf) if case.mergeable else ():
        path = case.plan.entries[-1].site.path
        adapters = case.moved()
        leaves = adapters.plan.by_path[path].leaves
        name = next(n for n, x in adapters.sites[path].items() if _is_float(x) and not leaves[n].state)
        poisoned = {**adapters.sites[path], name: adapters.sites[path][name].at[..., 0].set(bad)}
        before = jax.tree.map(lambda x: np.array(x), case.model.params)
        with pytest.raises(ValueError, match=f"{path}: the merged weight is not finite"):
            lr.merge(case.model.params, adapters.replace(sites={**adapters.sites, path: poisoned}))
        _assert_same_bits(before, case.model.params)


def trains_what_it_says(case: Case) -> None:
    """Laws 4, 5 and 7: exactly the trainable leaves get gradients and move; everything else keeps its bits; layouts agree."""
    params = case.model.params
    before = jax.tree.map(lambda x: np.array(x), (params, case.adapters))
    train, frozen = lr.partition(case.adapters)
    states = {(e.site.path, n) for e in case.plan.entries for n, leaf in e.leaves.items() if leaf.state}
    trainable = {
        (e.site.path, n)
        for e in case.plan.entries
        for n, leaf in e.leaves.items()
        if leaf.trains and leaf.trains[0] == 0
    }
    assert {(p, n) for p, leaves in train.items() for n in leaves if not p.startswith("shared:")} == trainable
    if case.kind == "mixed":
        _agrees_with_reference(case)
    state = case.start(train)
    reached = jax.tree.map(lambda x: np.zeros(_layers(x), bool), train)
    for n in range(STEPS):
        train, state, loss, gradient = case.step(train, frozen, params, state)
        assert np.isfinite(loss)
        if n < 3:
            reached = jax.tree.map(
                lambda r, g: r | (np.abs(np.asarray(g)).reshape(*r.shape, -1).max(-1) > 0), reached, gradient
            )
    learned = [r for p, leaves in reached.items() for n, r in leaves.items() if (p, n) not in states]
    assert all(r.all() for r in learned), reached
    after = lr.join(train, frozen)
    _assert_same_bits(before[0], params)
    mask = lr.mask(case.adapters)
    for (place, trained), old, new in zip(jax.tree_util.tree_leaves_with_path(mask), jax.tree.leaves(before[1]),
                                          jax.tree.leaves(after), strict=True):  # fmt: skip
        if any(f"['{p}']['{n}']" in jax.tree_util.keystr(place) for p, n in states):
            continue
        assert (np.asarray(new) != old).any() if trained else (np.asarray(new) == old).all()


def _agrees_with_reference(case: Case) -> None:
    train, frozen = lr.partition(case.moved())
    _, _, loss, gradient = case.step(train, frozen, case.model.params, case.start(train))
    expected_loss, own, shared = _reference(case.row, case.layout == "bf16")
    # The dense route rounds its weight to the stored dtype, and the gradient on its way back.
    tolerance = TOLERANCE if _factored(case) or case.layout != "bf16" else 2.0**-7
    assert abs(loss - expected_loss) <= tolerance * abs(expected_loss)
    expected = {**case.model.lay(own), **shared}
    assert jax.tree.structure(gradient) == jax.tree.structure(expected)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(got) - np.asarray(want)).max() <= tolerance * scale, path
    if case.layout == "mesh":
        assert jax.tree.map(lambda x: x.sharding, gradient) == jax.tree.map(lambda x: x.sharding, train)


def differentiates_nothing_else(case: Case) -> None:
    """Law 5 in the program itself: no product has the shape of a frozen weight's or leaf's gradient. ``full`` is the control."""
    train, frozen = lr.partition(case.adapters)
    program = jax.make_jaxpr(jax.grad(case.task_loss))(train, frozen, case.model.params)
    found = gradient_shapes(program.jaxpr)
    kernels = set()
    for entry in case.plan.entries:
        site = entry.site
        local = [n for axis, n in enumerate(site.shape) if axis not in site.batch]
        kernels |= {tuple(sorted(local)), tuple(sorted((site.n_in, site.n_out)))}
    if all(e.method.form.record.dense_gradient for e in case.plan.entries):
        assert found & kernels
        return
    shapes = lambda leaves: {tuple(sorted(x.shape)) for x in jax.tree.leaves(leaves)}  # noqa: E731
    # Inside a scan the gradient of a trained leaf is that of one layer.
    layers = {
        tuple(sorted(entry.leaves[name].shape))
        for entry in case.plan.entries
        for name in train.get(entry.site.path, {})
    }
    assert not found & ((kernels | shapes(frozen.sites)) - shapes(train) - layers)


def counts_as_the_paper(case: Case) -> None:
    """Law 6."""
    row, plan = case.row, case.plan
    end = row.count_end or row.count
    sites = [entry.local for entry in plan.entries]
    count_shared = row.count_shared(sites) if callable(row.count_shared) else row.count_shared
    layers = [(entry.site, config) for entry in plan.entries for config in _configs(entry)]
    assert plan.trainable == count_shared + sum(row.count(site, config) for site, config in layers)
    assert plan.count(9, 10) == count_shared + sum(end(site, config) for site, config in layers)
    padded = any(isinstance(dict(e.method.config).get("rank"), tuple) for e in plan.entries)
    assert padded or lr.count(case.adapters).trainable == plan.trainable
    if not case.mergeable:
        return
    for entry, update in _updates(case, case.moved()):
        flat = update.reshape(-1, *update.shape[-2:])
        for layer, config in zip(flat, _configs(entry), strict=True):
            assert 1 <= np.linalg.matrix_rank(layer, tol=1e-6 * np.abs(layer).max()) <= row.rank(config)


def folds(case: Case) -> None:
    """An anchor moved into the base changes nothing, and comes back."""
    model, adapters = case.model, case.moved()
    params, folded = lr.fold(model.params, adapters)
    if all(e.method.anchor is None for e in case.plan.entries) or case.layout == "bf16":
        return
    assert (
        difference(case.apply(params, folded, *model.args), case.apply(model.params, adapters, *model.args))
        <= TOLERANCE
    )
    back, unfolded = lr.unfold(params, folded)
    assert unfolded.plan == adapters.plan and not unfolded.folded
    for path, weight in flatten(back).items():
        assert difference(weight, flatten(model.params)[path]) <= 1e-6


def rows_are_adapters(case: Case) -> None:
    """Law 9, asserted both ways: what does not declare rows raises."""
    model, each = case.model, [case.moved(seed) for seed in (0, 1)]
    rows = jnp.array([1, -1, 0, 1])
    if not all(e.method.form.record.rows for e in case.plan.entries):
        with pytest.raises(UnsupportedError, match="rows|dense route"):
            model.apply(model.params, lr.stack(each), *model.args, rows=rows, **case.signals)
        return
    alone = [case.apply(model.params, adapters, *model.args) for adapters in each]
    alone.append(model.run(model.params, *model.args))
    got = case.apply(model.params, lr.stack(each), *model.args, rows=rows)
    for n, row in enumerate(rows.tolist()):
        assert difference(got[n], alone[row][n]) <= TOLERANCE
    _assert_same_bits(lr.take(lr.stack(each), 1), each[1])


def compacts(case: Case) -> None:
    """What is left after training acts the same, and is not larger."""
    if all(e.method.compact is None for e in case.plan.entries):
        return
    adapters = case.moved()
    small = lr.compact(adapters)
    assert lr.count(small).bytes <= lr.count(adapters).bytes
    got, expected = (
        case.model.apply(case.model.params, x, *case.model.args, **case.signals) for x in (small, adapters)
    )
    assert difference(got, expected) <= TOLERANCE
    assert from_config(case.model.params, json.loads(json.dumps(small.plan.to_config()))) == small.plan


def saves_and_loads(case: Case) -> None:
    """Law 8: the same bytes twice, the same bits back, the same plan from its configuration."""
    if case.kind != "mixed":
        return
    params, adapters = case.model.params, case.moved()
    assert from_config(params, json.loads(json.dumps(case.plan.to_config()))) == case.plan
    with tempfile.TemporaryDirectory() as directory:
        base = checkpoint.base_reference("mixed", params)
        where = [checkpoint.save_adapter(pathlib.Path(directory) / name, adapters, base) for name in ("one", "two")]
        one, two = ([f.read_bytes() for f in sorted(path.iterdir())] for path in where)
        loaded = checkpoint.load_adapter(where[0], params, base)
    assert one == two
    assert loaded.plan == case.plan
    _assert_same_bits(loaded, adapters)


def refuses_bad_input(case: Case) -> None:
    """Law 10, the part that depends on the method."""
    method, site = case.row.make(), case.plan.entries[0].site
    path = site.path
    with pytest.raises(TypeError, match=f"{method.name} has no field"):
        lr.build(method.name, {**dict(method.config), "no_such_field": 1})
    if "rank" in dict(method.config):
        limit = site.max_rank if case.row.rank_limit is None else case.row.rank_limit(site)
        of_rank = lambda rank: lr.build(method.name, {**dict(method.config), "rank": rank})  # noqa: E731
        plan_with = lambda rank: lr.plan(  # noqa: E731
            case.model.params, {path: of_rank(rank)}, sites=case.model.sites, statistics=case.statistics
        )
        with pytest.raises(ValueError, match=r"rank\W*0"):
            plan_with(0)
        if method.allocate is not None:  # its rank is a mean over sites, each held to what fits it
            assert all(config["rank"] <= site.max_rank for e in plan_with(99).entries for config in _configs(e))
        elif case.row.any_rank:
            assert plan_with(99).trainable == case.row.count(plan_with(99).entries[0].site, {"rank": 99})
        else:
            with pytest.raises(ValueError, match=f"{method.name} at {path}: rank 99 is not between 1 and {limit}"):
                plan_with(99)
    other = with_leaves(case.model.params, {path: jnp.zeros((2, 3))})
    for use in (lambda: lr.init(jax.random.key(0), other, case.plan), lambda: lr.merge(other, case.adapters),
                lambda: case.model.apply(other, case.adapters, *case.model.args)):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{path} has shape \(2, 3\)"):
            use()


LAWS = (
    init_is_the_base, acts_as_its_update, merge_refuses_nonfinite, trains_what_it_says, differentiates_nothing_else,
    counts_as_the_paper, folds, rows_are_adapters, compacts, saves_and_loads, refuses_bad_input,
)  # fmt: skip


@functools.cache
def _reference(row: Row, rounded: bool) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Loss and gradients of the plain Linen model; ``rounded``: with weights that bfloat16 holds exactly."""
    case = case_of(row, "linen", "mixed", "plain")
    params = case.model.params
    if rounded:
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    train, frozen = lr.partition(case.moved())
    _, _, loss, gradient = case.step(train, frozen, params, case.start(train))
    shared = {path: leaves for path, leaves in gradient.items() if path.startswith("shared:")}
    return float(loss), {path: leaves for path, leaves in gradient.items() if path not in shared}, shared


def _updates(case: Case, adapters: lr.Adapters) -> Iterator[tuple[Any, np.ndarray]]:
    """Every site's update by the paper's formula, in float64."""
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)  # noqa: E731
    for entry in case.plan.entries:
        kernel = np.asarray(entry.site.canonical(flatten(case.model.params)[entry.site.path]), np.float64)
        shared = wide(adapters.shared.get(str(entry.method), {}))
        yield entry, case.row.update(wide(adapters.sites[entry.site.path]), shared, kernel)


def _updated(case: Case, adapters: lr.Adapters) -> dict[str, np.ndarray]:
    """Every adapted weight plus its update, in its own layout."""
    out = {}
    for entry, update in _updates(case, adapters):
        site = entry.site
        order = site.batch + site.inputs + site.outputs
        change = update.reshape([site.shape[a] for a in order]).transpose(np.argsort(order))
        flat = flatten(case.model.params)
        out[site.path] = np.asarray(flat[site.path], np.float64) + change
        if case.row.bias_update is None:
            continue
        wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)  # noqa: E731
        path, kernel = f"{site.module}/bias", wide(site.canonical(flat[site.path]))
        bias = wide(flat[path].reshape(*site.batch_shape, -1)) if path in flat else None
        shared = wide(adapters.shared.get(str(entry.method), {}))
        if (moved := case.row.bias_update(wide(adapters.sites[site.path]), shared, kernel, bias)) is not None:
            out[path] = wide(flat[path]) + moved.reshape(flat[path].shape)
    return out


def _configs(entry: Any) -> list[Config]:
    """The configuration at each layer of a site: one of a tuple of ranks."""
    config, layers = dict(entry.method.config), int(np.prod(entry.local.batch_shape))
    rank = config.get("rank")
    return [{**config, "rank": rank[n] if isinstance(rank, tuple) else rank} for n in range(layers)]


def _factored(case: Case) -> bool:
    return all(entry.route == "factored" for entry in case.plan.entries)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _layers(leaf: Any) -> tuple[int, ...]:
    return leaf.shape[:-2]


def difference(actual: Any, expected: Any) -> float:
    """Largest difference relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def _ulp_bf16(x: Any) -> np.ndarray:
    return 2.0 ** (np.floor(np.log2(np.abs(np.asarray(x, np.float64)))) - 7)


def _assert_same_bits(before: Any, after: Any) -> None:
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
