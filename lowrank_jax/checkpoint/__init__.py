"""Checkpoints of a run (Orbax, asynchronous) and small adapter directories (safetensors and JSON).

checksum        whether what is read back is what was saved
reference       what a saved thing belongs to: a base, by name and content
store           steps of a run on the disk, whatever it trains
adapter_run     the same for a run that trains an adapter: its base is named, never stored
adapter_files   an adapter as a small directory
"""

from lowrank_jax.checkpoint.adapter_files import load_adapter, read_record, save_adapter
from lowrank_jax.checkpoint.adapter_run import Checkpoints, Restored
from lowrank_jax.checkpoint.reference import Base, CheckpointError, base_reference, check_base, tree_hash
from lowrank_jax.checkpoint.store import Store, save_params

__all__ = [
    "Base",
    "CheckpointError",
    "Checkpoints",
    "Restored",
    "Store",
    "base_reference",
    "check_base",
    "load_adapter",
    "read_record",
    "save_adapter",
    "save_params",
    "tree_hash",
]
