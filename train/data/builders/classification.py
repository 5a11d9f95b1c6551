"""Text classification: tweets, BBC News and BANKING77."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping

from train.data.builders.source import (
    DataError,
    Files,
    Record,
    Source,
    named_files,
    per_split,
    rows,
    split_by_hash,
)

TWEET_SIZES = {"validation": 2_000, "test": 4_000, "train": -1}
BBC_SIZES = {"validation": 200, "test": 400, "train": -1}


def _tweets(files: Files) -> Mapping[str, Callable[[], list[Record]]]:
    (path,) = files["all"]
    records = (
        {"text": text, "text_pair": "", "label": label}
        for label, text in rows(path, ("sentiment", "text"), encoding="latin-1")
    )
    return _lists(split_by_hash(records, TWEET_SIZES))


def _bbc_files(root: pathlib.Path) -> Files:
    files = sorted(root.glob("*/*.txt"))
    if not files:
        raise DataError(f"{root}: no articles there.")
    return {"all": files}


def _bbc(files: Files) -> Mapping[str, Callable[[], list[Record]]]:
    # One article is not UTF-8; a replacement character costs less than losing it.
    records = (
        {
            "text": path.read_text(encoding="utf-8", errors="replace"),
            "text_pair": "",
            "label": path.parent.name,
        }
        for path in files["all"]
    )
    return _lists(split_by_hash(records, BBC_SIZES))


def _lists(splits: Mapping[str, list[Record]]) -> Mapping[str, Callable[[], list[Record]]]:
    return {split: lambda part=part: part for split, part in splits.items()}  # type: ignore[misc]


def _banking(path: pathlib.Path) -> Iterator[Record]:
    for text, label in rows(path, ("text", "category")):
        yield {"text": text, "text_pair": "", "label": label}


def _one_file(root: pathlib.Path) -> Files:
    return {"all": [root]}


SOURCES: dict[str, Source] = {
    "tweets": Source(
        "classification",
        "labelled",
        ("negative", "neutral", "positive"),
        _one_file,
        _tweets,
        "",
        "tweets",
        "sentiment of tweets, three classes; split by hash of the text",
    ),
    "bbc": Source(
        "classification",
        "labelled",
        ("business", "entertainment", "politics", "sports", "tech"),
        _bbc_files,
        _bbc,
        "",
        "bbc",
        "topic of BBC News articles, five classes; split by hash of the text",
    ),
    "banking77": Source(
        "classification",
        "labelled",
        None,
        named_files(train="train.csv", test="test.csv"),
        per_split(_banking),
        "train.csv and test.csv with the columns text and category",
        None,
        "intent of bank customers, 77 classes",
    ),
}
