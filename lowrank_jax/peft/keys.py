"""The tensor names of an adapter file, sorted into what adapts a module, whole modules, and what is common to all."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank_jax.models.tensors import LazyTensor
from lowrank_jax.peft.codecs.base import NAME, Codec
from lowrank_jax.peft.fields import PeftFormatError
from lowrank_jax.peft.targets import saves

_WHOLE = re.compile(r"(.+?)(?:\.modules_to_save\.[^.]+)?\.(weight|bias)")
_BASE = re.compile(r".+\.base_layer\.(weight|bias)")


@dataclass
class Contents:
    """What an adapter file holds, by module name in the spelling of ``alias``.

    Attributes:
      adapted: ``{module: {part of the codec: tensor}}``; whole: ``{module: {'weight' or 'bias': tensor}}``; common: ``{part: tensor}``.
      names: the modules' names as the file spells them.
    """

    alias: Callable[[str], str] = str
    adapted: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    whole: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    common: dict[str, LazyTensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def sort_tensors(
    tensors: Mapping[str, LazyTensor], codec: Codec, config: Mapping[str, Any], alias: Callable[[str], str]
) -> Contents:
    """Sorts tensors by module; names with and without ``base_model.model.`` and with an adapter's name inside are read alike.

    Raises:
      PeftFormatError: a tensor that is none of the codec's and belongs to no module of ``modules_to_save``, or that is there twice.

    Example:
      >>> from types import SimpleNamespace
      >>> from lowrank_jax.peft.codecs import CODECS
      >>> found = sort_tensors({"base_model.model.q.lora_A.default.weight": SimpleNamespace()}, CODECS["LORA"], {}, str)
      >>> list(found.adapted), list(found.adapted["q"])
      (['q'], ['lora_A'])
    """
    contents = Contents(alias)
    parts = {part: re.compile(rf"(.+)\.(?:{expression})") for part, expression in codec.parts.items()}
    # PEFT used to write a copy for every module too.
    commons = {part: re.compile(rf"(?:.+\.)?{part}{NAME}") for part in codec.common}
    for name, tensor in tensors.items():
        short = name.removeprefix("base_model.model.")
        if _BASE.fullmatch(short):
            warnings.warn(f"{tensor.file}: {name} is a copy of the base's weight and is not read.", stacklevel=4)
            continue
        if part := next((part for part, expression in commons.items() if expression.fullmatch(short)), ""):
            contents.common.setdefault(part, tensor)
            continue
        module, part, kind = _place(short, parts, contents)
        if kind is contents.whole and not saves(config, module):
            raise PeftFormatError(
                f"{tensor.file}: tensor {name!r} is none of {codec.peft_type} ({', '.join(codec.parts)}) nor of a module in "
                f"modules_to_save; expected names such as 'base_model.model.<module>.{next(iter(codec.parts))}'."
            )
        held = kind.setdefault(alias(module), {})
        if part in held:
            raise PeftFormatError(
                f"{tensor.file}: {part} of {module!r} is there twice; expected one adapter in a file."
            )
        held[part] = tensor
        contents.names[alias(module)] = module
    return contents


def _place(
    name: str, parts: Mapping[str, re.Pattern[str]], contents: Contents
) -> tuple[str, str, dict[str, dict[str, LazyTensor]]]:
    """The module and part that a name means, and where it belongs; what is none of the codec's stands whole, if anything."""
    for part, expression in parts.items():
        if match := expression.fullmatch(name):
            return match[1], part, contents.adapted
    match = _WHOLE.fullmatch(name)
    return (match[1], match[2], contents.whole) if match else ("", "", contents.whole)
