"""Weight files with every kind of damage: read as the reference library reads them, or refused by the reader's own error."""

import json
import pathlib
import runpy
import struct

import numpy as np
import pytest
import safetensors.numpy
from fuzzing import JUNK, NUMBERS, damaged, damaged_json, watched
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.models.gguf import as_hf_tensors, hf_config, open_gguf
from lowrank_jax.models.gguf_vocabulary import gguf_tokenizer
from lowrank_jax.models.tensors import INDEX_NAME, CorruptFileError, open_safetensors, save_safetensors

write_gguf = runpy.run_path(str(pathlib.Path(__file__).with_name("gguf_writer.py")))["write_gguf"]
TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "ids": np.arange(4, dtype=np.int64),
    "none": np.zeros((0, 3), np.float16),
    "one": np.array(2.5, np.float32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def warm(folder: pathlib.Path) -> None:
    """Everything that is imported late is imported now."""
    save_safetensors(folder / "warm.safetensors", TENSORS)
    [tensor.read() for tensor in open_safetensors(folder / "warm.safetensors").values()]


WHOLE = safetensors.numpy.save(TENSORS, {"format": "np"})
_LENGTH = int.from_bytes(WHOLE[:8], "little")
HEADER, DATA = json.loads(WHOLE[8 : 8 + _LENGTH]), WHOLE[8 + _LENGTH :]


def _read_safetensors(path: pathlib.Path) -> None:
    """Every tensor, or a CorruptFileError; whatever is read the reference library reads too, to the same bytes."""
    size = path.stat().st_size
    with watched(path.parent, size):
        try:
            found = {name: tensor.read() for name, tensor in open_safetensors(path).items()}
        except CorruptFileError as error:
            assert str(path) in str(error)
            return
    expected = dict(safetensors.deserialize(path.read_bytes()))
    assert set(found) == set(expected)
    for name, array in found.items():
        assert array.tobytes() == bytes(expected[name]["data"]) and list(array.shape) == expected[name]["shape"]


@given(raw=damaged(WHOLE))
def test_damaged_safetensors(folder, warm, raw):
    path = folder / "x.safetensors"
    path.write_bytes(raw)
    _read_safetensors(path)


@given(text=damaged_json(HEADER))
def test_forged_safetensors_headers(folder, warm, text):
    raw = text.encode()
    path = folder / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + DATA)
    _read_safetensors(path)


@pytest.mark.parametrize("shape", [[0, 2**62], [2**31, 0, 2**31], [0, 2**70]], ids=str)
def test_sizes_that_no_array_has(tmp_path, shape):
    raw = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(CorruptFileError, match="sizes that an array can have"):
        open_safetensors(path)
    with pytest.raises(CorruptFileError, match="sizes that an array can have"):
        open_gguf(
            write_gguf(
                tmp_path / "x.gguf", {}, {"w": (tuple(n % 2**64 or 2**63 for n in shape if n) + (0,), 0, b"\0" * 8)}
            )
        )


@pytest.fixture(scope="module")
def sharded(folder: pathlib.Path) -> pathlib.Path:
    inner = folder / "inner"
    inner.mkdir()
    save_safetensors(inner / "one.safetensors", {"a": np.zeros(2)})
    save_safetensors(inner / "two.safetensors", {"b": np.ones(3)})
    save_safetensors(folder / "x.safetensors", {"a": np.zeros(2), "b": np.zeros(2)})
    return inner


@given(
    text=damaged_json({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}, "metadata": {"total_size": 20}})
)
def test_damaged_indices(sharded, text):
    (sharded / INDEX_NAME).write_text(text)
    with watched(sharded, 200):
        try:
            open_safetensors(sharded)
        except CorruptFileError:
            return
        except FileNotFoundError as error:
            assert "shard is missing" in str(error)


@pytest.mark.parametrize("name", ["../../x", "a" * 300, "\ud800", "x\n", "C:x", "//x", "\\x"])
def test_shards_are_named_plainly(tmp_path, name):
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name + ".safetensors"}}))
    with pytest.raises(CorruptFileError, match="in this directory"):
        open_safetensors(tmp_path)


