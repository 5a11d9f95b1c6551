"""GGUF: values against independent scalar code, row order against a rotary embedding, damage refused."""

import pathlib
import runpy
import struct

import ml_dtypes
import numpy as np
import pytest

from lowrank_jax.models.gguf import as_hf_tensors, hf_config, open_gguf, restore_rows
from lowrank_jax.models.tensors import CorruptFileError

write_gguf = runpy.run_path(str(pathlib.Path(__file__).with_name("gguf_writer.py")))["write_gguf"]

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB = 2, 1, 32, 64, 96, 40


def _f32(array: np.ndarray) -> tuple:
    return array.shape, 0, array.astype("<f4").tobytes()


def _random_blocks(count: int, halves: int, payload: int) -> bytes:
    rng = np.random.default_rng(0)
    parts = [
        rng.normal(size=(count, halves)).astype("<f2").view(np.uint8),
        rng.integers(0, 256, (count, payload), np.uint8),
    ]
    return np.concatenate(parts, axis=1).tobytes()


def _scalar_decode(kind: int, raw: bytes) -> list[float]:
    """One block at a time with struct: written apart from the code under test."""
    out: list[float] = []
    size = {2: 18, 3: 20, 8: 34}[kind]
    for start in range(0, len(raw), size):
        block = raw[start : start + size]
        if kind == 8:
            (d,) = struct.unpack_from("<e", block)
            out += [d * q for q in struct.unpack_from("<32b", block, 2)]
            continue
        d, m = struct.unpack_from("<2e", block) if kind == 3 else (*struct.unpack_from("<e", block), None)
        packed = block[4:] if kind == 3 else block[2:]
        for q in [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]:
            out.append(d * q + m if m is not None else d * (q - 8))
    return out


@pytest.mark.parametrize(("kind", "halves", "payload"), [(2, 1, 16), (3, 2, 16), (8, 1, 32)])
def test_quantised_values(tmp_path, kind, halves, payload):
    raw = _random_blocks(3 * 2, halves, payload)
    gguf = open_gguf(write_gguf(tmp_path / "x.gguf", {}, {"w": ((3, 64), kind, raw)}))
    tensor = gguf.tensors["w"]
    assert (tensor.shape, tensor.dtype) == ((3, 64), np.float32)
    np.testing.assert_allclose(tensor.read().ravel(), _scalar_decode(kind, raw), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "dtype"), [(0, np.float32), (1, np.float16), (30, ml_dtypes.bfloat16)])
def test_plain_values_keep_their_dtype(tmp_path, kind, dtype):
    value = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
    gguf = open_gguf(write_gguf(tmp_path / "x.gguf", {}, {"a": _f32(np.ones(3)), "w": ((3, 5), kind, value.tobytes())}))
    assert gguf.tensors["w"].dtype == dtype
    np.testing.assert_array_equal(gguf.tensors["w"].read(), value)


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_shape(tmp_path, version):
    metadata = {"s": "ä", "b": True, "i": 7, "f": 0.5, "words": ["x", ""], "numbers": [1, 2], "nested": [[1], [2, 3]]}
    assert open_gguf(write_gguf(tmp_path / "x.gguf", metadata, {}, version)).metadata == metadata


def _llama_metadata(**changes) -> dict:
    metadata = {
        "general.architecture": "llama",
        "llama.embedding_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.feed_forward_length": MLP,
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    return {k: v for k, v in (metadata | changes).items() if v is not None}


def _llama_tensors() -> dict:
    rng = np.random.default_rng(1)
    shapes = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (MLP, HIDDEN),
        "blk.0.ffn_up.weight": (MLP, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, MLP),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _llama(path: pathlib.Path, **changes) -> pathlib.Path:
    return write_gguf(path, _llama_metadata(**changes), {n: _f32(t) for n, t in _llama_tensors().items()})


def _interleaved_rope(x, position):
    """x: [head_dim]; turns the pairs (0, 1), (2, 3), ... as llama.cpp does with its row order."""
    angle = position * 10000.0 ** (-np.arange(0, len(x), 2) / len(x))
    even, odd = x[0::2], x[1::2]
    return np.stack(
        [even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)], -1
    ).ravel()


