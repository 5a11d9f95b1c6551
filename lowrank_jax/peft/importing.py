"""Loading a PEFT directory as adapters."""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters import Adapters
from lowrank_jax.models.tensors import LazyTensor, open_safetensors
from lowrank_jax.models.trees import Config
from lowrank_jax.peft.assemble import assemble_full, place, place_common
from lowrank_jax.peft.codecs.base import Codec, Item, take
from lowrank_jax.peft.config import read_config
from lowrank_jax.peft.directory import WEIGHTS
from lowrank_jax.peft.fields import PeftFormatError
from lowrank_jax.peft.keys import Contents, sort_tensors
from lowrank_jax.peft.names import NameMap, Names, part_of, resolve
from lowrank_jax.peft.parameters import name_parameters
from lowrank_jax.peft.targets import saves, selects, selects_parameter, trains_rows
from lowrank_jax.peft.tensors import weight_from_torch, weight_shape
from lowrank_jax.peft.units import Unit
from lowrank_jax.plan import Entry, Plan
from lowrank_jax.sites import Site, flatten
from lowrank_jax.sites import sites as find_sites


class Slot(NamedTuple):
    """Where a parameter of the other model is kept in ours: the weight's path, and the module's full name with its part of the stack."""

    path: str
    unit: Unit


def load(
    directory: str | os.PathLike[str],
    params: Any,
    *,
    architecture: Config | None = None,
    name_map: NameMap | None = None,
    sites: Mapping[str, Site] | None = None,
    dtype: Any = None,
) -> Adapters:
    """Reads a PEFT adapter as adapters of a model: the method of its ``peft_type`` at every adapted weight (`lora`, `dora`, `adalora`,
    `vera`, `randlora`, `ia3`, `trainable_tokens`), `full` at those of ``modules_to_save``.

    The layers of a scanned stack become one adapter: layers without one are left out, lower ranks are padded with zeros, and where
    ``alpha / r`` differs between layers it is multiplied into ``b``. A rank above the weight's smaller dimension is brought down to it.

    Args:
      directory: with adapter_config.json and adapter_model.safetensors.
      params: the model's parameters (arrays, or ShapeDtypeStructs); where they are sharded, so are the factors.
      architecture, name_map: as for `save`. sites: what `lowrank_jax.linen.sites` found; None: what the parameters tell.
      dtype: of the factors; None keeps the file's.

    Raises:
      ValueError: sites or names that do not fit the model. FileNotFoundError: a file is missing.
      PeftFormatError: a field that cannot be honoured, a tensor that is missing, unexpected, or of
        another shape than the weight or the configuration ask for. lowrank_jax.models.tensors.CorruptFileError: a damaged file.

    Example:
      >>> import tempfile, lowrank_jax as lr
      >>> from lowrank_jax import peft
      >>> params = {"query": {"kernel": jnp.ones((4, 3))}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"query": lr.lora(rank=2)}))
      >>> out = peft.save(adapters, tempfile.mkdtemp(), name_map={"query": "attention.query"})
      >>> bool((peft.load(out, params, name_map={"query": "attention.query"}).sites["query/kernel"]["a"] ==
      ...       adapters.sites["query/kernel"]["a"]).all())
      True
    """
    folder = pathlib.Path(directory)
    names = resolve(architecture, name_map)
    codec, config = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = (
            "adapter_model.bin is pickled and never read; save it as safetensors with PEFT"
            if pickled
            else "is the download complete?"
        )
        raise FileNotFoundError(f"{folder / WEIGHTS}: no such file; {hint}.")
    contents = sort_tensors(open_safetensors(folder / WEIGHTS), codec, config, names.alias)
    flat = flatten(params)
    if sites is None:
        sites = find_sites(params, {re.escape(path): "bio" for path in names.stacks if path in flat})
    for path, site in sites.items():
        if path not in flat or tuple(flat[path].shape) != site.shape:
            raise ValueError(
                f"sites has {path} of shape {site.shape}, which params lack; pass the sites of this model."
            )
    slots = _slots(sites, names)
    name_parameters(contents, (slot.unit for slot in slots.values()), config, folder)
    _check_known(folder, contents, slots, config, names)

    adapted: dict[str, list[Item]] = {}
    for module, tensors in contents.adapted.items():
        path, unit = slots[module, "weight"]
        adapted.setdefault(path, []).append(Item(sites[path], unit, contents.names[module], tensors))
    whole: dict[str, np.ndarray] = {}
    for module, tensors in contents.whole.items():
        for part, tensor in tensors.items():
            path = slots[module, part].path
            whole[path] = _read_whole(sites[path], tensor, len(names.of(sites[path])))

    entries: list[Entry] = []
    made: dict[str, dict[str, jax.Array]] = {}
    for path in flat:
        if path in adapted and path in whole:
            raise PeftFormatError(f"{folder}: {path} is adapted and is in modules_to_save as well; remove one of them.")
        if path in adapted:
            entry, leaves = _read(codec, adapted[path], config)
        elif path in whole:
            entry, leaves = assemble_full(sites[path], whole[path])
        else:
            continue
        entries.append(entry)
        made[path] = place(entry, leaves, flat[path], dtype)
    sizes = [math.prod(leaf.shape) for leaf in flat.values()]
    total = sum(n * jnp.dtype(leaf.dtype).itemsize for n, leaf in zip(sizes, flat.values(), strict=True))
    plan = Plan(tuple(entries), sum(sizes), total)
    common = {}
    for name in plan.shared:
        assert codec.read_common is not None
        own = [entry for entry in entries if str(entry.method) == name]
        leaves = codec.read_common(config, contents.common, own)
        common[name] = place_common(leaves, flat[own[0].site.path], dtype)
    return Adapters(made, common, plan)


