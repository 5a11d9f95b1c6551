"""Configuration of the Llama family: Llama 2 and 3, Mistral, Mixtral, SmolLM2, Qwen2, Qwen3."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowrank_jax.models.config_base import ModelConfig, ModelConfigError, activation, check_multiple, present

_STEM = {"llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = ("hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    Attributes:
      kind: 'linear' (Position Interpolation, arXiv 2306.15595) or 'llama3' (The Llama 3 Herd of Models, arXiv 2407.21783).
      factor: how many times the context is stretched.
      low_freq_factor, high_freq_factor, original_max_position_embeddings: 'llama3' only.

    Example:
      >>> RopeScaling(kind="linear", factor=2.0).factor
      2.0
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """A decoder-only transformer with rotary positions, RMSNorm and SwiGLU. Field names follow the published config.json.

    Llama 2 (arXiv 2307.09288), Llama 3 (arXiv 2407.21783), Mistral 7B (arXiv 2310.06825), Mixtral (arXiv 2401.04088), SmolLM2
    (arXiv 2502.02737), Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388).

    Attributes:
      architecture: 'llama' (also SmolLM2), 'mistral', 'mixtral', 'qwen2' or 'qwen3'.
      num_key_value_heads: heads of keys and values, shared by groups of query heads (GQA, arXiv 2305.13245).
      head_dim: width of one head; None means hidden_size / num_attention_heads.
      rope_theta, rope_scaling: base of the rotary frequencies, and their stretching.
      sliding_window: a token sees itself and the sliding_window - 1 tokens before it; None means all before it.
      qkv_bias, out_bias, mlp_bias: which projections carry a bias.
      qk_norm: RMSNorm of every head of queries and keys (Qwen3).
      tie_word_embeddings: logits by the transposed token embedding, without `lm_head`.
      num_local_experts, num_experts_per_tok: of a mixture of experts ('mixtral'), how many there are, and how many a token goes
        through; no experts: one feed-forward for all.
      capacity_factor: places that an expert keeps for a row's tokens, as a multiple of an even share; 0: for all of them, which is
        exact. See `lowrank_jax.models.experts.Experts`.
      loss_chunk: tokens of the batch whose logits exist at once where the model is asked for losses; 0: all.

    Raises:
      ModelConfigError: from the constructor, naming the field.

    Example:
      >>> LlamaConfig.tiny().width
      16
    """

    architecture: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    num_local_experts: int = 0
    num_experts_per_tok: int = 2
    capacity_factor: float = 0.0
    loss_chunk: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in _STEM:
            raise ModelConfigError(f"LlamaConfig.architecture={self.architecture!r}: expected one of {sorted(_STEM)}")
        if self.rope_scaling is not None and self.rope_scaling.kind not in ("linear", "llama3"):
            raise ModelConfigError(f"RopeScaling.kind={self.rope_scaling.kind!r}: expected 'linear' or 'llama3'")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ModelConfigError(f"LlamaConfig.sliding_window={self.sliding_window}: expected at least 1, or None")
        if self.loss_chunk < 0:
            raise ModelConfigError(
                f"LlamaConfig.loss_chunk={self.loss_chunk}: expected a number of tokens, or 0 for all"
            )
        if (self.architecture == "mixtral") != (self.num_local_experts > 0):
            raise ModelConfigError(
                f"LlamaConfig.num_local_experts={self.num_local_experts}: expected at least 1 for a 'mixtral', and 0 for all others"
            )
        if self.num_local_experts and not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ModelConfigError(
                f"LlamaConfig.num_experts_per_tok={self.num_experts_per_tok}: expected 1 to {self.num_local_experts}"
            )
        if self.capacity_factor < 0:
            raise ModelConfigError(
                f"LlamaConfig.capacity_factor={self.capacity_factor}: expected a multiple of an even share, or 0 for all tokens"
            )
        if self.capacity_factor and not self.num_local_experts:
            raise ModelConfigError(
                f"LlamaConfig.capacity_factor={self.capacity_factor}: expected 0 for a model without experts"
            )
        if self.head_dim is None:
            check_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        if self.width % 2:
            raise ModelConfigError(f"head_dim={self.width} must be even: rotary positions turn pairs of features")
        check_multiple("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        activation(self.hidden_act)

    @property
    def width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def task(self) -> str:
        """Always 'causal_lm': this family has the one head."""
        return "causal_lm"

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> LlamaConfig:
        """Reads a parsed config.json, in the old (rope_theta, rope_scaling) or the new (rope_parameters) spelling.

        Args:
          hf: the parsed file.
          **overrides: fields of this class that win over the file.

        Raises:
          ModelConfigError: the file describes a model that this family does not compute, or lacks a size.

        Example:
          >>> LlamaConfig.from_hf(LlamaConfig.tiny(qkv_bias=True, architecture="qwen2").to_hf()).qkv_bias
          True
        """
        kind = hf.get("model_type")
        if kind not in _STEM:
            raise ModelConfigError(f"model_type={kind!r} is not of the Llama family; expected one of {sorted(_STEM)}")
        named = (hf.get("architectures") or [""])[0]
        if named not in ("", _STEM[kind] + "ForCausalLM", _STEM[kind] + "Model"):
            raise ModelConfigError(f"architectures={[named]} is not supported; expected {_STEM[kind]}ForCausalLM")
        if hf.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelConfigError("partial_rotary_factor other than 1 is not supported")
        fields = present(hf, _REQUIRED, kind)
        fields["rms_norm_eps"] = 1e-6  # what transformers assumes where the file is silent
        fields |= {name: hf[name] for name in _OPTIONAL if hf.get(name) is not None}
        fields["num_key_value_heads"] = hf.get("num_key_value_heads") or hf["num_attention_heads"]
        # Qwen3 alone fixes the width of a head apart from hidden_size where the file leaves it out.
        fields["head_dim"] = hf.get("head_dim") or (128 if kind == "qwen3" else None)
        fields["rope_theta"], fields["rope_scaling"] = _rope(hf)
        fields["sliding_window"] = _window(hf)
        if kind == "mixtral":
            fields |= present(hf, ("num_local_experts", "num_experts_per_tok"), kind)
        bias = bool(hf.get("attention_bias", False))
        fields["qkv_bias"] = kind == "qwen2" or bias
        fields["out_bias"] = kind != "qwen2" and bias
        fields["mlp_bias"] = bool(hf.get("mlp_bias", False))
        fields["qk_norm"] = kind == "qwen3"
        return cls(**({"architecture": kind, **fields} | overrides))

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a config.json that transformers 4 and 5 read back as the same model.

        Raises:
          ModelConfigError: the architecture cannot express the biases or norms of this config.

        Example:
          >>> LlamaConfig.tiny().to_hf()["architectures"]
          ['LlamaForCausalLM']
        """
        self._check_expressible()
        out: dict[str, Any] = {name: getattr(self, name) for name in _REQUIRED + _OPTIONAL}
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            names = _LLAMA3 if self.rope_scaling.kind == "llama3" else ("factor",)
            rope = {"rope_type": self.rope_scaling.kind} | {name: getattr(self.rope_scaling, name) for name in names}
        out |= {
            "model_type": self.architecture,
            "architectures": [_STEM[self.architecture] + "ForCausalLM"],
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.width,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope if self.rope_scaling is not None else None,
            "rope_parameters": rope | {"rope_theta": self.rope_theta},
        }
        if self.architecture in ("llama", "qwen3"):
            out["attention_bias"] = self.qkv_bias
        if self.architecture == "llama":
            out["mlp_bias"] = self.mlp_bias
        else:
            out["sliding_window"] = self.sliding_window
        if self.architecture == "mixtral":
            out |= {name: getattr(self, name) for name in ("num_local_experts", "num_experts_per_tok")}
        if self.architecture in ("qwen2", "qwen3"):
            out["use_sliding_window"] = self.sliding_window is not None
            out["max_window_layers"] = self.num_hidden_layers if self.sliding_window is None else 0
        return out

    def _check_expressible(self) -> None:
        kind = self.architecture
        fixed = {
            "llama": self.qkv_bias == self.out_bias and not self.qk_norm and self.sliding_window is None,
            "mistral": not (self.qkv_bias or self.out_bias or self.mlp_bias or self.qk_norm),
            "mixtral": not (self.qkv_bias or self.out_bias or self.mlp_bias or self.qk_norm),
            "qwen2": self.qkv_bias and not (self.out_bias or self.mlp_bias or self.qk_norm),
            "qwen3": self.qkv_bias == self.out_bias and self.qk_norm and not self.mlp_bias,
        }
        if not fixed[kind]:
            raise ModelConfigError(
                f"architecture={kind!r} cannot express qkv_bias={self.qkv_bias}, out_bias={self.out_bias}, "
                f"mlp_bias={self.mlp_bias}, qk_norm={self.qk_norm}, sliding_window={self.sliding_window}; "
                "choose the architecture that has them"
            )

    @classmethod
    def tiny(cls, **overrides: Any) -> LlamaConfig:
        """A model of a few thousand parameters, for tests and examples.

        Example:
          >>> LlamaConfig.tiny().num_key_value_heads
          2
        """
        small: dict[str, Any] = {
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        return cls(**(small | overrides))


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    rope = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    theta = rope.get("rope_theta") or hf.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelConfigError("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return float(theta), None
    needed = {"linear": ("factor",), "llama3": _LLAMA3}.get(kind)
    if needed is None:
        raise ModelConfigError(f"rope type {kind!r} is not supported; expected 'default', 'linear' or 'llama3'")
    missing = [name for name in needed if rope.get(name) is None]
    if missing:
        raise ModelConfigError(f"rope type {kind!r} needs {missing} in the config.json")
    return float(theta), RopeScaling(kind=kind, **{name: rope[name] for name in needed})


def _window(hf: Mapping[str, Any]) -> int | None:
    """The sliding window of every layer; layers that differ are refused, as one scanned layer has one window."""
    kind, layers = hf["model_type"], hf["num_hidden_layers"]
    # An absent key means the published default of Mistral; null means no window.
    window = hf.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind == "llama" or window is None:
        return None
    if kind in ("qwen2", "qwen3") and not hf.get("use_sliding_window", False):
        return None
    types = hf.get("layer_types")
    if types is None and kind in ("qwen2", "qwen3"):
        first = hf.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if types is not None and len(set(types)) > 1:
        raise ModelConfigError("layers with and without a sliding window in one model are not supported")
    return None if types and types[0] == "full_attention" else int(window)
