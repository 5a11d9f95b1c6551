"""LoRAM: LoRA trained on a pruned model and used on the whole one.

Train Small, Infer Large: Memory-Efficient LoRA Training for Large Language Models (arXiv 2502.13533). The base is most of what LoRA
training holds. `choose` picks attention heads and MLP features to keep, `prune` cuts the model down to them, any training of this
library then fits a LoRA to the small model (which its publisher may have trained on a little, to make up for the cut; that is thrown
away), and `recover` lays its factors back, zero where something was cut: for kept inputs and outputs the update of the whole model
is that of the small one, elsewhere zero. `sparsify` is the variant that zeroes single entries: shapes stay, an adapter needs no recovery.
Trained: ``r (n_in' + n_out')`` of a weight of the small model; deployed: ``r (n_in + n_out)`` of the whole one.

    kept = lr.loram.choose(key, params, {r".*/attention": lr.loram.heads(8, keep=0.25), r".*/mlp": lr.loram.features(keep=0.25)})
    small = lr.loram.prune(params, kept)
    ...  # lr.plan(small, {...: lr.lora(rank=8)}), training
    adapters = lr.loram.recover(trained, kept, params)

Pruning by weights' magnitude is a reconstruction: the paper prunes at random, by the gradients of LLM-Pruner, and by SparseGPT.
"""

from lowrank_jax.loram.choosing import choose
from lowrank_jax.loram.cut import prune, sparsify
from lowrank_jax.loram.recovery import recover, shrink
from lowrank_jax.loram.units import Kept, Units, features, heads

__all__ = ["Kept", "Units", "choose", "features", "heads", "prune", "recover", "shrink", "sparsify"]
