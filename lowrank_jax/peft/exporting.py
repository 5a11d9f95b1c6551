"""Saving adapters as a PEFT directory."""

from __future__ import annotations

import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters import Adapters, expand
from lowrank_jax.files import write_directory
from lowrank_jax.forms import Dense, LowRank, UnsupportedError
from lowrank_jax.models.tensors import save_safetensors
from lowrank_jax.models.trees import Config
from lowrank_jax.peft.card import model_card
from lowrank_jax.peft.config import FILE, alpha_for, make_config
from lowrank_jax.peft.directory import CARD, WEIGHTS, check_free
from lowrank_jax.peft.names import NameMap, Names, depth, part_of, resolve
from lowrank_jax.peft.tensors import factor_names, factors_to_torch, weight_to_torch
from lowrank_jax.plan import Entry

PREFIX = "base_model.model."


def save(
    adapters: Adapters,
    directory: str | os.PathLike[str],
    *,
    architecture: Config | None = None,
    name_map: NameMap | None = None,
    base_model_name_or_path: str | None = None,
    dtype: Any = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes adapters so that PEFT and its readers load them on the published base.

    Every low-rank update becomes an exact LoRA relative to the original base: an anchor is part of it (PiSSA has rank 2r, LaMDA rank
    r), a core is multiplied into the smaller factor, and ``lora_alpha / r`` is the method's scale. A scanned stack becomes one LoRA a
    layer; layers whose factors are padded get their own rank. Modules outside the layers that are trained in full (kernel and bias)
    go to ``modules_to_save``.

    Args:
      adapters: unfolded, one adapter. directory: made, or replaced if ``overwrite`` and it holds nothing but an adapter.
      architecture: the configuration of a reference model, such as ``models.load(...).config``; or, for any other model,
      name_map: ``{path of a weight or its module: module name, or one for each layer of a stack}``, or a function
        ``(path of the weight, layer or None) -> module name``.
      base_model_name_or_path: the base, for the configuration and the card. dtype: of the tensors; None keeps each leaf's.

    Returns:
      The directory.

    Raises:
      ValueError: folded or stacked adapters, a weight without a name, factors that are not finite.
      UnsupportedError: a form that is not low-rank, or a full update that is no whole module outside the layers.
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

    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dropouts: Counter[float] = Counter()
    whole: dict[str, set[str]] = {}
    for path, form in expand(adapters).items():
        entry = adapters.plan.by_path[path]
        modules = _modules(entry, names)
        if isinstance(form, Dense):
            name = _whole_module(entry, modules)
            whole.setdefault(name, set()).add(part_of(entry.site))
            tensors[f"{PREFIX}{name}.{part_of(entry.site)}"] = _cast(
                weight_to_torch(entry.site, np.asarray(form.weight)), dtype
            )
            continue
        if not form.record.low_rank:
            raise UnsupportedError(
                f"{path}: {entry.method.name} is not a low-rank update; merge it (lowrank_jax.merge) and save the model."
            )
        low_rank: LowRank = form.as_low_rank()  # type: ignore[attr-defined]
        dropouts[low_rank.dropout] += 1
        for element, a, b in _elements(entry, low_rank):
            module = modules[element]
            if module in ranks:
                raise ValueError(
                    f"{path}: module {module!r} has an adapter already; name_map gives one name to two weights."
                )
            ranks[module], alphas[module] = a.shape[1], alpha_for(low_rank.scale, a.shape[1])
            for name, tensor in zip(factor_names(entry.site), factors_to_torch(entry.site, a, b), strict=True):
                tensors[f"{PREFIX}{module}.{name}"] = _cast(tensor, dtype)
    if not ranks:
        raise UnsupportedError(
            "peft.save: the adapter has no low-rank update, only full weights; merge it and save the model."
        )
    _check(tensors, whole, names)
    saved = _collapse(set(whole), names)
    task_type = names.task_type if names.head is None or names.head in saved else None
    config = make_config(ranks, alphas, dropout=dropouts.most_common(1)[0][0], known=names.modules, modules_to_save=saved,
                         task_type=task_type, base_model_name_or_path=base_model_name_or_path)  # fmt: skip
    methods = [str(entry.method) for entry in adapters.plan.entries]

    def fill(folder: pathlib.Path) -> None:
        (folder / FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
        card = model_card(base_model_name_or_path, task_type, methods, len(ranks), saved)
        (folder / CARD).write_text(card, encoding="utf-8")

    write_directory(out, fill)
    return out


def _modules(entry: Entry, names: Names) -> tuple[str, ...]:
    site = entry.site
    modules = names.of(site)
    if not modules:
        raise ValueError(
            f"{site.path} has no module name in the Hugging Face model; give it one in name_map, or leave it out of the plan."
        )
    if site.path in names.tied:
        raise UnsupportedError(
            f"{site.path} is also the output head, and PEFT would adapt the lookup only. Merge it (lowrank_jax.merge) and save the model."
        )
    if len(modules) != (depth(site) or 1) and site.kind != "param":
        raise ValueError(
            f"{site.path} is a stack of {depth(site) or 1}, but {len(modules)} module names are known for it."
        )
    return modules


def _whole_module(entry: Entry, modules: tuple[str, ...]) -> str:
    """The module a full weight belongs to, if it stands outside the numbered layers."""
    numbered = any(word.isdigit() for word in modules[0].split("."))
    if len(modules) != 1 or entry.site.batch or numbered:
        raise UnsupportedError(
            f"{entry.site.path}: {entry.method.name} changes a whole weight inside the layers, which is no small adapter. "
            "Merge it (lowrank_jax.merge) and save the model."
        )
    return modules[0]


def _elements(entry: Entry, form: LowRank) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """``(element of the stack, a [n_in, r], b [r, n_out])`` of every adapted element, core absorbed, padding cut off."""
    site, dtype = entry.site, form.a.dtype
    a = np.asarray(form.a).reshape(-1, *form.a.shape[-2:])
    b = np.asarray(form.b).reshape(-1, *form.b.shape[-2:])
    if form.mid is not None:
        mid = np.asarray(form.mid, np.float32)
        mid = mid[..., None] * np.eye(mid.shape[-1], dtype=np.float32) if mid.ndim < form.a.ndim else mid
        mid = mid.reshape(-1, *mid.shape[-2:])
        if site.n_out <= site.n_in:
            b = (mid @ b.astype(np.float32)).astype(dtype)
        else:
            a = (a.astype(np.float32) @ mid).astype(dtype)
    inner = (depth(site) or 1) // (site.batch_shape[0] if site.batch else 1)
    layers = range(len(a) // inner) if entry.layers is None else entry.layers
    for element in (layer * inner + n for layer in layers for n in range(inner)):
        one_a, one_b = a[element], b[element]
        if site.batch:
            used = (one_a != 0).any(0) | (one_b != 0).any(1)
            used[0] |= not used.any()  # no change at all is still written, at rank 1
            one_a, one_b = one_a[:, used], one_b[used]
        yield element, one_a, one_b


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
