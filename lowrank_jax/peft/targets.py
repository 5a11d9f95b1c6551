"""The module selectors of PEFT, read as PEFT reads them, and written so that they select what they should and nothing else."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any


def selects(config: Mapping[str, Any], module: str) -> bool | None:
    """Whether an adapter_config adapts a module; None where the configuration does not tell (``all-linear``).

    Example:
      >>> selects({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj")
      True
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and (re.fullmatch(excluded, module) if isinstance(excluded, str) else _ends(module, excluded)):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in config.get("modules_to_save") or ()):
        return False
    if targets is None or targets == "all-linear":
        return None
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    return _ends(module, targets) and _in_layers(config, module)


def saves(config: Mapping[str, Any], module: str) -> bool:
    """Whether an adapter_config holds a full copy of a module (or of one that contains it).

    Example:
      >>> saves({"modules_to_save": ["classifier"]}, "classifier.dense")
      True
    """
    parents = [module[: m.start()] for m in re.finditer(r"\.|$", module)]
    return any(parent.endswith(name) for name in config.get("modules_to_save") or () for parent in parents)


def selects_parameter(config: Mapping[str, Any], name: str) -> bool:
    """Whether an adapter_config adapts a parameter of a module, ``module.parameter``.

    Example:
      >>> selects_parameter({"target_parameters": ["experts.up"]}, "layers.0.experts.up")
      True
    """
    return _ends(name, config.get("target_parameters") or ())


def trains_rows(config: Mapping[str, Any], module: str) -> bool:
    """Whether an adapter_config names rows of a module; one that only lists rows means the model's input embedding, which it does not name.

    Example:
      >>> trains_rows({"trainable_token_indices": {"embed_tokens": [3]}}, "model.embed_tokens")
      True
    """
    rows = config.get("trainable_token_indices")
    return isinstance(rows, dict) and any(map(module.endswith, rows))


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """A module's entry of ``rank_pattern`` or ``alpha_pattern``; the first that matches counts.

    Example:
      >>> pattern_value({"0.q_proj": 4}, "model.layers.0.q_proj", 8)
      4
    """
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def write_targets(chosen: Collection[str], known: Collection[str] | None) -> list[str] | str:
    """The shortest sorted list of name endings that selects exactly the chosen modules.

    Args:
      chosen: full names. known: every module of the model; None: unknown, full names are written.

    Returns:
      The list, or a regular expression where even a full name is the ending of another module's.

    Example:
      >>> write_targets(["a.0.q", "a.1.q"], ["a", "a.0", "a.0.q", "a.0.k", "a.1", "a.1.q", "a.1.k"])
      ['q']
      >>> write_targets(["a.0.q"], ["a", "a.0", "a.0.q", "a.1", "a.1.q"])
      ['0.q']
    """
    if known is None:
        return sorted(chosen)
    strays: set[str] = set()  # endings of modules that are not chosen
    for name in set(known) - set(chosen):
        strays.update(_endings(name))
    found = {name: next((end for end in _endings(name) if end not in strays), None) for name in chosen}
    if None in found.values():
        return "|".join(re.escape(name) for name in sorted(chosen))
    return sorted({end for end in found.values() if end is not None})


def write_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """``rank_pattern`` or ``alpha_pattern``: the modules whose value is not the default, by full name.

    A full name that is also the ending of another adapted module's is anchored.
    """
    written = {}
    for name in sorted(values):
        if values[name] != default:
            alone = [other for other in values if re.match(rf"(.*\.)?({name})$", other)] == [name]
            written[name if alone else "^" + re.escape(name)] = values[name]
    return written


def _endings(name: str) -> Iterable[str]:
    """``a.b.c`` -> ``c``, ``b.c``, ``a.b.c``."""
    words = name.split(".")
    return [".".join(words[n:]) for n in range(len(words) - 1, -1, -1)]


def _ends(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    # Without a pattern the list of layers may not stand at the root: so PEFT reads it.
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for expression in [rf"(?:^|.*?\.){pattern}\.([0-9]{{1,9}})\." for pattern in patterns or ()] or [
        r".*?\.[^.]*\.([0-9]{1,9})\."
    ]:
        match = re.match(expression, module)
        if match:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False
