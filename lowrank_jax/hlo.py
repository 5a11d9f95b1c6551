"""What a compiled program does, read from its text: the compiler's own estimate of cycles, and the bytes of its collectives."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|called_computations?|branch_computations|(?:true|false)_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
# The forms a group of devices is written in: {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=2,'b'=2] {'a'}.
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] \{([^}]*)\})")
# Of the array that is put together or taken apart, what each of n devices in a ring sends.
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}  # fmt: skip


class Program(NamedTuple):
    """One call of a compiled program on one device, with every turn of its loops.

    Attributes:
      cycles: of computation, as the TPU compiler estimates them; 0 from other compilers, which do not.
      sent: bytes that the device sends in collectives, on rings.
    """

    cycles: float
    sent: float


def read(text: str) -> Program:
    """Adds up an optimised HLO module: ``jax.jit(f).lower(x).compile().as_text()``.

    A loop's body counts as often as its condition's constant says, as in a scan; of a conditional all branches count.

    Example:
      >>> import jax
      >>> read(jax.jit(lambda x: x + 1).lower(1.0).compile().as_text())
      Program(cycles=0.0, sent=0.0)
    """
    bodies, entry = _computations(text)

    @functools.cache
    def cycles(name: str) -> float:
        total = 0.0
        for _, op, rest in _instructions(bodies, name):
            if op == "while" and (loop := _LOOP.search(rest)):
                total += _turns(bodies, loop[1]) * cycles(loop[2])
            elif op in ("call", "conditional"):
                total += sum(map(cycles, _called(rest)))
            elif found := _CYCLES.search(rest):
                total += float(found[1])
        return total

    @functools.cache
    def sent(name: str) -> dict[tuple[str, ...], float]:
        # By identity: where a collective is spread over several fusions, so as to run beside them, each holds a copy.
        out: dict[tuple[str, ...], float] = {}
        for kind, op, rest in _instructions(bodies, name):
            if op == "while" and (loop := _LOOP.search(rest)):
                out[(loop[2],)] = _turns(bodies, loop[1]) * sum(sent(loop[2]).values())
            elif op.removesuffix("-start") in _SENT:
                channel = _CHANNEL.search(rest)
                out[(op, kind, channel[1] if channel else rest)] = _bytes(kind, op, rest)
            else:
                for called in _called(rest):
                    out |= sent(called)
        return out

    return Program(cycles(entry), sum(sent(entry).values(), 0.0))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _instructions(bodies: dict[str, list[str]], name: str) -> Iterator[tuple[str, str, str]]:
    """Result type, operation, and the rest of the line, of every instruction of a computation."""
    for line in bodies.get(name, ()):
        if found := _INSTRUCTION.match(line):
            yield found[1], found[2], found[3]


def _called(rest: str) -> list[str]:
    return [name.strip().lstrip("%") for group in _CALLED.findall(rest) for name in group.strip("{}").split(",")]


def _turns(bodies: dict[str, list[str]], condition: str) -> int:
    constants = [int(found[1]) for line in bodies.get(condition, ()) if (found := _CONSTANT.search(line))]
    return max(constants, default=1)


def _bytes(kind: str, op: str, rest: str) -> float:
    """What one device sends for a collective, from its result's type: a tuple holds several arrays, of a -start both ends of one."""
    sizes = [
        math.prod(map(int, filter(None, shape.split(",")))) * _width(dtype) for dtype, shape in _SHAPE.findall(kind)
    ]
    n = _group(rest)
    size = max(sizes) if op.endswith("-start") else sum(sizes) * (n if op == "reduce-scatter" else 1)
    return size * _SENT[op.removesuffix("-start")](n)


def _group(rest: str) -> int:
    found = _GROUPS.search(rest)
    if found is None:
        return 2  # a permutation
    if found[1]:
        return found[1].count(",") + 1
    if found[2]:
        return int(found[2])
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[3]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[4]))


def _width(dtype: str) -> float:
    """Bytes of one element."""
    return 1.0 if dtype == "pred" else int(re.sub(r"^[a-z]+(\d+).*$", r"\1", dtype)) / 8
