"""The tensor names of an adapter file, sorted into LoRA factors and whole modules."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank_jax.models.tensors import LazyTensor
from lowrank_jax.peft.config import PeftFormatError
from lowrank_jax.peft.targets import saves

_FACTOR = re.compile(r"(.+)\.(?:(lora_[AB])(?:\.[^.]+)?\.weight|(lora_embedding_[AB])(?:\.[^.]+)?)")
_WHOLE = re.compile(r"(.+?)(?:\.modules_to_save\.[^.]+)?\.(weight|bias)")
_BASE = re.compile(r".+\.base_layer\.(weight|bias)")


@dataclass
class Contents:
    """What an adapter file holds, by module name in the spelling of ``alias``.

    Attributes:
      factors: ``{module: {'lora_A' or 'lora_embedding_A', ...: tensor}}``; whole: ``{module: {'weight' or 'bias': tensor}}``.
      names: the modules' names as the file spells them.
    """

    factors: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    whole: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def sort_tensors(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], alias: Callable[[str], str]) -> Contents:
    """Sorts tensors by module; names with and without ``base_model.model.`` and with an adapter's name inside are read alike.

    Raises:
      PeftFormatError: a tensor that is no LoRA factor and belongs to no module of ``modules_to_save``, or that is there twice.

    Example:
      >>> from types import SimpleNamespace
      >>> found = sort_tensors({"base_model.model.q.lora_A.default.weight": SimpleNamespace()}, {}, str)
      >>> list(found.factors), list(found.factors["q"])
      (['q'], ['lora_A'])
    """
    contents = Contents()
    for name, tensor in tensors.items():
        short = name.removeprefix("base_model.model.")
        if _BASE.fullmatch(short):
            warnings.warn(f"{tensor.file}: {name} is a copy of the base's weight and is not read.", stacklevel=4)
            continue
        match = _FACTOR.fullmatch(short)
        if match:
            module, part, kind = match[1], match[2] or match[3], contents.factors
        else:
            match = _WHOLE.fullmatch(short)
            if match is None or not saves(config, match[1]):
                raise PeftFormatError(
                    f"{tensor.file}: tensor {name!r} is neither a LoRA factor nor of a module in modules_to_save; "
                    "expected names such as 'base_model.model.<module>.lora_A.weight'."
                )
            module, part, kind = match[1], match[2], contents.whole
        module = alias(contents_name := module)
        parts = kind.setdefault(module, {})
        if part in parts:
            raise PeftFormatError(
                f"{tensor.file}: {part} of {contents_name!r} is there twice; expected one adapter in a file."
            )
        parts[part] = tensor
        contents.names[module] = contents_name
    return contents