def _half_rope(x, position):
    """x: [head_dim]; turns the pairs (i, i + head_dim / 2), as Hugging Face does."""
    angle = position * 10000.0 ** (-np.arange(0, len(x), 2) / len(x))
    low, high = np.split(x, 2)
    return np.concatenate([low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)])


def test_restored_rows_give_the_same_attention_scores(tmp_path):
    stored, restored = _llama_tensors(), as_hf_tensors(open_gguf(_llama(tmp_path / "x.gguf")))
    x, y = np.random.default_rng(2).normal(size=(2, HIDDEN))

    def score(q, k, rope, head):
        query = (q @ x).reshape(HEADS, HEAD_DIM)[head]
        key = (k @ y).reshape(KV_HEADS, HEAD_DIM)[0]
        return rope(query, 5) @ rope(key, 2)

    q = restored["model.layers.0.self_attn.q_proj.weight"].read()
    k = restored["model.layers.0.self_attn.k_proj.weight"].read()
    for head in range(HEADS):
        expected = score(stored["blk.0.attn_q.weight"], stored["blk.0.attn_k.weight"], _interleaved_rope, head)
        np.testing.assert_allclose(score(q, k, _half_rope, head), expected, rtol=1e-5)
        # The rows as they lie in the file would run too, and be wrong.
        raw = score(stored["blk.0.attn_q.weight"], stored["blk.0.attn_k.weight"], _half_rope, head)
        assert abs(raw - expected) > 0.1


def test_restore_rows_takes_biases_too():
    weight = np.random.default_rng(0).normal(size=(64, 3))
    np.testing.assert_array_equal(restore_rows(weight, 2)[:, 1], restore_rows(weight[:, 1], 2))


def test_names_and_configuration(tmp_path):
    gguf = open_gguf(_llama(tmp_path / "x.gguf", **{"llama.rope.freq_base": 1e5, "tokenizer.ggml.eos_token_id": 2}))
    config = hf_config(gguf)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 32)
    assert (config["rope_theta"], config["rms_norm_eps"], config["eos_token_id"]) == (1e5, 1e-5, 2)
    assert config["tie_word_embeddings"] is True
    found = as_hf_tensors(gguf)
    assert "model.layers.0.mlp.down_proj.weight" in found
    assert len(found) == len(_llama_tensors())
    np.testing.assert_array_equal(found["model.norm.weight"].read(), _llama_tensors()["output_norm.weight"])


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"general.architecture": "mamba"}, NotImplementedError, "mamba"),
        ({"llama.rope.scaling.type": "yarn"}, NotImplementedError, "scaled rotary"),
        ({"llama.expert_count": 8}, NotImplementedError, "experts"),
        ({"llama.embedding_length": None}, CorruptFileError, "llama.embedding_length"),
        ({"llama.block_count": "many"}, CorruptFileError, "llama.block_count"),
        ({"llama.attention.head_count": 24}, CorruptFileError, "24 heads"),
    ],
)
def test_models_that_are_not_read(tmp_path, changes, error, match):
    with pytest.raises(error, match=match):
        as_hf_tensors(open_gguf(_llama(tmp_path / "x.gguf", **changes)))


