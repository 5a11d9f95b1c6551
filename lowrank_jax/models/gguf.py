"""Llama-family models from GGUF files: tensor names, row order and configuration as in the Hugging Face
layout.

llama.cpp stores the rows of the query and key projections in another order, so that neighbouring rows form
the pairs that the rotary embedding turns. The layout used by Hugging Face, and by the models here, pairs row
i with row i + head_dim / 2. Reading one order as the other gives a model that runs and is wrong;
`as_hf_tensors` restores it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank_jax.models.gguf_file import GGUF, open_gguf
from lowrank_jax.models.tensors import CorruptFileError, LazyTensor

__all__ = ["GGUF", "as_hf_tensors", "hf_config", "open_gguf", "restore_rows"]

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(\w+)\.(weight|bias)")


def as_hf_tensors(gguf: GGUF) -> Mapping[str, LazyTensor]:
    """Returns the tensors under their Hugging Face names, rows of Q and K in the Hugging Face order.

    Raises:
        NotImplementedError: the architecture is not Llama's, or a tensor has no place in it.

    Example:
        >>> hf_name("blk.3.attn_q.weight"), hf_name("token_embd.weight")
        ('model.layers.3.self_attn.q_proj.weight', 'model.embed_tokens.weight')
    """
    config = hf_config(gguf)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    result = {}
    for name, tensor in gguf.tensors.items():
        target = hf_name(name)
        if target is None:
            raise NotImplementedError(f"{gguf.file}: tensor {name!r} has no place in a Llama model.")
        part = target.split(".")[-2]
        result[target] = _restored(gguf, name, tensor, heads[part]) if part in heads else tensor
    return dict(sorted(result.items()))


def hf_name(name: str) -> str | None:
    """Returns the Hugging Face name of a tensor of a Llama GGUF file, or None if there is none."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        return None
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def restore_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Brings Q or K rows from llama.cpp's order into the Hugging Face order.

    Args:
        rows: [heads * head_dim, ...], a weight stored (out, in) or a bias.
        heads: attention heads (for K: key-value heads).
    Returns:
        the same shape; row 2i of every head moves to i, row 2i + 1 to i + head_dim / 2.

    Example:
        >>> restore_rows(np.arange(8), heads=2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def hf_config(gguf: GGUF) -> dict[str, Any]:
    """Returns what `config.json` would say about the model.

    Raises:
        NotImplementedError: not the Llama architecture, scaled rotary embeddings, or experts.
        CorruptFileError: a required key is missing or not a number.
    """
    architecture = gguf.metadata.get("general.architecture")
    if architecture != "llama":
        raise NotImplementedError(
            f"{gguf.file}: architecture {architecture!r}; GGUF files of 'llama' are read here. "
            "Take other models as safetensors."
        )
    scaling = gguf.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in gguf.tensors or gguf.metadata.get("llama.expert_count", 0):
        raise NotImplementedError(f"{gguf.file}: scaled rotary embeddings or experts; take the model as safetensors.")
    hidden, heads = _count(gguf, "llama.embedding_length"), _count(gguf, "llama.attention.head_count")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CorruptFileError(gguf.file, "no matrix token_embd.weight", "the embeddings")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _count(gguf, "llama.feed_forward_length"),
        "num_hidden_layers": _count(gguf, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _count(gguf, "llama.attention.head_count_kv", heads),
        "head_dim": _count(gguf, "llama.attention.key_length", hidden // heads),
        "max_position_embeddings": _count(gguf, "llama.context_length"),
        "rms_norm_eps": _number(gguf, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _number(gguf, "llama.rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = special_token(gguf, theirs)
        if token is not None:
            config[f"{ours}_token_id"] = token
    return config


def special_token(gguf: GGUF, name: str) -> int | None:
    """The number of a special token ('bos', 'eos', 'padding'), or None where the file names none.

    Raises:
        CorruptFileError: it is no number.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    token = gguf.metadata.get(key)
    if token is not None and type(token) is not int:
        raise CorruptFileError(gguf.file, f"metadata {key} is {str(token)[:80]!r}", "the number of a token")
    return token


def _count(gguf: GGUF, key: str, default: int | None = None) -> int:
    value = gguf.metadata.get(key, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise CorruptFileError(gguf.file, f"metadata {key} is {str(value)[:80]!r}", "a positive whole number")
    return value


def _number(gguf: GGUF, key: str, default: float | None = None) -> float:
    value = gguf.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise CorruptFileError(gguf.file, f"metadata {key} is {str(value)[:80]!r}", "a positive number")
    # The file holds float32; the shortest decimal that rounds to it was meant (1e-05, not 9.99999975e-06).
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _restored(gguf: GGUF, name: str, tensor: LazyTensor, heads: int) -> LazyTensor:
    rows = tensor.shape[0] if tensor.shape else 1
    if rows % (2 * heads):
        raise CorruptFileError(gguf.file, f"tensor {name!r} has {rows} rows", f"{heads} heads of even size")
    return dataclasses.replace(tensor, reader=lambda: restore_rows(tensor.read(), heads))


def is_gguf(path: pathlib.Path) -> bool:
    """Tells whether a path is a file that begins as a GGUF file does."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"
