"""What a source of data is: where its files lie, and how they become records.

A record is a flat dictionary. Classification: `text`, `text_pair` ('' without one) and `label` (a name, or a
float for regression). Language modelling: `prompt` and `completion`, or, for running text, `text` and `last`
(the document ends here).
"""

from __future__ import annotations

import csv
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Record = dict[str, Any]
Task = Literal["classification", "causal_lm"]
Files = dict[str, list[pathlib.Path]]


class DataError(ValueError):
    """A data set that is missing, empty or malformed."""


class Published(NamedTuple):
    """A data set that tensorflow-datasets has under a name of its own.

    Attributes:
        module: defines its builder, which is known by name only once this is imported.
        name: of the builder, such as 'glue/sst2'.
        splits: our name of a split -> theirs.
        record: their example -> ours; a label stays the number it is.
        host: where its files come from; '' where nothing is downloaded.
    """

    module: str
    name: str
    splits: Mapping[str, str]
    record: Callable[[Mapping[str, Any]], Record]
    host: str


class Source(NamedTuple):
    """A data set this project can read.

    Attributes:
        task: what it is for.
        kind: the fields of a record: 'labelled', 'scored' (a float label), 'prompted' or 'running' (see
            above).
        labels: label names in the order of their numbers; () unless labelled; None to collect them from the
            files.
        files: folder (or file) -> split -> files; raises DataError if they are not as `layout` says.
        read: files -> split -> records.
        layout: the files a user has to provide, for error messages; '' if an asset provides them.
        asset: name in `lowrank_jax.assets`, or None.
        about: one line for people.
        published: where it comes from without a folder of the user's, or None.
    """

    task: Task
    kind: Literal["labelled", "scored", "prompted", "running"]
    labels: tuple[str, ...] | None
    files: Callable[[pathlib.Path], Files]
    read: Callable[[Files], Mapping[str, Callable[[], Iterable[Record]]]]
    layout: str
    asset: str | None
    about: str
    published: Published | None = None


def text(value: bytes | str) -> str:
    """A text feature of tensorflow-datasets without the white space around it."""
    return (value.decode("utf-8") if isinstance(value, bytes) else value).strip()


def named_files(**names: str) -> Callable[[pathlib.Path], Files]:
    """Returns a `files` function for one fixed file name per split; the first split has to exist.

    Example:
        >>> named_files(train="train.tsv")(pathlib.Path("/nowhere"))
        Traceback (most recent call last):
            ...
        train.data.builders.source.DataError: /nowhere: no such directory.
    """

    def files(root: pathlib.Path) -> Files:
        if not root.is_dir():
            raise DataError(f"{root}: no such directory.")
        found = {split: [root / name] for split, name in names.items() if (root / name).is_file()}
        if not found:
            raise DataError(f"{root}: none of {', '.join(names.values())} is there.")
        return found

    return files


def per_split(
    read: Callable[[pathlib.Path], Iterable[Record]],
) -> Callable[[Files], Mapping[str, Callable[[], Iterable[Record]]]]:
    """Returns a `read` function that reads every file of a split, one after the other."""

    def chain(paths: Sequence[pathlib.Path]) -> Iterator[Record]:
        for path in paths:
            yield from read(path)

    def reader(files: Files) -> Mapping[str, Callable[[], Iterable[Record]]]:
        return {split: lambda paths=paths: chain(paths) for split, paths in files.items()}  # type: ignore[misc]

    return reader


def rows(
    path: pathlib.Path,
    columns: Sequence[str],
    *,
    delimiter: str = ",",
    encoding: str = "utf-8-sig",
    header: Sequence[str] | None = None,
    skip_short: bool = False,
) -> Iterator[tuple[str, ...]]:
    """Yields the named columns of a CSV or (delimiter tab, no quoting) TSV file.

    Args:
        header: the names of all columns, for a file without a first line that names them.
        skip_short: leave out rows that lack columns instead of refusing the file.
    Raises:
        DataError: a missing column, a row that is too short, or bytes that are not text.
    """
    with path.open(encoding=encoding, newline="") as stream:
        reader = csv.reader(
            stream, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        )
        try:
            names = list(header) if header is not None else next(reader, [])
            missing = [c for c in columns if c not in names]
            if missing:
                raise DataError(f"{path}: no column {missing[0]!r}; the columns are {', '.join(names) or 'none'}.")
            places = [names.index(c) for c in columns]
            for row in reader:
                if not row or (skip_short and len(row) <= max(places)):
                    continue
                if len(row) <= max(places):
                    raise DataError(f"{path}, line {reader.line_num}: {len(row)} columns, expected {len(names)}.")
                yield tuple(row[place] for place in places)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}, near line {reader.line_num}: {error}. Expected text in {encoding}.") from error


def fingerprint(files: Files) -> str:
    """Returns sixteen hex digits that change with any byte or name of the files."""
    total = hashlib.sha256()
    for split, paths in sorted(files.items()):
        for path in paths:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{split}/{path.name}:{digest};".encode())
    return total.hexdigest()[:16]


def split_by_hash(records: Iterable[Record], sizes: Mapping[str, int]) -> dict[str, list[Record]]:
    """Removes repeated texts and splits by the hash of the text, so that no text is in two splits.

    Texts that differ only in case or white space count as repeated; the first is kept. The sizes are exact,
    and a record's place does not depend on the order of the file.

    Args:
        records: with `text`.
        sizes: split -> number of records; -1 for the rest.
    """
    by_hash: dict[bytes, Record] = {}
    for record in records:
        text = " ".join(record["text"].casefold().split())
        by_hash.setdefault(hashlib.sha256(text.encode()).digest(), record)
    ordered = [by_hash[key] for key in sorted(by_hash)]
    rest = len(ordered) - sum(size for size in sizes.values() if size >= 0)
    result, start = {}, 0
    for split, size in sizes.items():
        count = rest if size < 0 else size
        result[split] = ordered[start : start + count]
        start += count
    return result
