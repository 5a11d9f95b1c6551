"""Safetensors: equal to the reference library both ways, and every damaged file refused with its reason."""

import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lowrank_jax.models import tensors
from lowrank_jax.models.tensors import CorruptFileError, open_safetensors, save_safetensors


def _some(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "b.weight": rng.normal(size=(3, 5)).astype(np.float32),
        "a.bias": rng.normal(size=7).astype(np.float16),
        "ids": np.arange(4, dtype=np.int64),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "flag": np.array([True, False, True]),
    }


def _write(path: pathlib.Path, header: object, data: bytes = b"", length: int | None = None) -> pathlib.Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def test_bytes_equal_those_of_the_reference_writer(tmp_path):
    save_safetensors(tmp_path / "x.safetensors", _some(), {"format": "np"})
    assert (tmp_path / "x.safetensors").read_bytes() == safetensors.numpy.save(_some(), {"format": "np"})


def test_bytes_do_not_depend_on_the_order_of_the_tensors(tmp_path):
    save_safetensors(tmp_path / "x", _some(), {"b": "1", "a": "2"})
    save_safetensors(tmp_path / "y", dict(reversed(_some().items())), {"a": "2", "b": "1"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_reads_what_the_reference_writer_wrote(tmp_path):
    safetensors.numpy.save_file(_some(), tmp_path / "model.safetensors")
    found = open_safetensors(tmp_path)
    assert list(found) == sorted(_some())
    for name, expected in _some().items():
        assert (found[name].shape, found[name].dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(found[name].read(), expected)


@pytest.mark.parametrize("dtype", list(tensors.DTYPES.values()), ids=str)
def test_every_dtype_round_trips(tmp_path, dtype):
    value = np.arange(6).reshape(2, 3).astype(dtype)
    save_safetensors(tmp_path / "x.safetensors", {"odd": np.zeros(1, np.int8), "x": value})
    found = open_safetensors(tmp_path / "x.safetensors")["x"]
    assert found.dtype == dtype
    assert found.read().tobytes() == value.tobytes()


def test_jax_arrays_and_non_contiguous_arrays_are_written_right(tmp_path):
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_safetensors(tmp_path / "x", {"j": jnp.asarray(value, jnp.bfloat16), "t": value.T, "s": value[:, ::2]})
    found = open_safetensors(tmp_path / "x")
    np.testing.assert_array_equal(found["j"].read(), value.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(found["t"].read(), value.T)
    np.testing.assert_array_equal(found["s"].read(), value[:, ::2])


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"x": np.array(["text"])}, "'x' has dtype"),
        ({"x": [1.0]}, "'x' is a list"),
        ({"__metadata__": np.zeros(1)}, "may not be named"),
    ],
)
def test_what_cannot_be_written_is_refused_and_the_old_file_stays(tmp_path, bad, match):
    save_safetensors(tmp_path / "x", _some())
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(ValueError, match=match):
        save_safetensors(tmp_path / "x", bad)
    assert (tmp_path / "x").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path):
    class Fails:
        dtype, shape = np.dtype(np.float32), (2,)

        def __array__(self, dtype=None, copy=None):
            raise KeyboardInterrupt

    save_safetensors(tmp_path / "x", _some())
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        save_safetensors(tmp_path / "x", {"a": np.zeros(3), "b": Fails()})
    assert (tmp_path / "x").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def _entry(**changes):
    return {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        (b"not json", b"", "not valid JSON"),
        (b"[" * 50_000, b"", "not valid JSON"),
        ([1, 2], b"", "JSON list"),
        (b'{"w":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"w":{}}', b"1234", "twice"),
        (_entry(), b"x" * 12, "0 to 16 of 12"),
        (_entry(), b"x" * 20, "end of the last tensor"),
        (_entry(dtype="F4"), b"x" * 16, "dtype 'F4'"),
        (_entry(dtype=["F32"]), b"x" * 16, "dtype"),
        (_entry(shape=[2, 3]), b"x" * 16, "has 16 bytes; expected 24"),
        (_entry(shape=[-2, -2]), b"x" * 16, "has shape"),
        (_entry(shape=[2.0, 2]), b"x" * 16, "has shape"),
        (_entry(shape=[True, 4]), b"x" * 16, "has shape"),
        (_entry(shape=[2**62, 2**62]), b"x" * 16, "has 16 bytes"),
        (_entry(data_offsets=[16, 0]), b"x" * 16, "lies at bytes"),
        (_entry(data_offsets=[0]), b"x" * 16, "offsets"),
        (_entry(extra=1), b"x" * 16, "is described by"),
        ({"w": 3}, b"", "is described by"),
        ({**_entry(), "v": _entry()["w"]}, b"x" * 16, "begins at byte 0; expected byte 16"),
        ({"__metadata__": [], **_entry()}, b"x" * 16, "__metadata__"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header, data, match):
    path = _write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CorruptFileError, match=match) as error:
        open_safetensors(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63])
def test_a_forged_header_length_is_refused_before_reading(tmp_path, length):
    with pytest.raises(CorruptFileError, match="header"):
        open_safetensors(_write(tmp_path / "x.safetensors", {}, b"", length))


def test_every_truncation_is_refused(tmp_path):
    save_safetensors(tmp_path / "whole", {"w": np.ones(4, np.float32)})
    whole = (tmp_path / "whole").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:size])
        with pytest.raises(CorruptFileError):
            open_safetensors(tmp_path / "x")


def test_a_git_lfs_pointer_says_so(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CorruptFileError, match="git lfs pull"):
        open_safetensors(tmp_path)


def _sharded(folder: pathlib.Path, weight_map: object) -> pathlib.Path:
    save_safetensors(folder / "model-1.safetensors", {"a": np.zeros(2)})
    save_safetensors(folder / "model-2.safetensors", {"b": np.ones(3)})
    (folder / tensors.INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_read_through_their_index(tmp_path):
    found = open_safetensors(_sharded(tmp_path, {"b": "model-2.safetensors", "a": "model-1.safetensors"}))
    assert list(found) == ["a", "b"]
    assert found["b"].file.name == "model-2.safetensors"
    assert found["b"].read().sum() == 3


@pytest.mark.parametrize(
    "target", ["../x.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "a/b.safetensors", 3]
)
def test_an_index_cannot_point_outside(tmp_path, target):
    save_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(2)})
    (tmp_path / "inner").mkdir()
    with pytest.raises(CorruptFileError, match="in this directory"):
        open_safetensors(_sharded(tmp_path / "inner", {"a": target}))


def test_index_faults(tmp_path):
    with pytest.raises(CorruptFileError, match="no tensor 'b'"):
        open_safetensors(_sharded(tmp_path, {"b": "model-1.safetensors"}))
    with pytest.raises(FileNotFoundError, match="shard is missing"):
        open_safetensors(_sharded(tmp_path, {"b": "model-3.safetensors"}))
    with pytest.raises(CorruptFileError, match="weight_map"):
        open_safetensors(_sharded(tmp_path, []))


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected model.safetensors"):
        open_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_safetensors(tmp_path / "x.safetensors")
