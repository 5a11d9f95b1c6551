"""What the benches share: where results go, and what machine and versions made them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine and the versions a figure was made with."""
    import jax

    device = jax.devices()[0]
    return {
        "device": f"{device.platform}:{device.device_kind}",
        "cores": os.cpu_count(),
        "cpu": _cpu_name(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def write_json(name: str, payload: Mapping[str, Any]) -> pathlib.Path:
    """Writes ``bench/results/<name>.json`` with the machine beside the figures, by way of a temporary name."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps({"machine": machine(), **payload}, indent=1) + "\n")
    partial.rename(path)
    return path


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the calls taking turns, so that whatever slows the machine slows them all.

    Each call is run once first, to compile; results are waited for.
    """
    import jax

    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Prints a table."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(*columns, title=title)
    for row in rows:
        shown.add_row(*(str(cell) for cell in row))
    Console(width=150).print(shown)
