"""Checks of arguments that several rooms make, with one wording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_choice(name: str, field: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises a ValueError that lists the choices unless ``value`` is one of them.

    Example:
      >>> check_choice("lora", "init", "kaiming", ("kaiming", "gaussian"))
    """
    if value not in choices:
        raise ValueError(f"{name}({field}={value!r}): expected one of {', '.join(map(repr, choices))}.")


def check_numbers(what: str, **numbers: float) -> None:
    """Raises a ValueError unless all are at least 1."""
    if min(numbers.values()) < 1:
        given = ", ".join(f"{name}={value}" for name, value in numbers.items())
        raise ValueError(f"{what}({given}): expected numbers of at least 1.")
