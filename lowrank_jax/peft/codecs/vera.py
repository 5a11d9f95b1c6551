"""VERA: two vectors a module, and two random matrices of which each module takes a corner."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_jax import seeded
from lowrank_jax.methods.vera import vera
from lowrank_jax.models.tensors import LazyTensor
from lowrank_jax.peft import fields
from lowrank_jax.peft.codecs.base import NAME, Arrays, Codec, Config, Item, Piece, Written
from lowrank_jax.peft.codecs.projections import SILENT, check_matrix, one_method, stored
from lowrank_jax.peft.targets import write_targets
from lowrank_jax.peft.units import flat, stack
from lowrank_jax.plan import Entry


def _read(items: Sequence[Item], config: Config) -> tuple[Entry, Arrays]:
    site, found = items[0].site, {}
    for item in items:
        check_matrix(item)
        item.check("vera_lambda_b", "vera_lambda_d")
        d, c = item.take("vera_lambda_d", (config["r"],)), item.take("vera_lambda_b", (site.n_out,))
        found[item.unit.elements[0]] = {"d": d, "c": c}
    layers, leaves = stack(site, found)
    method = vera(rank=config["r"], d_initial=config["d_initial"], dropout=config["vera_dropout"], store=True)
    return Entry(site, method, layers), leaves


def _read_common(config: Config, tensors: Mapping[str, LazyTensor], entries: Sequence[Entry]) -> Arrays:
    sites = [entry.site for entry in entries]
    a = stored(tensors, "vera_A", (config["r"], max(site.n_in for site in sites)))
    b = stored(tensors, "vera_B", (max(site.n_out for site in sites), config["r"]))
    return {"a": a.T, "b": b.T}


def _write(pieces: Sequence[Piece], known: Collection[str] | None) -> Written:
    method = one_method(pieces)
    shared, sites = pieces[0].shared, [piece.entry.site for piece in pieces]
    ratios = [1.0] * len(pieces)
    if method["store"]:
        a, b = (np.asarray(shared[name]) for name in ("a", "b"))
    else:  # the matrices of the widest weight; the others' are corners of them, drawn between wider bounds
        drawn: list[Any] = [piece.form().entries for piece in pieces]  # type: ignore[attr-defined]
        widest = min(drawn, key=lambda of: of.wide)
        n_in, n_out, rank = max(site.n_in for site in sites), max(site.n_out for site in sites), method["rank"]
        a = np.asarray(widest.draw("wide", seeded.fold(shared["seed"], 0), (n_in, 1, rank)))[:, 0]
        b = np.asarray(widest.draw("narrow", seeded.fold(shared["seed"], 1), (rank, n_out)))
        ratios = [of.wide / widest.wide for of in drawn]
    modules: dict[str, Arrays] = {}
    for piece, ratio in zip(pieces, ratios, strict=True):
        d, c = (flat(piece.leaves[name], piece.entry) for name in ("d", "c"))
        for name, n in piece.modules():
            modules[name] = {"vera_lambda_b": c[n], "vera_lambda_d": d[n] * np.asarray(ratio, d.dtype)}
    config = {
        "bias": "none",
        "d_initial": method["d_initial"],
        "fan_in_fan_out": False,
        "init_weights": True,
        "projection_prng_key": 0,
        "r": method["rank"],
        "save_projection": True,
        "target_modules": write_targets(list(modules), known),
        "vera_dropout": method["dropout"],
    }
    return Written(modules, config, {"vera_A": a.T, "vera_B": b.T})


VERA = Codec(
    "VERA",
    parts={name: rf"{name}{NAME}" for name in ("vera_lambda_b", "vera_lambda_d")},
    common=frozenset({"vera_A", "vera_B"}),
    fields={"r": fields.count(256), "d_initial": fields.number(0.1), "vera_dropout": fields.probability()},
    silent=SILENT,
    holds=lambda entry: entry.method.name == "vera",
    read=_read,
    read_common=_read_common,
    write=_write,
)
