"""RANDLORA: two small matrices a module, and random bases of which each module takes a corner."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np

from lowrank_jax.forms import UnsupportedError
from lowrank_jax.methods.randlora import randlora
from lowrank_jax.models.tensors import LazyTensor
from lowrank_jax.peft import fields
from lowrank_jax.peft.codecs.base import NAME, Arrays, Codec, Config, Item, Piece, Written
from lowrank_jax.peft.codecs.projections import SILENT, check_matrix, one_method, stored
from lowrank_jax.peft.targets import write_targets
from lowrank_jax.peft.units import flat, stack
from lowrank_jax.plan import Entry


def _read(items: Sequence[Item], config: Config) -> tuple[Entry, Arrays]:
    site, rank = items[0].site, config["r"]
    if rank > site.max_rank:
        raise items[0].refuse(
            f"is too small for bases of rank {rank}; merge the adapter with PEFT and load the merged model."
        )
    n, found = -(-site.max_rank // rank), {}
    for item in items:
        check_matrix(item)
        item.check("randlora_lambda", "randlora_gamma")
        lam, gam = item.take("randlora_lambda", (rank, n)), item.take("randlora_gamma", (n, site.max_rank))
        found[item.unit.elements[0]] = {"lam": lam.T, "gam": gam}
    layers, leaves = stack(site, found)
    entries: Literal["uniform", "sparse", "very_sparse"] = "sparse" if config["sparse"] else "uniform"
    if config["very_sparse"]:
        entries = "very_sparse"
    dropout = config["randlora_dropout"]
    method = randlora(rank=rank, alpha=config["randlora_alpha"], dropout=dropout, entries=entries, store=True)
    return Entry(site, method, layers), leaves


def _read_common(config: Config, tensors: Mapping[str, LazyTensor], entries: Sequence[Entry]) -> Arrays:
    sites, rank = [entry.site for entry in entries], config["r"]
    m, d = max(site.max_rank for site in sites), max(max(site.n_in, site.n_out) for site in sites)
    a = stored(tensors, "randlora_A", (rank, 1, m))
    return {"a": a[:, 0], "b": stored(tensors, "randlora_B", (d, -(-m // rank), rank))}


def _write(pieces: Sequence[Piece], known: Collection[str] | None) -> Written:
    method = one_method(pieces)
    if not method["store"]:
        raise UnsupportedError(
            "randlora makes its bases of a seed, in another order than PEFT's; train with randlora(store=True), or save it as LORA."
        )
    modules: dict[str, Arrays] = {}
    for piece in pieces:
        lam, gam = (flat(piece.leaves[name], piece.entry) for name in ("lam", "gam"))
        for name, n in piece.modules():
            modules[name] = {"randlora_gamma": gam[n], "randlora_lambda": lam[n].T}
    rank = method["rank"]
    a, b = (np.asarray(pieces[0].shared[name]) for name in ("a", "b"))
    # PEFT makes them for the widest input and the widest output, whichever modules these are of. Nobody takes what is more.
    m = min(max(piece.entry.site.n_in for piece in pieces), max(piece.entry.site.n_out for piece in pieces))
    a = np.pad(a, ((0, 0), (0, m - a.shape[1])))[:, None]
    b = np.pad(b, ((0, 0), (0, -(-m // rank) - b.shape[1]), (0, 0)))
    config = {
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
        "projection_prng_key": 0,
        "r": rank,
        "randlora_alpha": 20 * rank if method["alpha"] is None else method["alpha"],
        "randlora_dropout": method["dropout"],
        "save_projection": True,
        "sparse": method["entries"] == "sparse",
        "target_modules": write_targets(list(modules), known),
        "very_sparse": method["entries"] == "very_sparse",
    }
    return Written(modules, config, {"randlora_A": a, "randlora_B": b})


RANDLORA = Codec(
    "RANDLORA",
    parts={name: rf"{name}{NAME}" for name in ("randlora_gamma", "randlora_lambda")},
    common=frozenset({"randlora_A", "randlora_B"}),
    fields={
        "r": fields.count(32),
        "randlora_alpha": fields.number(640),
        "randlora_dropout": fields.probability(),
        "sparse": fields.FLAG,
        "very_sparse": fields.FLAG,
    },
    silent=SILENT,
    holds=lambda entry: entry.method.name == "randlora",
    read=_read,
    read_common=_read_common,
    write=_write,
)
