"""GLUE tasks from a local directory of their TSV files ("GLUE: A Multi-Task Benchmark and Analysis Platform
for Natural Language Understanding", arXiv:1804.07461).

The published test sets have no labels, so the splits are train and validation (dev.tsv). Labels are numbered
as in the published data set on the Hugging Face hub.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from train.data.builders.source import DataError, Record, Source, named_files, per_split, rows


class _Task(NamedTuple):
    folder: str
    columns: tuple[str, ...]  # text, second text where there is one, label
    labels: dict[str, str]  # as written in the file -> name; {} for a score
    header: Sequence[str] | None
    about: str


_ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
_TASKS = {
    "cola": _Task(
        "CoLA",
        ("sentence", "label"),
        {"0": "unacceptable", "1": "acceptable"},
        ("source", "label", "mark", "sentence"),
        "is a sentence grammatical",
    ),
    "mrpc": _Task(
        "MRPC",
        ("#1 String", "#2 String", "Quality"),
        {"0": "not_equivalent", "1": "equivalent"},
        None,
        "do two sentences say the same",
    ),
    "rte": _Task("RTE", ("sentence1", "sentence2", "label"), _ENTAILMENT, None, "does one text entail the other"),
    "sst2": _Task("SST-2", ("sentence", "label"), {"0": "negative", "1": "positive"}, None, "sentiment of phrases"),
    "stsb": _Task("STS-B", ("sentence1", "sentence2", "score"), {}, None, "similarity of sentences, 0 to 5"),
    "wnli": _Task(
        "WNLI",
        ("sentence1", "sentence2", "label"),
        {"0": "not_entailment", "1": "entailment"},
        None,
        "what does a pronoun refer to",
    ),
}


def _source(task: _Task) -> Source:
    def read(path: pathlib.Path) -> Iterator[Record]:
        for number, (*texts, label) in enumerate(rows(path, task.columns, delimiter="\t", header=task.header), 1):
            yield {
                "text": texts[0].strip(),
                "text_pair": texts[1].strip() if len(texts) > 1 else "",
                "label": _label(path, number, task, label),
            }

    layout = f"train.tsv and dev.tsv of {task.folder}, with the columns {', '.join(task.columns)}"
    files = named_files(train="train.tsv", validation="dev.tsv")
    kind = "labelled" if task.labels else "scored"
    labels = tuple(task.labels.values())
    return Source("classification", kind, labels, files, per_split(read), layout, None, f"GLUE: {task.about}")  # type: ignore[arg-type]


def _label(path: pathlib.Path, number: int, task: _Task, label: str) -> str | float:
    if task.labels:
        if label not in task.labels:
            raise DataError(f"{path}, example {number}: label {label!r}; expected {' or '.join(task.labels)}.")
        return task.labels[label]
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{path}, example {number}: score {label!r}; expected a number.")
    return score


SOURCES: dict[str, Source] = {f"glue/{name}": _source(task) for name, task in _TASKS.items()}