def test_every_truncation_is_refused(tmp_path):
    tensors = {"a": _f32(np.ones(3)), "w": ((2, 32), 8, _random_blocks(2, 1, 32))}
    whole = write_gguf(tmp_path / "w.gguf", {"k": "v", "list": [1, 2], "words": ["a", "b"]}, tensors).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "x.gguf").write_bytes(whole[:size])
        with pytest.raises(CorruptFileError):
            open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("patch", "error", "match"),
    [
        ((0, b"GGML"), CorruptFileError, "begins with"),
        ((4, struct.pack(">I", 3)), NotImplementedError, "big-endian"),
        ((4, struct.pack("<I", 9)), NotImplementedError, "version 9"),
        ((8, struct.pack("<Q", 2**60)), CorruptFileError, "announced"),
        ((16, struct.pack("<Q", 2**60)), CorruptFileError, "announced"),
        ((24, struct.pack("<Q", 2**63)), CorruptFileError, "announced"),
        ((33, struct.pack("<I", 77)), CorruptFileError, "type 77"),
        ((41, struct.pack("<Q", 2**62)), CorruptFileError, "announced"),
    ],
)
def test_forged_numbers_are_refused(tmp_path, patch, error, match):
    path = write_gguf(tmp_path / "x.gguf", {"k": [1, 2]}, {"a": _f32(np.ones(64))})
    raw = bytearray(path.read_bytes())
    raw[patch[0] : patch[0] + len(patch[1])] = patch[1]
    path.write_bytes(raw)
    with pytest.raises(error, match=match):
        open_gguf(path)


@pytest.mark.parametrize(
    ("tensor", "error", "match"),
    [
        (((2, 32), 12, b""), NotImplementedError, "Q4_K"),
        (((2, 32), 99, b""), NotImplementedError, "type 99"),
        (((2, 33), 8, b"\0" * 200), CorruptFileError, "whole 32s"),
        (((2**40, 2**20), 0, b"\0" * 8), CorruptFileError, "lies at bytes"),
        (((1,) * 9, 0, b"\0" * 8), CorruptFileError, "at most 8"),
    ],
)
def test_tensors_that_are_not_read(tmp_path, tensor, error, match):
    with pytest.raises(error, match=match):
        open_gguf(write_gguf(tmp_path / "x.gguf", {}, {"w": tensor}))


def test_repeated_names_and_bad_text_are_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", {"kk": 1, "kl": 2}, {})
    path.write_bytes(path.read_bytes().replace(b"kl", b"kk"))
    with pytest.raises(CorruptFileError, match="twice"):
        open_gguf(path)
    path.write_bytes(path.read_bytes().replace(b"kk", b"\xff\xfe", 1))
    with pytest.raises(CorruptFileError, match="UTF-8"):
        open_gguf(path)


def test_load_gguf_equals_loading_the_same_weights_as_safetensors(tmp_path):
    import json

    import jax

    from lowrank_jax.models import hf
    from lowrank_jax.models.gguf_load import load_gguf
    from lowrank_jax.models.tensors import save_safetensors

    path = _llama(tmp_path / "x.gguf")
    gguf = open_gguf(path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(gguf)))
    save_safetensors(tmp_path / "model.safetensors", {n: t.read() for n, t in as_hf_tensors(gguf).items()})
    for scan in (False, True):
        for how in ({}, {"quantize": {"layers.*": "nf4"}, "block": 16}):
            ours, theirs = load_gguf(path, scan_layers=scan, **how), hf.load(tmp_path, scan_layers=scan, **how)
            assert ours.config == theirs.config
            jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


@pytest.mark.slow
def test_perplexity_of_smollm2():
    """Rows left in the file's order give about six times this perplexity; a slip in decoding shows as well."""
    import jax

    from lowrank_jax import assets
    from lowrank_jax.models.gguf_load import load_gguf
    from lowrank_jax.models.tokenizer import load_tokenizer

    path = assets.fetch("smollm2")
    loaded, tokenizer = load_gguf(path, scan_layers=True), load_tokenizer(path)
    article = (assets.fetch("bbc") / "business" / "001.txt").read_text()
    ids = tokenizer.encode(article)[:256]
    logits = loaded.model.apply({"params": loaded.params}, ids[None])[0, :-1]
    scores = np.asarray(jax.nn.log_softmax(logits))[np.arange(255), ids[1:]]
    assert np.exp(-scores.mean()) == pytest.approx(33.936, abs=0.1)
