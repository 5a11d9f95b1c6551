"""A split as tokens: made once, kept in the cache as flat arrays, and mapped instead of loaded."""

from __future__ import annotations

import hashlib
import json
import logging
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank_jax import assets
from lowrank_jax.files import storing
from train.data.builders.source import DataError

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_AT_ONCE = 512  # texts handed to the tokenizer together
_TRIES = 3
_PAUSE = 1.0  # seconds before the second try, doubled before the next
_DTYPES = {"ids": np.int32, "marks": np.int8, "offsets": np.int64, "labels": np.float32}


class Example(NamedTuple):
    """One example as tokens.

    Attributes:
        ids: int32 [n].
        marks: int8 [n]; classification: 1 in the second text of a pair; language modelling: 1 where the model
            learns.
        label: the class number or score; 0 in language modelling.
    """

    ids: np.ndarray
    marks: np.ndarray
    label: float


class TokenTable(NamedTuple):
    """All examples of a split, one after the other.

    Attributes:
        ids: int32 [tokens].
        marks: int8 [tokens].
        offsets: int64 [examples + 1]; example i is ids[offsets[i]:offsets[i + 1]].
        labels: float32 [examples].
        dropped: examples left out because they were too long.
        fingerprint: changes with anything that changes the table.
    """

    ids: np.ndarray
    marks: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    dropped: int
    fingerprint: str


Encode = Callable[[Sequence[Any]], list[Example]]


def token_table(
    records: Sequence[Any], encode: Encode, key: Sequence[Any], drop_above: int | None = None
) -> TokenTable:
    """Returns the tokens of all records, from the cache if they are there.

    Args:
        records: random access to records.
        encode: a list of records -> their examples, in order.
        key: whatever decides the outcome; it names the cache entry. JSON-able.
        drop_above: leave out longer examples; None keeps all.
    Raises:
        DataError: every example is longer than `drop_above`, or records cannot be read.
        StorageError: the disk of the cache is full or failing.
    """
    name = hashlib.sha256(json.dumps([_FORMAT, drop_above, *key]).encode()).hexdigest()[:20]
    folder = assets.cache_dir() / "tokens" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
        try:
            with storing(folder, assets.IN_CACHE):
                _write(work, records, encode, drop_above)
            assets.publish(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    meta = json.loads((folder / "meta.json").read_text())
    ids, marks, offsets, labels = (_map(folder, field) for field in _DTYPES)
    return TokenTable(ids, marks, offsets, labels, meta["dropped"], name)


def _write(folder: pathlib.Path, records: Sequence[Any], encode: Encode, drop_above: int | None) -> None:
    offset = dropped = longest = 0
    streams = {field: (folder / field).open("wb") for field in _DTYPES}
    try:
        streams["offsets"].write(np.zeros(1, np.int64).tobytes())
        for batch in _batches(records):
            for example in encode(batch):
                longest = max(longest, len(example.ids))
                if drop_above is not None and len(example.ids) > drop_above:
                    dropped += 1
                    continue
                offset += len(example.ids)
                values = (example.ids, example.marks, np.int64(offset), np.float32(example.label))
                for (field, dtype), value in zip(_DTYPES.items(), values, strict=True):
                    streams[field].write(np.asarray(value, dtype).tobytes())
    finally:
        for stream in streams.values():
            stream.close()
    if dropped:
        if dropped == len(records):
            raise DataError(
                f"all {dropped:,} examples are longer than max_length={drop_above}; the longest "
                f"has {longest:,} tokens. Raise max_length."
            )
        _LOG.warning("%d of %d examples are longer than %d tokens and were dropped", dropped, len(records), drop_above)
    (folder / "meta.json").write_text(json.dumps({"dropped": dropped}))


def _batches(records: Sequence[Any]) -> Iterator[Sequence[Any]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizing", total=len(records))
        for start in range(0, len(records), _AT_ONCE):
            indices = list(range(start, min(start + _AT_ONCE, len(records))))
            yield _read(records, indices)
            bar.advance(task, len(indices))


def _read(records: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    many = getattr(records, "__getitems__", None)  # array_record reads a list of records in one call
    attempt = 0
    while True:
        try:
            return many(indices) if many is not None else [records[i] for i in indices]
        except OSError as error:  # a disk over a network fails for a moment now and then
            attempt += 1
            what = f"examples {indices[0]} to {indices[-1]} could not be read ({error}), attempt {attempt} of {_TRIES}"
            if attempt == _TRIES:
                raise DataError(f"{what}. Look after the disk that they are on, and start again.") from error
            _LOG.warning("%s", what)
            time.sleep(_PAUSE * 2 ** (attempt - 1))


def _map(folder: pathlib.Path, field: str) -> np.ndarray:
    file = folder / field
    if not file.stat().st_size:
        return np.zeros(0, _DTYPES[field])
    return np.memmap(file, _DTYPES[field], "r")
