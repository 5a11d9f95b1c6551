"""ADALORA: directions of which some were dropped; the configuration says which, weight by weight."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from lowrank_jax.forms import UnsupportedError
from lowrank_jax.methods.adalora import adalora
from lowrank_jax.peft import fields
from lowrank_jax.peft.codecs.base import NAME, Arrays, Codec, Config, Item, Piece, Written
from lowrank_jax.peft.codecs.lora import LORA
from lowrank_jax.peft.fields import PeftFormatError, alpha_for, commonest
from lowrank_jax.peft.targets import write_targets
from lowrank_jax.peft.tensors import factor_shapes, factors_from_torch, factors_to_torch, is_matrix_or_image
from lowrank_jax.peft.units import flat, stack
from lowrank_jax.plan import Entry

_NOT_MODULE = re.compile(r"^base_model\.model\.|\.lora_E(\.[^.]+)?$")


def _check(file: pathlib.Path, config: Config) -> None:
    if not config["lora_alpha"] > 0:
        raise PeftFormatError(f"{file}: lora_alpha = {config['lora_alpha']!r}; expected a positive number.")
    for name, mask in config["rank_pattern"].items():
        if len(mask) != config["init_r"]:
            raise PeftFormatError(
                f"{file}: rank_pattern of {name!r} has {len(mask)} entries; expected init_r = {config['init_r']}."
            )


def _read(items: Sequence[Item], config: Config) -> tuple[Entry, Arrays]:
    site, rank = items[0].site, config["init_r"]
    if site.kind not in ("dense", "conv"):
        raise items[0].refuse("is neither a matrix nor a convolution, which is all that PEFT adapts in this way.")
    if rank > site.max_rank:
        raise items[0].refuse(f"has no room for {rank} directions; load it on the model it was trained on.")
    masks = {_NOT_MODULE.sub("", name): mask for name, mask in config["rank_pattern"].items()}
    found = {}
    for item in items:
        item.check("lora_A", "lora_B", "lora_E")
        kept = np.array(masks.get(item.module, [True] * rank))
        r, what = int(kept.sum()), f" with {int(kept.sum())} of {rank} directions left"
        a = item.take("lora_A", (r, site.n_in), what)
        b = item.take("lora_B", (site.n_out, r), what)
        e = item.take("lora_E", (r, 1), what)
        a, b = factors_from_torch(site, *(x.reshape(s) for x, s in zip((a, b), factor_shapes(site, r), strict=True)))
        # Directions that are gone keep their place, scaled by zero, as they do while training goes on.
        leaves = {
            "a": np.zeros((site.n_in, rank), a.dtype),
            "e": np.zeros(rank, e.dtype),
            "b": np.zeros((rank, site.n_out), b.dtype),
        }
        leaves["a"][:, kept], leaves["e"][kept], leaves["b"][kept] = a, e[:, 0], b
        found[item.unit.elements[0]] = leaves
    layers, leaves = stack(site, found)
    method = adalora(
        rank=rank, target=min(config["target_r"], rank), alpha=config["lora_alpha"], dropout=config["lora_dropout"]
    )
    return Entry(site, method, layers), leaves


def _write(pieces: Sequence[Piece], known: Collection[str] | None) -> Written:
    configs = [dict(piece.entry.method.config) for piece in pieces]
    rank = max(config["rank"] for config in configs)
    # PEFT divides by r + 1e-5, which is left out here and there: it is below the rounding of a merge.
    scales = [(config["rank"] if config["alpha"] is None else config["alpha"]) / config["rank"] for config in configs]
    scale = commonest(scales)
    modules: dict[str, Arrays] = {}
    masks: dict[str, list[bool]] = {}
    for piece, own in zip(pieces, scales, strict=True):
        entry, site = piece.entry, piece.entry.site
        if not is_matrix_or_image(site):
            raise UnsupportedError(
                f"{site.path}: PEFT's AdaLoRA has matrices and convolutions over 2 axes only; save it as LORA."
            )
        a, e, b = (flat(piece.leaves[name], entry) for name in ("a", "e", "b"))
        for name, n in piece.modules():
            kept = e[n] != 0
            if not kept.any():  # untrained, which is no reason to drop anything
                kept[:] = True
            if not kept.all() or len(kept) < rank:
                masks[f"{name}.lora_E"] = [*kept.tolist(), *[False] * (rank - len(kept))]
            one_a, one_b = factors_to_torch(site, a[n][:, kept], b[n][kept])
            modules[name] = {
                "lora_A": one_a.reshape(len(one_a), -1),
                "lora_B": one_b.reshape(site.n_out, -1),
                "lora_E": (e[n][kept] * np.asarray(own / scale, e.dtype))[:, None],
            }
    config: dict[str, Any] = {
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "init_r": rank,
        "lora_alpha": alpha_for(scale, rank),
        "lora_dropout": commonest([config["dropout"] for config in configs]),
        "rank_pattern": masks or None,
        "target_modules": write_targets(list(modules), known),
        "target_r": configs[0]["target"],
        "total_step": 1,  # PEFT wants one, but reads it in training only
    }
    return Written(modules, config)


ADALORA = Codec(
    "ADALORA",
    parts={name: rf"{name}{NAME}" for name in ("lora_A", "lora_B", "lora_E")},
    fields={
        "init_r": fields.count(12),
        "target_r": fields.count(8),
        "lora_alpha": fields.number(8),
        "lora_dropout": fields.probability(),
        "rank_pattern": fields.by_module(
            lambda mask: isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask),
            "lists of true and false",
        ),
    },
    refused={
        **LORA.refused,
        "use_dora": "PEFT's AdaLoRA has none.",
        "trainable_token_indices": "save the adapter as LORA with PEFT.",
        "target_parameters": "PEFT's AdaLoRA adapts modules only.",
    },  # fmt: skip
    silent=LORA.silent
    | {
        "r",
        "alpha_pattern",
        "use_rslora",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
    },
    holds=lambda entry: entry.method.name == "adalora",
    check=_check,
    read=_read,
    write=_write,
)