def _slots(sites: Mapping[str, Site], names: Names) -> dict[tuple[str, str], Slot]:
    """The slot of every parameter of the other model: ``{(module, 'weight' or 'bias'): slot}``."""
    slots: dict[tuple[str, str], Slot] = {}
    for path, site in sites.items():
        for unit in names.of(site):
            key = (names.alias(unit.name), part_of(site))
            if key in slots:
                raise ValueError(f"name_map gives {unit.name!r} to both {slots[key].path} and {path}.")
            slots[key] = Slot(path, unit)
    return slots


def _check_known(
    folder: pathlib.Path,
    contents: Contents,
    slots: Mapping[tuple[str, str], Slot],
    config: Mapping[str, Any],
    names: Names,
) -> None:
    """Every tensor has a weight here, and every weight the configuration speaks of has its tensors."""
    wanted = [(module, "weight") for module in contents.adapted]
    wanted += [(module, part) for module, parts in contents.whole.items() for part in parts]
    for module, part in wanted:
        if (module, part) not in slots:
            raise PeftFormatError(
                f"{folder}: the adapter has tensors of {contents.names[module]!r} ({part}), which is no weight of this model. "
                "Load it on the model it was trained on, or name the module in name_map."
            )
        path = slots[module, part].path
        if path in names.tied and "trainable_tokens_delta" not in contents.adapted.get(module, {}):
            raise PeftFormatError(
                f"{folder}: {path} is also the output head here, but PEFT adapts the lookup only; merge it with PEFT."
            )
    if not contents.adapted and not contents.whole:
        raise PeftFormatError(f"{folder}: the adapter holds no tensors.")
    rows = any("trainable_tokens_delta" in tensors for tensors in contents.adapted.values())
    if config.get("trainable_token_indices") and not rows:
        raise PeftFormatError(
            f"{folder}: trainable_token_indices names rows, but their tensors are missing; is the file complete?"
        )
    for (module, part), slot in slots.items():
        full = contents.names.get(module, slot.unit.name)
        chosen = selects if slot.unit.parameter is None else selects_parameter
        if saves(config, full):
            missing = part not in contents.whole.get(module, {})
        else:
            named = chosen(config, full) or trains_rows(config, full)
            missing = part == "weight" and bool(named) and module not in contents.adapted
        if missing:
            raise PeftFormatError(
                f"{folder}: adapter_config.json names {full!r}, but its tensors are missing; is the file complete?"
            )


def _read(codec: Codec, items: list[Item], config: Mapping[str, Any]) -> tuple[Entry, dict[str, np.ndarray]]:
    site = items[0].site
    if site.kind == "param":
        raise PeftFormatError(
            f"{site.path} is adapted ({items[0].module}) but is not known as a matrix; pass "
            "sites=lowrank_jax.linen.sites(model, params, ...)."
        )
    return codec.read(items, config)


def _read_whole(site: Site, tensor: LazyTensor, copies: int) -> np.ndarray:
    if site.batch or copies != 1:
        raise PeftFormatError(
            f"{tensor.file}: modules_to_save holds layers of the stack {site.path}; load it on a model whose layers are not scanned."
        )
    return weight_from_torch(site, take(tensor, site.path, weight_shape(site), site.path))
