"""The five Llama models of the GaLore paper, for pre-training, and the ranks it trains them with."""

from __future__ import annotations

from typing import Any

from lowrank_jax.checks import check_choice
from lowrank_jax.models.llama_config import LlamaConfig

# hidden_size, intermediate_size, heads, layers, longest sequence
_SIZES = {
    "60m": (512, 1376, 8, 8, 1024),
    "130m": (768, 2048, 12, 12, 1024),
    "350m": (1024, 2736, 16, 24, 1024),
    "1b": (2048, 5461, 32, 24, 1024),
    "7b": (4096, 11008, 32, 32, 2048),
}

GALORE_RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}


def galore_paper(size: str, **overrides: Any) -> LlamaConfig:
    """A model of GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (arXiv 2403.03507).

    A vocabulary of 32,000, embeddings that are not tied, no biases. `GALORE_RANKS` has the paper's rank for each.

    Args:
      size: '60m', '130m', '350m', '1b' or '7b'.
      **overrides: fields of the configuration, such as scan_layers.

    Raises:
      ValueError: an unknown size.

    Example:
      >>> import jax
      >>> from lowrank_jax import models
      >>> sum(leaf.size for leaf in jax.tree.leaves(models.param_shapes(galore_paper("60m"))))
      58073600
    """
    check_choice("galore_paper", "size", size, tuple(_SIZES))
    hidden, intermediate, heads, layers, longest = _SIZES[size]
    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": longest,
        "rms_norm_eps": 1e-6,
    }
    return LlamaConfig(**(shape | overrides))
