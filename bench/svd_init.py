"""Starting an adapter from a singular value decomposition: the randomised one against the exact one.

    python -m bench.svd_init                 # a 4096 x 11008 kernel and the real weights of MiniLM; some minutes on two cores

For each kernel: seconds of `lowrank_jax.linalg.svd` for its leading directions with either method, once compiled, and the energy the
randomised directions capture over what the exact ones do. The large kernel is made here, since none that size is at hand: orthonormal
directions with singular values that fall like ``1 / sqrt(1 + i / 32)``, flatter than any weight of MiniLM, plus Gaussian noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from bench.classify import base
from bench.common import table, write_json
from lowrank_jax import linalg
from lowrank_jax.sites import flatten, sites


def large(n_in: int, n_out: int) -> jax.Array:
    """A kernel with a known, slowly falling spectrum."""
    keys = jax.random.split(jax.random.key(0), 3)
    u = jnp.linalg.qr(jax.random.normal(keys[0], (n_in, 1024)))[0]
    v = jnp.linalg.qr(jax.random.normal(keys[1], (n_out, 1024)))[0]
    values = 10 / jnp.sqrt(1 + jnp.arange(1024) / 32)
    return (u * values) @ v.T + 0.01 * jax.random.normal(keys[2], (n_in, n_out))


def timed(call: Any, kernel: jax.Array, runs: int) -> tuple[Any, float]:
    """What a call gives, compiled beforehand, and the median of its seconds."""
    compiled = jax.jit(call).lower(kernel).compile()
    times, result = [], None
    for _ in range(runs):
        began = time.perf_counter()
        result = jax.block_until_ready(compiled(kernel))
        times.append(time.perf_counter() - began)
    return result, statistics.median(times)


def compare(name: str, kernel: jax.Array, rank: int) -> dict[str, Any]:
    """One row."""
    found, quick = timed(lambda w: linalg.svd(w, rank, key=jax.random.key(1)), kernel, 5)
    whole, exact = timed(lambda w: linalg.svd(w, rank, method="exact"), kernel, 1 if kernel.size > 1e7 else 3)
    energy = lambda u: float(jnp.sum(jnp.matmul(jnp.swapaxes(u, -1, -2), kernel, precision="highest") ** 2))  # noqa: E731
    return {
        "kernel": name, "rank": rank, "exact_seconds": exact, "randomized_seconds": quick,
        "energy": energy(found[0]) / energy(whole[0]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-in", type=int, default=4096)
    parser.add_argument("--n-out", type=int, default=11008)
    options = parser.parse_args()
    params = base()[1]
    rows = [
        compare(f"MiniLM {path}", site.canonical(flatten(params)[path]), 32)
        for path, site in sites(params).items()
        if site.kind == "dense" and site.batch and path.endswith(("query/kernel", "intermediate/kernel"))
    ]
    rows.append(compare(f"{options.n_in} x {options.n_out}", large(options.n_in, options.n_out), 32))
    shown = [
        (r["kernel"], r["rank"], f"{r['exact_seconds']:.2f}", f"{r['randomized_seconds']:.2f}",
         f"{r['exact_seconds'] / r['randomized_seconds']:.1f}x", f"{r['energy']:.4f}")
        for r in rows
    ]  # fmt: skip
    table(("kernel", "rank", "exact s", "randomized s", "faster", "energy over exact"), shown)
    write_json("svd_init", {"rows": rows})


if __name__ == "__main__":
    main()
