"""Planning and making an adapter over 2,400 weights.

    python -m bench.plan_init

`--peft` also measures PEFT adding a LoRA to as many torch layers (needs the parity extra).
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

import lowrank_jax as lr
import lowrank_jax.adapters as lr_adapters
from bench.common import table, write_json

SITES = 2400


def ours() -> tuple[float, float]:
    """Seconds to plan, and to make the adapter, compilation included."""
    params = {f"layers_{n}": {"proj": {"kernel": jnp.zeros((64, 64))}} for n in range(SITES)}
    start = time.perf_counter()
    plan = lr.plan(params, {r".*/proj": lr.lora(rank=8)})
    planned = time.perf_counter()
    jax.block_until_ready(lr.init(jax.random.key(0), params, plan))
    return planned - start, time.perf_counter() - planned


def peft() -> float:
    """Seconds of PEFT for as many torch layers."""
    import torch
    from peft import LoraConfig, get_peft_model

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                [torch.nn.ModuleDict({"proj": torch.nn.Linear(64, 64)}) for _ in range(SITES)]
            )

    net = Net()
    start = time.perf_counter()
    get_peft_model(net, LoraConfig(r=8, target_modules=["proj"]))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft", action="store_true")
    options = parser.parse_args()
    jax.block_until_ready(jnp.zeros(1))
    plans, inits = [], []
    for _ in range(3):
        lr_adapters._maker.cache_clear()
        jax.clear_caches()
        a, b = ours()
        plans.append(a)
        inits.append(b)
    result = {"sites": SITES, "plan_seconds": statistics.median(plans), "init_seconds": statistics.median(inits)}
    if options.peft:
        result["peft_seconds"] = statistics.median(peft() for _ in range(3))
    table(
        ("what", "seconds"), [(k, f"{v:.2f}") for k, v in result.items() if k != "sites"], f"LoRA over {SITES} weights"
    )
    write_json("plan_init", result)


if __name__ == "__main__":
    main()
