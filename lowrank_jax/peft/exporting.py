"""Saving adapters as a PEFT directory."""

from __future__ import annotations

import functools
import json
import os
import pathlib
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters import Adapters, expand
from lowrank_jax.files import write_directory
from lowrank_jax.forms import Dense, UnsupportedError
from lowrank_jax.models.tensors import save_safetensors
from lowrank_jax.models.trees import Config
from lowrank_jax.peft.card import model_card
from lowrank_jax.peft.codecs import choose
from lowrank_jax.peft.codecs.base import Piece
from lowrank_jax.peft.config import make_config
from lowrank_jax.peft.directory import CARD, FILE, WEIGHTS, check_free
from lowrank_jax.peft.names import NameMap, Names, part_of, resolve
from lowrank_jax.peft.tensors import weight_to_torch
from lowrank_jax.peft.units import Unit
from lowrank_jax.plan import Entry

PREFIX, COMMON = "base_model.model.", "base_model."


def save(
    adapters: Adapters,
    directory: str | os.PathLike[str],
    *,
    architecture: Config | None = None,
    name_map: NameMap | None = None,
    base_model_name_or_path: str | None = None,
    peft_type: str | None = None,
    dtype: Any = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes adapters so that PEFT and its readers load them on the published base.

    Every low-rank update becomes an exact LoRA relative to the original base: an anchor is part of it (PiSSA has rank 2r, LaMDA rank
    r), a core is multiplied into the smaller factor, and ``lora_alpha / r`` is the method's scale. DoRA, IA3 and trained tokens are
    written as what they are. A scanned stack becomes one adapter a layer; layers whose factors are padded get their own rank. Modules
    outside the layers that are trained in full (kernel and bias) go to ``modules_to_save``.

    Args:
      adapters: unfolded, one adapter. directory: made, or replaced if ``overwrite`` and it holds nothing but an adapter.
      architecture: the configuration of a reference model, such as ``models.load(...).config``; or, for any other model,
      name_map: ``{path of a weight or its module: module name, or one for each layer of a stack}``, or a function
        ``(path of the weight, layer or None) -> module name``. A `Parameter` stands for a module's own parameter, such as the weights of
        all experts of a layer.
      base_model_name_or_path: the base, for the configuration and the card. dtype: of the tensors; None keeps each leaf's.
      peft_type: None: LORA, which every reader of the format knows, where all updates are low-rank; or ADALORA, VERA, RANDLORA, which keep
        the leaves of the methods of these names, so that PEFT can train on.

    Returns:
      The directory.

    Raises:
      ValueError: folded or stacked adapters, a weight without a name, factors that are not finite, an unknown ``peft_type``.
      UnsupportedError: a method that the type cannot hold, or a full update that is no whole module outside the layers.
      FileExistsError: the directory is taken. TypeError: both or neither of ``architecture`` and ``name_map``.

    Example:
      >>> import jax, tempfile, lowrank_jax as lr
      >>> from lowrank_jax import peft
      >>> params = {"query": {"kernel": jnp.ones((4, 3))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"query": lr.lora(rank=2)}))
      >>> out = peft.save(adapters, tempfile.mkdtemp(), name_map={"query": "attention.query"})
      >>> sorted(file.name for file in out.iterdir())
      ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    out = pathlib.Path(directory)
    names = resolve(architecture, name_map)
    check_free(out, overwrite)
    if adapters.folded:
        raise ValueError(
            "peft.save: these adapters are folded into another base; unfold them first (lowrank_jax.unfold)."
        )
    if adapters.stacked is not None:
        raise ValueError("peft.save takes one adapter; pick one of the stack with lowrank_jax.take.")

    codec = choose(adapters.plan.entries, peft_type)
    tensors: dict[str, np.ndarray] = {}
    whole: dict[str, set[str]] = {}
    pieces = []
    for entry in adapters.plan.entries:
        units, form = _units(entry, names), functools.partial(_form, adapters, entry)
        if entry.method.form is Dense:
            name = _whole_module(entry, units)
            whole.setdefault(name, set()).add(part_of(entry.site))
            tensors[f"{PREFIX}{name}.{part_of(entry.site)}"] = weight_to_torch(entry.site, np.asarray(form().weight))
        else:
            shared = adapters.shared.get(str(entry.method), {})
            pieces.append(Piece(entry, units, adapters.sites[entry.site.path], shared, form))
    _check_distinct(pieces)
    if whole and not codec.saves_modules:
        raise UnsupportedError(
            f"{min(whole)}: {codec.peft_type} has no modules that are trained in full. Save it beside a LoRA, "
            "or merge it (lowrank_jax.merge)."
        )
    with jax.default_matmul_precision("highest"):  # what is exported is called exact
        written = codec.write(pieces, names.modules)
    tensors |= {f"{PREFIX}{module}.{name}": x for module, parts in written.modules.items() for name, x in parts.items()}
    tensors |= {f"{COMMON}{name}": x for name, x in written.common.items()}
    tensors = {name: _cast(tensor, dtype) for name, tensor in tensors.items()}
    _check(tensors, whole, names)
    saved = _collapse(set(whole), names)
    task_type = names.task_type if names.head is None or names.head in saved else None
    config = make_config(codec, written.fields, modules_to_save=saved, task_type=task_type,
                         base_model_name_or_path=base_model_name_or_path)  # fmt: skip
    methods = [str(entry.method) for entry in adapters.plan.entries]

    def fill(folder: pathlib.Path) -> None:
        (folder / FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
        card = model_card(base_model_name_or_path, task_type, codec.peft_type, methods, len(written.modules), saved)
        (folder / CARD).write_text(card, encoding="utf-8")

    write_directory(out, fill)
    return out


def _form(adapters: Adapters, entry: Entry) -> Any:
    path = entry.site.path
    alone = adapters.replace(plan=replace(adapters.plan, entries=(entry,)), sites={path: adapters.sites[path]})
    return expand(alone)[path]


def _units(entry: Entry, names: Names) -> tuple[Unit, ...]:
    site = entry.site
    units = names.of(site)
    if not units:
        raise ValueError(
            f"{site.path} has no module name in the Hugging Face model; give it one in name_map, or leave it out of the plan."
        )
    if site.path in names.tied and entry.method.name != "trainable_tokens":
        raise UnsupportedError(
            f"{site.path} is also the output head, and PEFT would adapt the lookup only. Merge it (lowrank_jax.merge) and save the model."
        )
    return units


def _check_distinct(pieces: list[Piece]) -> None:
    seen: set[str] = set()
    for piece in pieces:
        for unit in piece.units:
            if unit.name in seen:
                raise ValueError(
                    f"{piece.entry.site.path}: module {unit.name!r} has an adapter already; name_map gives one name to two weights."
                )
            seen.add(unit.name)


def _whole_module(entry: Entry, units: tuple[Unit, ...]) -> str:
    """The module a full weight belongs to, if it stands outside the numbered layers."""
    numbered = any(word.isdigit() for word in units[0].name.split("."))
    if len(units) != 1 or entry.site.batch or numbered or units[0].parameter is not None:
        raise UnsupportedError(
            f"{entry.site.path}: {entry.method.name} changes a whole weight inside the layers, which is no small adapter. "
            "Merge it (lowrank_jax.merge) and save the model."
        )
    return units[0].name


def _cast(tensor: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # an overflow is an inf, which `_check` refuses by name
        return np.asarray(tensor, tensor.dtype if dtype is None else jnp.dtype(dtype))


def _check(tensors: dict[str, np.ndarray], whole: dict[str, set[str]], names: Names) -> None:
    for name, tensor in tensors.items():
        if not bool(jnp.isfinite(tensor).all()):
            raise ValueError(f"{name}: the values are not finite in {tensor.dtype}; nothing was saved.")
    for module, parts in whole.items():
        expected = {"weight"} if names.parts is None else names.parts[module]
        if not expected <= parts or "weight" not in parts:
            raise UnsupportedError(
                f"{module}: only its {', '.join(sorted(parts))} is trained in full, but the format keeps whole modules "
                f"({', '.join(sorted(expected | {'weight'}))}). Add the rest to the plan with lowrank_jax.full(), or merge."
            )


def _collapse(modules: set[str], names: Names) -> list[str]:
    """Names the largest container whose every parameter is saved, as PEFT does for heads of several modules."""
    if names.parts is None:
        return sorted(modules)
    others = [name for name in names.parts if name not in modules]
    found = set()
    for module in modules:
        words = module.split(".")
        heads = (".".join(words[:n]) for n in range(1, len(words) + 1))
        found.add(next(head for head in heads if not any(f"{name}.".startswith(f"{head}.") for name in others)))
    return sorted(found)
