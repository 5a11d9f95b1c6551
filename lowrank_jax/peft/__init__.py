"""Adapters in and out of the PEFT format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Everything whose update is low-rank leaves as an exact LoRA relative to the published base weights, whatever method trained it,
so PEFT, vLLM and every other reader of the format serves it. Methods that PEFT has too come in as what they are, and can leave so:
see `codecs`. torch is not needed.
"""

from lowrank_jax.peft.exporting import save
from lowrank_jax.peft.fields import PeftFormatError
from lowrank_jax.peft.importing import load
from lowrank_jax.peft.names import NameMap
from lowrank_jax.peft.units import Parameter

__all__ = ["NameMap", "Parameter", "PeftFormatError", "load", "save"]
