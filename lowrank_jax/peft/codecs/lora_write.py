"""Writing LORA: every low-rank update as an exact LoRA."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax
import numpy as np

from lowrank_jax.convert.factors import absorbed
from lowrank_jax.forms import LowRank, Magnitude, UnsupportedError
from lowrank_jax.peft.codecs.base import Arrays, Piece, Written
from lowrank_jax.peft.codecs.trainable_tokens import rows_of
from lowrank_jax.peft.fields import alpha_for, commonest
from lowrank_jax.peft.parameters import nested
from lowrank_jax.peft.targets import write_patterns, write_targets
from lowrank_jax.peft.tensors import experts_to_torch, factor_names, factors_to_torch, vector_shape, within_rank
from lowrank_jax.peft.units import Unit, adapted
from lowrank_jax.plan import Entry
from lowrank_jax.sites import Site

_TOKENS = "token_adapter.trainable_tokens_delta"


def holds(entry: Entry) -> bool:
    """Whether an entry is a LoRA, a DoRA or trained rows."""
    record = entry.method.form.record
    return record.low_rank or entry.method.name in ("dora", "trainable_tokens")


def write(pieces: Sequence[Piece], known: Collection[str] | None) -> Written:
    """See `Codec`."""
    low_rank = [piece for piece in pieces if piece.entry.method.name != "trainable_tokens"]
    dora = _all_dora([piece.entry for piece in low_rank])
    modules: dict[str, Arrays] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dropouts = []
    parameters = nested(unit.parameter for piece in low_rank for unit in piece.units if unit.parameter is not None)
    for piece in low_rank:
        site, form = piece.entry.site, piece.form()
        part: LowRank = form.low if isinstance(form, Magnitude) else form.as_low_rank()  # type: ignore[attr-defined]
        low = jax.tree.map(lambda x, like=part.a: x.astype(like.dtype), absorbed(part))
        dropouts.append(low.dropout)
        for unit in piece.units:
            if not set(unit.elements) & adapted(piece.entry).keys():
                continue
            a, b = _factors(site, unit, low)
            ranks[unit.name], alphas[unit.name] = a.shape[-1], alpha_for(low.scale, a.shape[-1])
            tensors = modules[parameters.get(unit.name, unit.name)] = _tensors(site, unit, a, b)
            if isinstance(form, Magnitude):
                magnitude = np.asarray(form.magnitude).reshape(-1, site.n_out)[unit.elements[0]]
                tensors["lora_magnitude_vector"] = magnitude.reshape(vector_shape(site, site.n_out))
    trained_rows = {}
    for piece in pieces:
        if piece.entry.method.name == "trainable_tokens":
            name, rows = rows_of(piece)
            trained_rows[name] = list(dict(piece.entry.method.config)["token_indices"])
            modules[name] = {_TOKENS: rows}
    targets = [name for name in ranks if name not in parameters]
    rank, alpha = commonest(ranks.values()), commonest(alphas.values())
    config = {
        "alpha_pattern": write_patterns(alphas, alpha),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else commonest(dropouts),  # PEFT has none for parameters, and refuses it
        "r": rank,
        "rank_pattern": write_patterns(ranks, rank),
        "target_modules": write_targets(targets, known) if targets else [],
        "use_rslora": False,
    }
    if dora:
        config["use_dora"] = True
    if parameters:
        config["target_parameters"] = sorted(parameters)
    if trained_rows:
        config["trainable_token_indices"] = trained_rows
    return Written(modules, config)


def _all_dora(entries: Sequence[Entry]) -> bool:
    """Whether the adapter is a DoRA; an UnsupportedError where only some of it is, or where there is nothing but rows."""
    kinds = {entry.method.name == "dora": entry for entry in entries}
    if len(kinds) == 2:
        some, others = kinds[True], kinds[False]
        raise UnsupportedError(
            f"{some.site.path} is a {some.method.name} and {others.site.path} a {others.method.name}, but in PEFT all modules of an "
            "adapter are DoRAs or none is. Merge one of them (lowrank_jax.merge), or save two adapters."
        )
    if not kinds:
        raise UnsupportedError("Only rows of embeddings are trained, which is no LORA; leave peft_type out.")
    return True in kinds


def _factors(site: Site, unit: Unit, form: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """``a [elements, n_in, r]`` and ``b [elements, r, n_out]`` of a unit, padding cut off."""
    a, b = (np.asarray(x).reshape(-1, *x.shape[-2:])[list(unit.elements)] for x in (form.a, form.b))
    if site.batch:
        used = (a != 0).any((0, 1)) | (b != 0).any((0, 2))
        used[0] |= not used.any()  # no change at all is still written, at rank 1
        a, b = a[..., used], b[:, used]
    return within_rank(site, a, b)


def _tensors(site: Site, unit: Unit, a: np.ndarray, b: np.ndarray) -> Arrays:
    if unit.parameter is None:
        factors = factors_to_torch(site, a[0], b[0])
    else:
        factors = experts_to_torch(a, b, unit.parameter.flipped)
    return dict(zip(factor_names(site), factors, strict=True))
