"""A plan as a table that a person can read."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import jax.numpy as jnp

from lowrank_jax.text_table import as_text

if TYPE_CHECKING:
    from lowrank_jax.plan import Entry, Plan


def render(plan: Plan) -> str:
    """The plan as text: one row for each group of sites that differ only by a number in their path, totals at the foot."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    groups: dict[tuple, list[Entry]] = {}
    rows: list[tuple[str, ...]] = []
    for entry in plan.entries:
        key = (
            re.sub(r"\d+", "*", entry.site.path),
            entry.site.shape,
            entry.method,
            entry.layers,
            entry.route,
            entry.site.spec,
        )
        groups.setdefault(key, []).append(entry)
    totals = [0, 0, 0]
    for members in groups.values():
        first = members[0]
        trained, frozen, size = (sum(values) for values in zip(*map(_sizes, members), strict=True))
        totals = [totals[0] + trained, totals[1] + frozen, totals[2] + size]
        path = _span([m.site.path for m in members])
        layers = "" if first.layers is None else f" layers {_ranges(first.layers)}"
        rows.append((
            path + layers + (f"  x{len(members)}" if len(members) > 1 else ""), first.site.kind, "x".join(map(str, first.site.shape)),
            _method(first), first.method.form.__name__, first.route, f"{trained:,}", f"{frozen:,}", human_bytes(size),
            "" if first.site.spec is None else str(tuple(first.site.spec)),
        ))  # fmt: skip
    for name, leaves in plan.shared_leaves.items():
        size = sum(math.prod(leaf.shape) for leaf in leaves.values())
        trained = sum(math.prod(leaf.shape) for leaf in leaves.values() if plan.is_learned(leaf))
        totals = [totals[0] + trained, totals[1] + size - trained, totals[2] + 4 * size]
        rows.append(
            ("(shared)", "", "", name, "", "", f"{trained:,}", f"{size - trained:,}", human_bytes(4 * size), "")
        )
    share = f" ({100 * totals[0] / plan.base_count:.2f}% of {plan.base_count:,})" if plan.base_count else ""
    later = plan.count(10**6 - 1, 10**6)
    foot = f"{len(plan.entries)} sites" + (f"; at the end {later:,} trained" if later != totals[0] else "")
    columns = [("site", foot), ("kind", ""), ("shape", ""), ("method", ""), ("form", ""), ("route", ""),
               ("trainable", f"{totals[0]:,}{share}"), ("frozen", f"{totals[1]:,}"), ("bytes", human_bytes(totals[2])),
               ("sharding", "")]  # fmt: skip
    show = len(columns) - (not any(row[-1] for row in rows))
    for name, footer in columns[:show]:
        right = name in ("trainable", "frozen", "bytes")
        table.add_column(name, footer, justify="right" if right else "left", overflow="fold", no_wrap=name != "site")
    for row in rows:
        table.add_row(*row[:show])
    return as_text(table, 200)


def _sizes(entry: Entry) -> tuple[int, int, int]:
    layers = math.prod(entry.local.batch_shape)
    trained = frozen = size = 0
    for leaf in entry.leaves.values():
        n = layers * math.prod(leaf.shape)
        size += n * jnp.dtype(leaf.dtype or jnp.float32).itemsize
        if leaf.trains is not None and leaf.trains[0] == 0 and not leaf.state:
            used = n if leaf.count is None else leaf.count
            trained, frozen = trained + used, frozen + n - used
        else:
            frozen += n
    return trained, frozen, size


def _method(entry: Entry) -> str:
    fields = dict(entry.method.config)
    rank = fields.get("rank")
    if isinstance(rank, tuple):
        rank = f"{min(rank)}..{max(rank)}"
    return entry.method.name + (f" r={rank}" if rank is not None else "")


def _span(paths: list[str]) -> str:
    """Paths that differ by one number, written once: ``layers_{0-5}/query/kernel``."""
    numbers = [re.findall(r"\d+", path) for path in paths]
    pieces = re.split(r"\d+", paths[0])
    out = pieces[0]
    for column, piece in zip(zip(*numbers, strict=True), pieces[1:], strict=True):
        values = sorted({int(v) for v in column})
        out += (column[0] if len(values) == 1 else "{" + _ranges(values) + "}") + piece
    return out


def _ranges(values: tuple[int, ...] | list[int]) -> str:
    """``[0, 1, 2, 5] -> '0-2,5'``."""
    out: list[list[int]] = []
    for v in sorted(values):
        if out and v == out[-1][1] + 1:
            out[-1][1] = v
        else:
            out.append([v, v])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def human_bytes(n: float) -> str:
    """A size in bytes for people: ``1536 -> '1.5 KiB'``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError
