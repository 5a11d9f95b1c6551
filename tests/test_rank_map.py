"""The map of ranks: who is in which row and column, what counts as rank, and that it can be looked at."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, kernel, params_of

import lowrank_jax as lr

UNROLLED = {f"layers_{n}": {"mlp": {"kernel": kernel(8, 6)}, "norm": {"scale": jnp.ones(8)}} for n in range(3)}
STACKED = {"layers": {"mlp": {"kernel": kernel(3, 8, 6), "bias": jnp.zeros((3, 6))}}}
HEAD = {"head": {"kernel": kernel(8, 5)}}


def test_layers_of_paths_and_of_stacks_are_the_same_columns():
    rules = {".*(mlp|head).*kernel": lr.lora(rank=4), ".*layers_2.*": lr.lora(rank=2)}
    unrolled = lr.rank_map(lr.plan({**UNROLLED, **HEAD}, rules))
    stacked = lr.rank_map(
        lr.plan({**STACKED, **HEAD}, {".*layers.*kernel": lr.lora(rank=(4, 4, 2)), "head": lr.lora(rank=4)})
    )
    assert unrolled.layers == stacked.layers == (None, 0, 1, 2)
    assert unrolled.modules == ("head", "layers_*/mlp") and stacked.modules == ("head", "layers/mlp")
    expected = [[4, np.nan, np.nan, np.nan], [np.nan, 4, 4, 2]]
    np.testing.assert_array_equal(unrolled.ranks, expected)
    np.testing.assert_array_equal(stacked.ranks, expected)


def test_only_the_adapted_layers_of_a_stack_have_a_rank():
    plan = lr.plan(STACKED, {"layers/mlp/kernel": lr.on_layers(lr.lora(rank=(1, 3)), [0, 2])})
    found = lr.rank_map(plan)
    assert found.layers == (0, 2) and found.ranks.tolist() == [[1, 3]]


def test_numbers_of_modules_inside_a_scanned_stack_are_not_layers():
    params = {"layers": {f"mlp_{n}": {"kernel": kernel(3, 8, 6)} for n in range(2)}}
    roles = {"batch": (0,), "inputs": (1,), "outputs": (2,), "scanned": (0,)}
    sites = {path: replace(site, kind="dense", **roles) for path, site in lr.sites(params, {".*kernel": "bio"}).items()}
    found = lr.rank_map(lr.plan(params, {".*": lr.lora(rank=2)}, sites=sites))
    assert found.modules == ("layers/mlp_0", "layers/mlp_1") and found.layers == (0, 1, 2)


def test_allocated_ranks_are_the_plans():
    params = {f"layers_{n}": {"mlp": {"kernel": jnp.diag(0.9 ** (n * jnp.arange(16.0)))}} for n in range(3)}
    plan = lr.plan(params, {".*": lr.lamda_pp(rank=4)})
    assert lr.rank_map(plan).ranks.tolist() == [[dict(e.method.config)["rank"] for e in plan.entries]]
    assert len(set(lr.rank_map(plan).ranks[0])) == 3


@pytest.mark.parametrize("make", [lr.adalora, lr.sora], ids=lambda m: m.__name__)
def test_a_direction_counts_while_its_gate_is_open(make):
    adapters = adapt(kernel(3, 12, 10), make(rank=4))
    assert lr.rank_map(adapters.plan).ranks.tolist() == [[4, 4, 4]]
    assert lr.rank_map(adapters).ranks.tolist() == [[0, 0, 0]]  # e or b is zero before training
    e = jnp.array([[0.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, -1.0, 1.0]])
    moved = adapters.replace(sites={PATH: {**jax.tree.map(lambda x: x + 1, adapters.sites[PATH]), "e": e}})
    assert lr.rank_map(moved).ranks.tolist() == [[2, 0, 4]]
    assert lr.rank_map(lr.fold(params_of(kernel(3, 12, 10)), moved)[1]).ranks.tolist() == [[2, 0, 4]]
    with pytest.raises(ValueError, match="take one of it"):
        lr.rank_map(lr.stack([moved, moved]))


def test_a_chosen_rank_is_the_rank():
    adapters = adapt(kernel(12, 10), lr.dylora(rank=8))
    adapters = jax.tree.map(lambda x: x + 1, adapters)
    assert [lr.rank_map(lr.at_rank(adapters, r)).ranks.item() for r in (1, 5, 8)] == [1, 5, 8]


def test_the_table_is_shaded_by_rank():
    plan = lr.plan({**UNROLLED, **HEAD}, {".*(mlp|head).*kernel": lr.lora(rank=4), ".*layers_2.*": lr.lora(rank=1)})
    head, mlp = (line for line in str(lr.rank_map(plan)).splitlines() if "head" in line or "mlp" in line)
    assert head.split() == ["head", "█4", "·", "·", "·", "4.0"]
    assert mlp.split() == ["layers_*/mlp", "·", "█4", "█4", "░1", "3.0"]
    deep = {f"layers_{n}": {"mlp": {"kernel": kernel(8, 6)}} for n in range(40)}
    text = str(lr.rank_map(lr.plan(deep, {".*": lr.lora(rank=4), r"layers_3\d/.*": lr.lora(rank=2)})))
    assert "█" * 30 + "▒" * 10 in text and "0..39" in text


def test_the_picture_has_a_cell_for_each_weight(tmp_path):
    from matplotlib.image import imread

    plan = lr.plan({**UNROLLED, **HEAD}, {".*(mlp|head).*kernel": lr.lora(rank=4), ".*layers_2.*": lr.lora(rank=1)})
    image = imread(lr.rank_map(plan).plot(tmp_path / "ranks.png", "ranks"))
    yellow, violet = (
        np.abs(image[..., :3] - np.array(c) / 255).max(-1) < 0.02 for c in ((253, 231, 36), (59, 82, 139))
    )
    # Three weights of the largest rank, one of a quarter of it: their areas are as three to one.
    assert violet.sum() > 1000 and 2.5 < yellow.sum() / violet.sum() < 3.5


def test_without_ranks_there_is_no_map():
    with pytest.raises(ValueError, match="no adapted weight has a rank"):
        lr.rank_map(lr.plan(HEAD, {"head": lr.full()}))
