"""Fields of adapter_config.json: what stands for a missing one, and which values make sense."""

from __future__ import annotations

import copy
import math
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple


class PeftFormatError(ValueError):
    """An adapter directory that contradicts itself or the model, or that uses what cannot be expressed here."""


class Field(NamedTuple):
    """One field.

    Attributes:
      default: what PEFT takes where the field is missing or null. good: whether a value makes sense. expected: that, in words.
    """

    default: Any
    good: Callable[[Any], bool]
    expected: str


def count(default: int | None) -> Field:
    """A positive integer."""
    return Field(default, lambda value: type(value) is int and value > 0, "a positive integer")


def number(default: float) -> Field:
    """A finite number."""
    return Field(default, _finite, "a number")


def probability() -> Field:
    """A dropout rate."""
    return Field(0.0, lambda value: _finite(value) and 0 <= value < 1, "a probability in [0, 1)")


def by_module(good: Callable[[Any], bool], expected: str) -> Field:
    """``{pattern: value}``."""
    return Field(
        {},
        lambda value: isinstance(value, dict) and all(map(expression, value)) and all(map(good, value.values())),
        f"{expected} by module, or by an expression for modules",
    )


def indices(value: Any) -> bool:
    """Whether a value is a list of different rows."""
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value) and len(set(value)) == len(value)


def expression(value: Any) -> bool:
    """Whether a value is a regular expression, by itself and within the larger ones that PEFT makes of it."""
    try:
        return isinstance(value, str) and bool(re.compile(value)) and bool(re.compile(f"(^|.*)({value})$"))
    except (re.error, OverflowError, RecursionError):  # the last two of expressions that are too large
        return False


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _expressions(value: Any) -> bool:
    return isinstance(value, list) and all(map(expression, value))


def _layer_patterns(value: Any) -> bool:
    """Expressions without groups: PEFT reads the layer's number as the first group."""
    values = [value] if isinstance(value, str) else value
    return values is None or (_expressions(values) and not any(re.compile(one).groups for one in values))


def _layers(value: Any) -> bool:
    return value is None or type(value) is int or (isinstance(value, list) and all(type(n) is int for n in value))


SELECTOR = Field(
    None,
    lambda value: value is None or expression(value) or _names(value),
    "a list of names or a regular expression",
)
NAMES = Field(None, lambda value: value is None or _names(value), "a list of names")
MODULES = Field(None, lambda value: value is None or _expressions(value), "a list of names")
FLAG = Field(False, lambda value: isinstance(value, bool), "true or false")
ALPHAS = by_module(_finite, "numbers")
RANKS = by_module(lambda value: type(value) is int and value > 0, "positive integers")

# What every type that wraps modules has: `targets` reads them.
SELECTORS: dict[str, Field] = {"target_modules": SELECTOR, "exclude_modules": SELECTOR, "modules_to_save": MODULES,
                               "layers_to_transform": Field(None, _layers, "numbers of layers"),
                               "layers_pattern": Field(None, _layer_patterns, "regular expressions without groups")}  # fmt: skip
# Fields that say how the adapter was made or is run in torch and leave the meaning of its tensors alone.
WITHOUT_EFFECT = frozenset({"peft_type", "bias", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping",
                            "peft_version", "fan_in_fan_out", "init_weights"})  # fmt: skip


def check_fields(file: pathlib.Path, config: dict[str, Any], fields: Mapping[str, Field]) -> None:
    """Fills defaults in.

    Raises:
      PeftFormatError: a value that makes no sense; names the field.
    """
    for name, field in fields.items():
        if config.get(name) is None:
            config[name] = copy.copy(field.default)
        if not field.good(config[name]):
            raise PeftFormatError(f"{file}: {name} = {config[name]!r}; expected {field.expected}.")


def alpha_for(scale: float, rank: int) -> float | int:
    """The alpha whose ``alpha / rank`` is the scale, to the last bit where a short decimal gives it.

    Example:
      >>> alpha_for(2.0, 8), alpha_for(16 / 3, 3)
      (16, 16)
    """
    alpha = scale * rank
    short = next((c for c in (round(alpha), round(alpha, 9)) if c / rank == scale), alpha)
    return int(short) if math.isfinite(short) and short == int(short) else short


def commonest(values: Collection[Any]) -> Any:
    """The value that occurs most often; of equals, the largest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))
