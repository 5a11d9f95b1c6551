"""LORA: low-rank updates of any method, DoRA, trained rows of embeddings, and parameters of mixtures of experts."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from lowrank_jax.peft import fields
from lowrank_jax.peft.assemble import Element, assemble_lora
from lowrank_jax.peft.codecs.base import NAME, Arrays, Codec, Config, Item
from lowrank_jax.peft.codecs.lora_write import holds, write
from lowrank_jax.peft.codecs.trainable_tokens import assemble_rows
from lowrank_jax.peft.fields import PeftFormatError
from lowrank_jax.peft.targets import pattern_value
from lowrank_jax.peft.tensors import experts_from_torch, factor_names, factor_shapes, factors_from_torch, vector_shape
from lowrank_jax.plan import Entry
from lowrank_jax.sites import Site

_MERGE = "merge it with PEFT and load the merged model."
# Initialisations that edit the base: the saved factors are then relative to weights that nobody published.
_EDITS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_SILENT = frozenset({"init_lora_weights", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
                     "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"})  # fmt: skip


def _check(file: pathlib.Path, config: Config) -> None:
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_EDITS_BASE):
        raise PeftFormatError(
            f"{file}: init_lora_weights = {init!r} edits the base, and these factors are relative to the edited one. Save the adapter "
            "again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


def _read(items: Sequence[Item], config: Config) -> tuple[Entry, Arrays]:
    site = items[0].site
    if any("trainable_tokens_delta" in item.tensors for item in items):
        (item,) = items
        item.check("trainable_tokens_delta")
        rows = config["trainable_token_indices"]
        if isinstance(rows, dict):
            rows = next((of for name, of in rows.items() if item.module.endswith(name)), None)
        if rows is None:
            raise item.refuse("has trained rows, but trainable_token_indices does not say which.")
        return assemble_rows(item, rows)
    elements: dict[int, Element] = {}
    for item in items:
        elements |= _elements(site, item, config)
    return assemble_lora(site, elements, config["use_rslora"], config["lora_dropout"])


def _elements(site: Site, item: Item, config: Config) -> dict[int, Element]:
    parts = [name.removesuffix(".weight") for name in factor_names(site)]
    dora = config["use_dora"] and item.unit.parameter is None
    item.check(*parts, *(["lora_magnitude_vector"] if dora else []))
    rank = pattern_value(config["rank_pattern"], item.module, config["r"])
    alpha = pattern_value(config["alpha_pattern"], item.module, config["lora_alpha"])
    what = f" at rank {rank}"
    if item.unit.parameter is None:
        shapes = factor_shapes(site, rank)
        a, b = (item.take(part, shape, what) for part, shape in zip(parts, shapes, strict=True))
        magnitude = None
        if dora:
            magnitude = item.take("lora_magnitude_vector", vector_shape(site, site.n_out)).reshape(-1)
        return {item.unit.elements[0]: Element(*factors_from_torch(site, a, b), alpha, magnitude)}
    experts, flipped = len(item.unit.elements), item.unit.parameter.flipped
    sizes = (site.n_out, site.n_in) if flipped else (site.n_in, site.n_out)
    # Which side is the input's is PEFT's guess, and it has changed; the shapes tell.
    if item.tensors[parts[0]].shape == (experts * rank, sizes[1]) and sizes[0] != sizes[1]:
        flipped, sizes = not flipped, sizes[::-1]
    a = item.take(parts[0], (experts * rank, sizes[0]), what)
    b = item.take(parts[1], (sizes[1], experts * rank), what)
    pairs = zip(*experts_from_torch(a, b, experts, flipped), strict=True)
    return {element: Element(*pair, alpha) for element, pair in zip(item.unit.elements, pairs, strict=True)}


_ROWS = fields.Field(
    None,
    lambda value: value is None or fields.indices(value) or (isinstance(value, dict) and all(map(fields.indices, value.values()))),
    "a list of different rows, or such lists by module",
)  # fmt: skip
LORA = Codec(
    "LORA",
    parts={
        "lora_A": rf"lora_A{NAME}\.weight",
        "lora_B": rf"lora_B{NAME}\.weight",
        "lora_embedding_A": rf"lora_embedding_A{NAME}",
        "lora_embedding_B": rf"lora_embedding_B{NAME}",
        "lora_magnitude_vector": rf"lora_magnitude_vector(?:{NAME}\.weight|{NAME})",
        "trainable_tokens_delta": rf"token_adapter\.trainable_tokens_delta{NAME}",
    },
    fields={
        "r": fields.count(8),
        "lora_alpha": fields.number(8),
        "lora_dropout": fields.probability(),
        "rank_pattern": fields.RANKS,
        "alpha_pattern": fields.ALPHAS,
        "use_rslora": fields.FLAG,
        "use_dora": fields.FLAG,
        "target_parameters": fields.NAMES,
        "trainable_token_indices": _ROWS,
    },
    refused={
        "use_qalora": f"QALoRA pools the input: {_MERGE}",
        "lora_bias": f"the update has a bias: {_MERGE}",
        "layer_replication": f"the model has other layers than its base: {_MERGE}",
        "alora_invocation_tokens": "the adapter is active on part of the sequence only, which has no equal here.",
        "use_bdlora": f"the factors are block-diagonal: {_MERGE}",
        "arrow_config": "the adapter routes between others, which has no equal here.",
        "kasa_config": f"the base is truncated: {_MERGE}",
        "monteclora_config": f"the factors are random variables: {_MERGE}",
    },
    silent=_SILENT,
    holds=holds,
    native=True,
    check=_check,
    read=_read,
    write=write,
)
