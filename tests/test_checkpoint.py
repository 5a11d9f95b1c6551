"""Checkpoints: what is saved comes back, what is damaged or foreign is refused in one clear sentence."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lr
from lowrank_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    Store,
    base_reference,
    load_adapter,
    read_record,
    save_adapter,
    save_params,
)
from lowrank_jax.files import StorageError
from lowrank_jax.models.tensors import CorruptFileError


@pytest.fixture
def params() -> Any:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "up": {"kernel": jax.random.normal(keys[0], (6, 8))},
        "down": {"kernel": jax.random.normal(keys[1], (8, 6))},
    }


@pytest.fixture
def plan(params: Any) -> lr.Plan:
    return lr.plan(params, {"up": lr.lamda(rank=3), "down": lr.lora(rank=2)})


@pytest.fixture
def adapters(params: Any, plan: lr.Plan) -> lr.Adapters:
    return lr.init(jax.random.key(1), params, plan)


def _equal(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def _optimizer(adapters: lr.Adapters) -> Any:
    train, _ = lr.partition(adapters)
    return jax.tree.map(lambda x: x + 1, optax.adam(1e-3).init(train))


def _fill(
    directory: pathlib.Path, params: Any, adapters: lr.Adapters, scores: list[float | None], keep: int = 2
) -> None:
    with Checkpoints(directory, base_reference("b", params), adapters.plan, keep) as checkpoints:
        for step, score in enumerate(scores, 1):
            moved = jax.tree.map(lambda x, step=step: x + step, adapters)
            checkpoints.save(step, moved, _optimizer(adapters), {"step": step}, score)


def test_everything_saved_comes_back_bit_by_bit(tmp_path, params, plan, adapters):
    _fill(tmp_path, params, adapters, [None, 0.5])
    with Checkpoints(tmp_path, base_reference("b", params), plan) as checkpoints:
        like = jax.tree.map(jnp.zeros_like, adapters)
        restored = checkpoints.restore(like, jax.tree.map(jnp.zeros_like, _optimizer(adapters)))
    assert restored.step == 2 and restored.record == {"step": 2}
    assert _equal(restored.adapters, jax.tree.map(lambda x: x + 2, adapters))
    assert _equal(restored.optimizer, _optimizer(adapters))


def test_a_saved_array_may_be_donated_at_once(tmp_path, params, plan, adapters):
    wanted = jax.tree.map(np.array, adapters)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path, base_reference("b", params), plan) as checkpoints:
        mine = jax.tree.map(jnp.copy, adapters)
        checkpoints.save(1, mine, _optimizer(adapters), {})
        jax.block_until_ready(jax.tree.map(overwrite, mine))
        checkpoints.wait()
        assert _equal(checkpoints.restore(adapters).adapters, wanted)


def test_newest_and_best_are_kept(tmp_path, params, plan, adapters):
    _fill(tmp_path, params, adapters, [0.1, 0.9, None, 0.9, 0.3, 0.2], keep=2)
    with Checkpoints(tmp_path, base_reference("b", params), plan) as checkpoints:
        assert checkpoints.steps == [2, 5, 6]


def test_another_base_is_refused_by_both_names(tmp_path, params, plan, adapters):
    _fill(tmp_path, params, adapters, [None])
    other = {**params, "up": {"kernel": params["up"]["kernel"].at[0, 0].add(1e-6)}}
    with (
        Checkpoints(tmp_path, base_reference("other", other), plan) as checkpoints,
        pytest.raises(CheckpointError, match="another model.* b .*other"),
    ):
        checkpoints.restore(adapters)


def test_another_plan_is_refused_and_the_site_named(tmp_path, params, adapters):
    _fill(tmp_path, params, adapters, [None])
    plan = lr.plan(params, {"up": lr.lamda(rank=2), "down": lr.lora(rank=2)})
    with (
        Checkpoints(tmp_path, base_reference("b", params), plan) as checkpoints,
        pytest.raises(CheckpointError, match="up/kernel.*rank=3.*rank=2"),
    ):
        checkpoints.record()


def _data_files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(
        (f for f in directory.rglob("*") if f.is_file() and f.stat().st_size > 0), key=lambda f: -f.stat().st_size
    )


@pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited:RuntimeWarning"
)  # Orbax leaves them behind when it fails
@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_every_damaged_file_of_a_checkpoint_is_found(tmp_path, params, plan, adapters, damage):
    _fill(tmp_path, params, adapters, [None, None])
    wanted = jax.tree.map(lambda x: x + 2, adapters)
    base = base_reference("b", params)
    refused = 0
    for file in _data_files(tmp_path / "2"):
        content = file.read_bytes()
        if damage == "remove":
            file.unlink()
        elif damage == "truncate":
            file.write_bytes(content[: len(content) // 2])
        else:
            middle = len(content) // 2
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :])
        try:
            with Checkpoints(tmp_path, base, plan) as checkpoints:
                if 2 in checkpoints.steps:
                    restored = checkpoints.restore(adapters, _optimizer(adapters), step=2)
                    # Not every file matters for reading; what is read must be what was saved.
                    assert _equal(restored.adapters, wanted) and _equal(restored.optimizer, _optimizer(adapters)), file
        except CheckpointError as error:
            refused += 1
            assert "step 2" in str(error) and ("step 1" in str(error) or "another" in str(error)), f"{file}: {error}"
        finally:
            file.write_bytes(content)
    assert refused >= 2


def test_a_missing_step_is_named(tmp_path, params, plan, adapters):
    with (
        Checkpoints(tmp_path, base_reference("b", params), plan) as checkpoints,
        pytest.raises(CheckpointError, match="no checkpoint"),
    ):
        checkpoints.restore(adapters)


def test_adapter_directory_is_the_same_bytes_each_time_and_loads(tmp_path, params, adapters):
    base = base_reference("b", params)
    first = save_adapter(tmp_path / "one", adapters, base, {"note": 1})
    second = save_adapter(tmp_path / "two", adapters, base, {"note": 1})
    save_adapter(tmp_path / "two", adapters, base, {"note": 1})  # replaces
    assert sorted(f.name for f in tmp_path.iterdir()) == ["one", "two"]
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
    loaded = load_adapter(first, params, base)
    assert _equal(loaded, adapters) and loaded.plan == adapters.plan
    assert read_record(first)["extra"] == {"note": 1}


def test_adapter_of_another_model_or_damaged_is_refused(tmp_path, params, adapters):
    where = save_adapter(tmp_path / "a", adapters, base_reference("b", params))
    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(CheckpointError, match="another model"):
        load_adapter(where, params, base_reference("c", other))
    with pytest.raises(ValueError, match="up/kernel"):
        load_adapter(where, {**params, "up": {"kernel": jnp.zeros((6, 9))}})
    weights = where / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CorruptFileError, match="adapter.safetensors"):
        load_adapter(where, params)
    (where / "adapter.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter.json"):
        load_adapter(where, params)
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_adapter(tmp_path / "nothing", params)


def test_a_leaf_that_is_missing_is_named(tmp_path, params, adapters):
    from lowrank_jax.models.tensors import open_safetensors, save_safetensors

    where = save_adapter(tmp_path / "a", adapters, base_reference("b", params))
    tensors = {k: v.read() for k, v in open_safetensors(where).items() if k != "sites/down/kernel/b"}
    save_safetensors(where / "adapter.safetensors", {k: np.array(v) for k, v in tensors.items()})
    with pytest.raises(CheckpointError, match="sites/down/kernel/b"):
        load_adapter(where, params)


def test_plain_parameters_are_read_by_orbax_alone(tmp_path, params):
    from orbax.checkpoint import v1 as ocp

    assert _equal(ocp.load(save_params(tmp_path / "flax", params)), params)


def test_reference_depends_on_content_and_layout_only():
    ones = {"a": np.ones((2, 3), np.float32), "head": np.ones(1, np.float32)}
    same = {"head": np.zeros(1, np.float32), "a": jnp.ones((2, 3))}
    assert base_reference("x", ones, exclude=["head"]).hash == base_reference("y", same, exclude=["head"]).hash
    assert base_reference("x", ones).hash != base_reference("x", same).hash
    assert base_reference("x", {"a": np.ones((3, 2), np.float32)}).hash != base_reference("x", {"a": ones["a"]}).hash


def test_a_save_that_is_given_up_says_what_to_do(tmp_path, monkeypatch):
    def given_up() -> None:
        raise TimeoutError("7200 seconds")

    with Store(tmp_path) as store:
        store.save(3, {"w": {"w": jnp.ones(2)}}, {})
        store.wait()
        monkeypatch.setattr(store._manager, "wait", given_up)
        with pytest.raises(
            StorageError, match=r"not in time; .*clock was set forward.*the same command goes on from.*of step 3\."
        ):
            store.wait()
