"""Damage for files, and what a reader may do with them: raise its own errors, in bounded memory, within its directory."""

from __future__ import annotations

import contextlib
import copy
import json
import pathlib
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

# Numbers that code forgets: limits of the types that files hold, and just beside them.
NUMBERS = (
    0,
    1,
    2,
    7,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 8,
    2**64 - 1,
)

JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**300, 1.5, -0.0, float("inf"), float("nan"), "", "x", "../x", "/x", "a/../../x", "\ud800",
    "ä", "(", "(.*", "a{99999999999}", "x)(y", "\n", "all-linear", [], [1], ["x"], ["("], [None], [[]], [-1, 2**70], {}, {"x": 1}, {"(": 1},
)  # fmt: skip

ALLOWED = 3_000_000  # bytes beside what a file's own size explains
_opened: list[pathlib.Path] | None = None


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Up to three wounds: cut short, bytes or numbers overwritten, a piece taken out, doubled or put in."""
    place = st.integers(0, len(whole))
    number = st.sampled_from(NUMBERS).map(lambda n: n.to_bytes(8, "little"))
    wound = st.one_of(
        st.tuples(st.just("cut"), place, st.just(b"")),
        st.tuples(st.just("over"), place, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("over"), place, number | number.map(lambda b: b[:4])),
        st.tuples(st.just("out"), place, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("in"), place, st.binary(min_size=1, max_size=8) | number),
        st.tuples(st.just("twice"), place, st.binary(min_size=1, max_size=40)),
    )
    return st.lists(wound, min_size=1, max_size=3).map(lambda wounds: _wounded(whole, wounds))


def damaged_json(value: Any) -> st.SearchStrategy[str]:
    """JSON in which one to three values, at any depth, are replaced by junk or taken out, or their names are."""
    places = list(_places(value))
    change = st.tuples(st.sampled_from(places), st.sampled_from(("put", "out", "name")), st.sampled_from(JUNK))
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: json.dumps(_changed(value, changes)))


@contextlib.contextmanager
def watched(folder: pathlib.Path, size: int) -> Iterator[None]:
    """Fails if the block takes much more memory than ``size``, the bytes of its files, or opens a file outside of a directory."""
    global _opened
    _opened = []
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        opened, _opened = _opened, None
    assert peak < ALLOWED + 100 * size, f"{peak:,} bytes for a file of {size:,}"
    # Python may import, and quote its own sources in warnings.
    outside = [file for file in opened if not file.is_relative_to(folder) and file.suffix not in (".py", ".pyc", ".so")]
    assert not outside, f"opened {outside}"


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes):
        path = arguments[0]
        _opened.append(pathlib.Path(path if isinstance(path, str) else path.decode("utf-8", "replace")).resolve())


sys.addaudithook(_note)  # cannot be taken away again; it does nothing outside of `watched`


def _wounded(whole: bytes, wounds: list[tuple[str, int, bytes]]) -> bytes:
    for kind, at, piece in wounds:
        n = len(piece)
        whole = {
            "cut": whole[:at],
            "over": whole[:at] + piece + whole[at + n :],
            "out": whole[:at] + whole[at + n :],
            "in": whole[:at] + piece + whole[at:],
            "twice": whole[: at + n] + whole[at:],
        }[kind]
    return whole


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from _places(inner, (*at, key))


def _changed(value: Any, changes: list[tuple[tuple[Any, ...], str, Any]]) -> Any:
    value = copy.deepcopy(value)
    for (*way, key), how, junk in changes:
        holder = value
        for step in way:
            holder = holder[step] if _has(holder, step) else None
        if not _has(holder, key):  # an earlier change took it away
            continue
        if how == "put":
            holder[key] = copy.deepcopy(junk)
        else:
            kept = holder.pop(key)
            if how == "name" and isinstance(holder, dict):
                holder[str(junk)] = kept
    return value


def _has(holder: Any, key: Any) -> bool:
    return (isinstance(holder, dict) and key in holder) or (
        isinstance(holder, list) and type(key) is int and key < len(holder)
    )
