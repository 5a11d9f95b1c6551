"""Methods whose sites share a basis, random or trained: VeRA, NOLA, RandLoRA, S2-LoRA, MoS."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from conformance_row import Config, Leaves, Row, rank_of
from numpy_seeded import numpy_fold, numpy_uniform, numpy_words

import lowrank_jax as lr
from lowrank_jax.methods.base import Method


def _vera_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    n_in, n_out = kernel.shape[-2:]
    rank = p["d"].shape[-1]
    if "seed" in shared:
        a = numpy_uniform(numpy_fold(shared["seed"], 0), (n_in, 1, rank))[:, 0] * (6 / n_in) ** 0.5
        b = numpy_uniform(numpy_fold(shared["seed"], 1), (rank, n_out)) * (6 / rank) ** 0.5
    else:
        a, b = shared["a"][:n_in], shared["b"][:, :n_out]
    return np.einsum("ir,...r,ro,...o->...io", a, p["d"], b, p["c"])


def _vera_count(site: lr.Site, config: Config) -> int:
    return config["rank"] + site.n_out


def _nola_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    n_in, n_out, rank, k = *kernel.shape[-2:], 3, p["u"].shape[-1]

    def one(u: np.ndarray, v: np.ndarray, seed: np.ndarray) -> np.ndarray:
        a0 = numpy_uniform(numpy_fold(seed, 0), (n_in, rank)) / n_in**0.5
        bases = [
            numpy_uniform(numpy_fold(seed, n), (k, *s)) / k**0.5 for n, s in ((1, (n_in, rank)), (2, (rank, n_out)))
        ]
        return 2 * (a0 + np.tensordot(u, bases[0], 1)) @ np.tensordot(v, bases[1], 1)

    flat = [x.reshape(-1, x.shape[-1]) for x in (p["u"], p["v"], p["seed"])]
    return np.stack([one(*x) for x in zip(*flat, strict=True)]).reshape(kernel.shape)


def _randlora_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    n_in, n_out = kernel.shape[-2:]
    (n, rank), m, d = p["lam"].shape[-2:], min(n_in, n_out), max(n_in, n_out)
    if "seed" in shared:
        b = 3**0.5 * numpy_uniform(numpy_fold(shared["seed"], 0), (d, n, rank))
        a = 3**0.5 * numpy_uniform(numpy_fold(shared["seed"], 1), (rank, m))
    else:  # as PEFT pairs them: directions of a run over bases fastest, those of b over ranks
        b = shared["b"][:d, :n].reshape(d, rank, n).swapaxes(1, 2)
        a = shared["a"][:, :m]
    update = 0.25 * np.einsum("djk,...jk,km,...jm->...dm", b, p["lam"], a, p["gam"])
    return update.swapaxes(-1, -2) if n_in <= n_out else update


def _randlora_count(site: lr.Site, config: Config) -> int:
    bases = math.ceil(site.max_rank / config["rank"])
    return bases * (config["rank"] + site.max_rank)


def _randlora(**fields: Any) -> Method:
    return lr.randlora(rank=2, alpha=0.5, at_once=4, **fields)  # with a larger update rounding shows in the loss


def _s2_lora_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    size = "{}x{}".format(*kernel.shape[-2:])
    return 2 * np.einsum("ir,...r,ro->...io", shared[f"a_{size}"], p["e"], shared[f"b_{size}"])


def _s2_lora_shared(sites: list[lr.Site]) -> int:
    return sum(3 * (n_in + n_out) for n_in, n_out in {(s.n_in, s.n_out) for s in sites})


MOS = {"rank": 3, "budget": 2, "shards": 2, "private": 1}


def _mos_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    def factor(seed: np.ndarray, number: int, pool: np.ndarray, n: int) -> np.ndarray:
        order = [np.argsort(numpy_words(numpy_fold(numpy_fold(seed, number), i), (len(pool),))) for i in range(9)]
        return pool[np.concatenate(order)[:4]].reshape(2, -1)[:, :n]

    n_in, n_out = kernel.shape[-2:]
    common = [
        factor(seed, 0, shared[f"all.a{n_in}"], n_in).T @ factor(seed, 1, shared[f"all.b{n_out}"], n_out)
        for seed in p["seed"].reshape(-1, 2)
    ]
    return 2 * (np.stack(common).reshape(kernel.shape) + p["a"] @ p["b"])


def _mos_shared(sites: list[lr.Site]) -> int:
    return sum(math.prod(s.batch_shape) * 2 * (math.ceil(s.n_in / 2) + math.ceil(s.n_out / 2)) for s in sites)


ROWS = [
    Row("vera", lambda: lr.vera(rank=3), _vera_count, _vera_update, rank_of, any_rank=True),
    Row("vera_stored", lambda: lr.vera(rank=3, store=True), _vera_count, _vera_update, rank_of, any_rank=True),
    Row("nola", lambda: lr.nola(rank=3, bases=20, alpha=6), lambda s, c: 2 * c["bases"], _nola_update, rank_of),
    Row("randlora", _randlora, _randlora_count, _randlora_update, lambda c: 10**9),
    Row("randlora_stored", lambda: _randlora(store=True), _randlora_count, _randlora_update, lambda c: 10**9),
    Row("s2_lora", lambda: lr.s2_lora(rank=3, alpha=6), lambda s, c: c["rank"], _s2_lora_update, rank_of,
        count_shared=_s2_lora_shared),
    Row("mos", lambda: lr.mos(alpha=6, pools="size", **MOS), lambda s, c: s.n_in + s.n_out, _mos_update, rank_of,
        count_shared=_mos_shared),
]  # fmt: skip