METADATA = {
    "general.architecture": "llama", "general.alignment": 32, "llama.embedding_length": 32, "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1, "llama.feed_forward_length": 32, "llama.block_count": 1, "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4, "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"], "tokenizer.ggml.token_type": [1, 1, 1, 3], "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "x", "nested": [[1], [2, 3]],
}  # fmt: skip


def _f32(*shape: int) -> tuple[tuple[int, ...], int, bytes]:
    return shape, 0, np.ones(shape, "<f4").tobytes()


GGUF_TENSORS = {
    "token_embd.weight": _f32(4, 32),
    "blk.0.attn_q.weight": ((32, 32), 2, b"\1" * (32 * 18)),
    "blk.0.attn_k.bias": _f32(16),
    "output_norm.weight": ((32,), 8, b"\2" * 34),
}


def _read_gguf(path: pathlib.Path) -> None:
    with watched(path.parent, path.stat().st_size):
        try:
            gguf = open_gguf(path)
            for tensor in as_hf_tensors(gguf).values():
                array = tensor.read()
                assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
            gguf_tokenizer(gguf)
        except (CorruptFileError, NotImplementedError) as error:
            assert str(path) in str(error)


@given(data=st.data())
def test_damaged_gguf(folder, data):
    whole = write_gguf(folder / "whole.gguf", METADATA, GGUF_TENSORS).read_bytes()
    path = folder / "x.gguf"
    path.write_bytes(whole)
    _read_gguf(path)
    path.write_bytes(data.draw(damaged(whole)))
    _read_gguf(path)


@given(
    key=st.sampled_from(sorted(METADATA)),
    value=st.sampled_from(
        [j for j in JUNK if isinstance(j, bool | str) and j != "\ud800"]
        + [2.5, float("nan"), float("inf"), [1], [[1]], ["a"]]
    )
    | st.sampled_from([n for n in NUMBERS if n < 2**32]),
)
def test_forged_gguf_metadata(folder, key, value):
    path = folder / "x.gguf"
    _read_gguf(write_gguf(path, METADATA | {key: value}, GGUF_TENSORS))


@given(
    name=st.sampled_from(
        [
            "blk.00.attn_q.weight",
            "blk.٣.attn_q.weight",
            "blk." + "9" * 5000 + ".attn_q.weight",
            "../x",
            "",
            "blk.0.attn_k.weight",
        ]
    ),
    shape=st.lists(st.sampled_from(NUMBERS), max_size=4).map(tuple),
    kind=st.sampled_from([0, 1, 2, 3, 8, 30, 12, 99]),
    raw=st.binary(max_size=64),
)
def test_forged_gguf_tensors(folder, name, shape, kind, raw):
    _read_gguf(write_gguf(folder / "x.gguf", METADATA, GGUF_TENSORS | {name: (shape, kind, raw)}))


def test_gguf_tensors_may_not_share_bytes(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", {}, {"a": _f32(16), "b": _f32(16)})
    raw = path.read_bytes()
    at = raw.index(b"b", raw.index(b"\1\0\0\0\0\0\0\0b") + 8) + 1 + 4 + 8 + 4  # behind name, rank, shape and type
    assert struct.unpack_from("<Q", raw, at) == (64,)
    path.write_bytes(raw[:at] + struct.pack("<Q", 32) + raw[at + 8 :])
    with pytest.raises(CorruptFileError, match="'b' begins within 'a'"):
        open_gguf(path)


def test_more_layers_than_tensors_are_refused_before_any_is_made(tmp_path):
    from lowrank_jax.models import hf
    from lowrank_jax.models.gguf_load import load_gguf

    path = write_gguf(tmp_path / "x.gguf", METADATA | {"llama.block_count": 10**6}, GGUF_TENSORS)
    with pytest.raises(hf.CheckpointError, match="1000000 layers are announced, but there are 4 tensors"):
        load_gguf(path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(open_gguf(path))))
    save_safetensors(tmp_path / "model.safetensors", {"model.norm.weight": np.ones(32, np.float32)})
    with pytest.raises(hf.CheckpointError, match="1000000 layers are announced, but there are 1 tensors"):
        hf.load(tmp_path)
