"""Every model configuration in one place: the classes, the choice by config.json, and published shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_jax.models.bert_config import BertConfig
from lowrank_jax.models.config_base import ModelConfig, ModelConfigError
from lowrank_jax.models.llama_config import LlamaConfig, RopeScaling

__all__ = [
    "BertConfig",
    "LlamaConfig",
    "ModelConfig",
    "ModelConfigError",
    "RopeScaling",
    "from_hf",
    "llama2_7b",
    "llama2_13b",
    "llama2_70b",
    "minilm_l6",
    "mixtral_8x7b",
    "roberta_base",
    "smollm2_135m",
]

_FAMILIES: Mapping[str, type[BertConfig] | type[LlamaConfig]] = {
    "bert": BertConfig,
    "roberta": BertConfig,
    "llama": LlamaConfig,
    "mistral": LlamaConfig,
    "mixtral": LlamaConfig,
    "qwen2": LlamaConfig,
    "qwen3": LlamaConfig,
}


def from_hf(hf: Mapping[str, Any], **overrides: Any) -> BertConfig | LlamaConfig:
    """Reads a parsed config.json of any supported architecture.

    Args:
      hf: the parsed file.
      **overrides: fields of the configuration that win over the file, such as scan_layers.

    Raises:
      ModelConfigError: the architecture is unknown, or the file asks for something it does not compute here.

    Example:
      >>> type(from_hf(LlamaConfig.tiny().to_hf(), scan_layers=True)).__name__
      'LlamaConfig'
    """
    kind = hf.get("model_type", "")
    if kind not in _FAMILIES:
        raise ModelConfigError(f"model_type={kind!r} is not supported; expected one of {sorted(_FAMILIES)}")
    return _FAMILIES[kind].from_hf(hf, **overrides)


def llama2_7b(**overrides: Any) -> LlamaConfig:
    """The shapes of Llama 2 7B (arXiv 2307.09288): 6.74 billion parameters.

    Example:
      >>> llama2_7b().num_hidden_layers
      32
    """
    return LlamaConfig(**overrides)


def llama2_13b(**overrides: Any) -> LlamaConfig:
    """The shapes of Llama 2 13B (arXiv 2307.09288): 13.02 billion parameters.

    Example:
      >>> llama2_13b().num_hidden_layers
      40
    """
    shape: dict[str, Any] = {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    }
    return LlamaConfig(**(shape | overrides))


def llama2_70b(**overrides: Any) -> LlamaConfig:
    """The shapes of Llama 2 70B (arXiv 2307.09288): 68.98 billion parameters, eight groups of queries.

    Example:
      >>> llama2_70b().num_hidden_layers
      80
    """
    shape: dict[str, Any] = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
    return LlamaConfig(**(shape | overrides))


def mixtral_8x7b(**overrides: Any) -> LlamaConfig:
    """The shapes of Mixtral 8x7B (arXiv 2401.04088): 46.7 billion parameters, 12.9 billion of them for a token.

    Example:
      >>> mixtral_8x7b().num_local_experts
      8
    """
    shape: dict[str, Any] = {
        "architecture": "mixtral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    }
    return LlamaConfig(**(shape | overrides))


def smollm2_135m(**overrides: Any) -> LlamaConfig:
    """The shapes of SmolLM2 135M (arXiv 2502.02737): 30 layers, grouped queries, tied embeddings.

    Example:
      >>> smollm2_135m().width
      64
    """
    shape: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "initializer_range": 0.041666666666666664,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**(shape | overrides))


def minilm_l6(**overrides: Any) -> BertConfig:
    """The shapes of all-MiniLM-L6-v2 (MiniLM, arXiv 2002.10957): 22.7 million parameters.

    Example:
      >>> minilm_l6().head_dim
      32
    """
    shape: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    return BertConfig(**(shape | overrides))


def roberta_base(**overrides: Any) -> BertConfig:
    """The shapes of RoBERTa base (arXiv 1907.11692): 125 million parameters.

    Example:
      >>> roberta_base().pad_token_id
      1
    """
    shape: dict[str, Any] = {
        "architecture": "roberta",
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
    }
    return BertConfig(**(shape | overrides))
