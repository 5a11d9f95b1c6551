"""LT-SFT: sparse fine-tunings of a whole model that add up, chosen as a lottery ticket.

Composable Sparse Fine-Tuning for Cross-Lingual Transfer (arXiv 2110.07560).
"""

from lowrank_jax.lt_sft.lottery import MaskState, Ticket, allowed, l1_distance, lottery, mask_updates, top_changes
from lowrank_jax.lt_sft.sparse_delta import SparseDelta, load_delta

__all__ = [
    "MaskState",
    "SparseDelta",
    "Ticket",
    "allowed",
    "l1_distance",
    "load_delta",
    "lottery",
    "mask_updates",
    "top_changes",
]
