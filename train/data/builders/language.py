"""Language modelling: GSM8K, E2E, instruction files, and running text."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from train.data.builders.source import DataError, Files, Published, Record, Source, named_files, per_split, text

PIECE_CHARACTERS = 16_384
HELD_OUT = 0.05  # of a single text file, for validation and for test each


def _gsm8k(path: pathlib.Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
            prompt, completion = _fields(path, number, value, "question", "answer")
            yield {"prompt": prompt, "completion": completion}


def _gsm8k_record(example: Mapping[str, Any]) -> Record:
    return {"prompt": text(example["question"]), "completion": text(example["answer"])}


def _instructions(path: pathlib.Path) -> Iterator[Record]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}).") from error
    if not isinstance(values, list):
        raise DataError(f"{path}: a JSON {type(values).__name__}; expected a list of objects.")
    for number, value in enumerate(values, 1):
        prompt, completion = _fields(path, number, value, "instruction", "output")
        yield {
            "prompt": "\n".join(filter(None, (prompt, str(value.get("input", ""))))),
            "completion": completion,
        }


def _fields(path: pathlib.Path, number: int, value: object, *names: str) -> list[str]:
    for name in names:
        if not isinstance(value, dict) or not isinstance(value.get(name), str):
            raise DataError(f"{path}, example {number}: no text {name!r}; expected {' and '.join(names)}.")
    assert isinstance(value, dict)
    return [value[name] for name in names]


def _e2e(path: pathlib.Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            meaning, mark, reference = line.partition("||")
            if not mark or not reference.strip():
                raise DataError(f"{path}, line {number}: {line[:60]!r}; expected 'meaning representation||text'.")
            yield {"prompt": meaning.strip(), "completion": reference.strip()}


# The cleaned edition names the attributes in another way than the files that papers on adapters use.
_ATTRIBUTES = {"eatType": "Type", "familyFriendly": "family friendly", "priceRange": "price"}


def _e2e_record(example: Mapping[str, Any]) -> Record:
    table = example["input_text"]["table"]
    pairs = zip(map(text, table["column_header"]), map(text, table["content"]), strict=True)
    meaning = " | ".join(f"{_ATTRIBUTES.get(name, name)} : {value}" for name, value in pairs)
    return {"prompt": meaning, "completion": text(example["target_text"])}


def _text_files(root: pathlib.Path) -> Files:
    if root.is_file():
        return {"all": [root]}
    if not root.is_dir():
        raise DataError(f"{root}: no such file or directory.")
    named = {split: [root / f"{split}.txt"] for split in ("train", "validation", "test")}
    found = {split: paths for split, paths in named.items() if paths[0].is_file()}
    texts = sorted(root.rglob("*.txt"))
    if not found and not texts:
        raise DataError(f"{root}: no .txt file there.")
    return found or {"train": texts}


def _text(files: Files) -> Mapping[str, Callable[[], Iterator[Record]]]:
    if "all" not in files:
        return per_split(lambda path: _pieces(_lines(path)))(files)  # type: ignore[return-value]
    (path,) = files["all"]
    lines = list(_lines(path))
    held = max(1, int(len(lines) * HELD_OUT))
    parts = {"train": lines[: -2 * held], "validation": lines[-2 * held : -held], "test": lines[-held:]}
    return {split: lambda part=part: _pieces(iter(part)) for split, part in parts.items()}  # type: ignore[misc]


def _lines(path: pathlib.Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}). Convert it first.") from error


def _pieces(lines: Iterator[str]) -> Iterator[Record]:
    """Cuts a document at line breaks, so that a record stays small whatever the file's size."""
    piece = ""
    for line in lines:
        if piece and len(piece) + len(line) > PIECE_CHARACTERS:
            yield {"text": piece, "last": False}
            piece = ""
        piece += line
    if piece:
        yield {"text": piece, "last": True}


def _articles(root: pathlib.Path) -> Files:
    """Every twentieth article is for validation, the one before it for testing."""
    splits: Files = {"train": [], "validation": [], "test": []}
    for number, path in enumerate(sorted(root.rglob("*.txt"))):
        splits[{0: "validation", 19: "test"}.get(number % 20, "train")].append(path)
    return splits


def _article(path: pathlib.Path) -> Iterator[Record]:
    return _pieces(iter(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)))


SOURCES: dict[str, Source] = {
    "gsm8k": Source(
        "causal_lm",
        "prompted",
        (),
        named_files(train="train.jsonl", test="test.jsonl"),
        per_split(_gsm8k),
        "train.jsonl and test.jsonl with question and answer",
        None,
        "grade-school mathematics",
        Published(
            "tensorflow_datasets.text.gsm8k.gsm8k",
            "gsm8k",
            {"train": "train", "test": "test"},
            _gsm8k_record,
            "https://raw.githubusercontent.com",
        ),
    ),
    "e2e": Source(
        "causal_lm",
        "prompted",
        (),
        named_files(train="train.txt", validation="valid.txt", test="test.txt"),
        per_split(_e2e),
        "train.txt, valid.txt or test.txt, lines of 'meaning representation||text'",
        None,
        "restaurant descriptions from data (E2E NLG; by name the cleaned edition, arXiv:1911.03905)",
        Published(
            "tensorflow_datasets.datasets.e2e_cleaned.e2e_cleaned_dataset_builder",
            "e2e_cleaned",
            {split: split for split in ("train", "validation", "test")},
            _e2e_record,
            "https://github.com",
        ),
    ),
    "instructions": Source(
        "causal_lm",
        "prompted",
        (),
        named_files(train="train.json", test="test.json"),
        per_split(_instructions),
        "train.json or test.json, lists of instruction, input, output",
        None,
        "instructions with answers",
    ),
    "text": Source(
        "causal_lm",
        "running",
        (),
        _text_files,
        _text,
        "a .txt file (its last tenth is held out), train.txt and validation.txt, or any .txt files",
        None,
        "running text",
    ),
    "bbc_text": Source(
        "causal_lm", "running", (), _articles, per_split(_article), "", "bbc", "2,225 BBC News articles as running text"
    ),
}
