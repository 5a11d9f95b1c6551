"""Adapter directories, banks and their records with every kind of damage: loaded, or refused by a CheckpointError that names the place."""

import ast
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import damaged, damaged_json, watched
from hypothesis import given
from hypothesis import strategies as st

import lowrank_jax as lr
from lowrank_jax.checkpoint import Base, CheckpointError, load_adapter, read_record, save_adapter
from lowrank_jax.models.tensors import CorruptFileError, open_safetensors, save_safetensors
from lowrank_jax.serve.bank_files import load_bank, save_bank

PARAMS = {
    "up": {"kernel": jnp.ones((6, 8)), "bias": jnp.zeros(8)},
    "down": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)},
    "stack": {"kernel": jnp.ones((3, 6, 4)), "bias": jnp.zeros((3, 4))},
    "side": {"kernel": jnp.ones((6, 6)), "bias": jnp.zeros(6)},
}
BASE = Base("ones", "0" * 64)
RULES = {
    "up/kernel": lr.lamda(2),
    "down/kernel": lr.vera(4),
    "stack/kernel": lr.on_layers(lr.lora(2), [0, 2]),
    "side/kernel": lr.nola(4),
    "up/bias": lr.full(),
}


@pytest.fixture(scope="module")
def adapters() -> lr.Adapters:
    return lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, RULES))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, adapters: lr.Adapters) -> pathlib.Path:
    where = save_adapter(tmp_path_factory.mktemp("adapters") / "good", adapters, BASE)
    load_adapter(where, PARAMS, BASE)
    return where


@pytest.fixture(scope="module")
def bad(good: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(good, good.with_name("bad"))


def _load(directory: pathlib.Path) -> None:
    size = sum(file.stat().st_size for file in directory.iterdir())
    with watched(directory, size):
        try:
            load_adapter(directory, PARAMS, BASE)
        except (CheckpointError, CorruptFileError) as error:
            assert str(directory) in str(error)


@given(data=st.data())
def test_damaged_records(good, bad, data):
    (bad / "adapter.safetensors").write_bytes((good / "adapter.safetensors").read_bytes())
    (bad / "adapter.json").write_text(data.draw(damaged_json(json.loads((good / "adapter.json").read_text()))))
    _load(bad)


@given(data=st.data())
def test_damaged_leaves(good, bad, data):
    (bad / "adapter.json").write_bytes((good / "adapter.json").read_bytes())
    (bad / "adapter.safetensors").write_bytes(data.draw(damaged((good / "adapter.safetensors").read_bytes())))
    _load(bad)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, np.bool_])
def test_a_leaf_of_another_type_is_named(good, tmp_path, dtype):
    where = shutil.copytree(good, tmp_path / "adapter")
    tensors = {name: np.array(x.read()) for name, x in open_safetensors(where / "adapter.safetensors").items()}
    name = "sites/stack/kernel/a"
    save_safetensors(where / "adapter.safetensors", tensors | {name: tensors[name].astype(dtype)})
    with pytest.raises(CheckpointError, match=rf"leaf '{name}' has type {np.dtype(dtype)}"):
        load_adapter(where, PARAMS)


def test_a_record_of_a_later_version_says_so(good, tmp_path):
    where = shutil.copytree(good, tmp_path / "adapter")
    record = json.loads((where / "adapter.json").read_text())
    (where / "adapter.json").write_text(json.dumps(record | {"format": 2, "base": "elsewhere now"}))
    with pytest.raises(CheckpointError, match="format 2; this version reads 1. A later version.*update lowrank_jax"):
        load_adapter(where, PARAMS)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "[]", "\udcff"])
def test_records_that_are_no_object(good, tmp_path, text):
    where = shutil.copytree(good, tmp_path / "adapter")
    (where / "adapter.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="adapter.json is .*Save the adapter again"):
        read_record(where)


@pytest.fixture(scope="module")
def bank(good: pathlib.Path, adapters: lr.Adapters) -> pathlib.Path:
    save_adapter(good.with_name("elsewhere") / "outside", adapters, BASE)
    return save_bank(good.with_name("bank"), lr.Bank(PARAMS, {"one": adapters, "two": adapters}), BASE)


@given(text=damaged_json({"format": 1, "base": BASE._asdict(), "adapters": ["one", "two"]}))
def test_damaged_banks(bank, text):
    (bank / "bank.json").write_text(text)
    with watched(bank, 4000):
        try:
            load_bank(bank, PARAMS, BASE)
        except (CheckpointError, FileNotFoundError) as error:
            assert str(bank) in str(error)


@pytest.mark.parametrize("name", ["../../elsewhere/outside", "/etc", "..", "", 3, None])
def test_a_bank_lists_plain_names(bank, name):
    (bank / "bank.json").write_text(json.dumps({"format": 1, "base": BASE._asdict(), "adapters": ["one", name]}))
    with pytest.raises(CheckpointError, match="is no name for an adapter"):
        load_bank(bank, PARAMS, BASE)


def test_nothing_is_ever_unpickled():
    """Pickles run code. None is read anywhere, by no spelling of it."""
    forbidden = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch"}
    root = pathlib.Path(lr.__file__).parents[1]
    for file in sorted([*root.glob("lowrank_jax/**/*.py"), *root.glob("train/**/*.py")]):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {module.split(".")[0] for module in modules}, f"{file}:{node.lineno}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "__import__", "np.load", "numpy.load", "jnp.load"), (
                    f"{file}:{node.lineno} calls {called}"
                )
                assert not any(k.arg == "allow_pickle" for k in node.keywords), f"{file}:{node.lineno}"
