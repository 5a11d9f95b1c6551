"""GLUE tasks, by name from tensorflow-datasets or from a local directory of their TSV files
("GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", arXiv:1804.07461).

The published test sets have no labels, so the splits are train and validation (dev.tsv). Labels are numbered
as in the published data set on the Hugging Face hub.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from train.data.builders.source import DataError, Published, Record, Source, named_files, per_split, rows, text


class _Task(NamedTuple):
    folder: str
    columns: tuple[str, ...]  # text, second text where there is one, label
    labels: dict[str, str]  # as written in the file -> name; {} for a score
    header: Sequence[str] | None
    about: str
    features: tuple[str, ...] = ("sentence1", "sentence2")  # the texts' names in tensorflow-datasets
    dev: str = ""  # the suffix of dev.tsv and of tensorflow-datasets' split
    skip_short: bool = False


_HOST = "https://dl.fbaipublicfiles.com"
_ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
_TASKS = {
    "cola": _Task(
        "CoLA",
        ("sentence", "label"),
        {"0": "unacceptable", "1": "acceptable"},
        ("source", "label", "mark", "sentence"),
        "is a sentence grammatical",
        ("sentence",),
    ),
    "mrpc": _Task(
        "MRPC",
        ("#1 String", "#2 String", "Quality"),
        {"0": "not_equivalent", "1": "equivalent"},
        None,
        "do two sentences say the same",
    ),
    "mnli": _Task(
        "MNLI",
        ("sentence1", "sentence2", "gold_label"),
        {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"},
        None,
        "does a premise entail or contradict a hypothesis; validation on matched genres",
        ("premise", "hypothesis"),
        "_matched",
    ),
    "qnli": _Task(
        "QNLI",
        ("question", "sentence", "label"),
        _ENTAILMENT,
        None,
        "does a sentence answer a question",
        ("question", "sentence"),
    ),
    # Some rows of the published file lack columns; every reader of the benchmark leaves them out.
    "qqp": _Task(
        "QQP",
        ("question1", "question2", "is_duplicate"),
        {"0": "not_duplicate", "1": "duplicate"},
        None,
        "do two questions ask the same",
        ("question1", "question2"),
        skip_short=True,
    ),
    "rte": _Task("RTE", ("sentence1", "sentence2", "label"), _ENTAILMENT, None, "does one text entail the other"),
    "sst2": _Task(
        "SST-2", ("sentence", "label"), {"0": "negative", "1": "positive"}, None, "sentiment of phrases", ("sentence",)
    ),
    "stsb": _Task("STS-B", ("sentence1", "sentence2", "score"), {}, None, "similarity of sentences, 0 to 5"),
    "wnli": _Task(
        "WNLI",
        ("sentence1", "sentence2", "label"),
        {"0": "not_entailment", "1": "entailment"},
        None,
        "what does a pronoun refer to",
    ),
}


def _source(name: str, task: _Task) -> Source:
    def read(path: pathlib.Path) -> Iterator[Record]:
        table = rows(path, task.columns, delimiter="\t", header=task.header, skip_short=task.skip_short)
        for number, (*texts, label) in enumerate(table, 1):
            yield {
                "text": texts[0].strip(),
                "text_pair": texts[1].strip() if len(texts) > 1 else "",
                "label": _label(path, number, task, label),
            }

    def record(example: Mapping[str, Any]) -> Record:
        texts = [text(example[feature]) for feature in task.features]
        return {"text": texts[0], "text_pair": texts[1] if len(texts) > 1 else "", "label": example["label"]}

    layout = f"train.tsv and dev{task.dev}.tsv of {task.folder}, with the columns {', '.join(task.columns)}"
    files = named_files(train="train.tsv", validation=f"dev{task.dev}.tsv")
    splits = {"train": "train", "validation": f"validation{task.dev}"}
    published = Published("tensorflow_datasets.text.glue", f"glue/{name}", splits, record, _HOST)
    kind: Literal["labelled", "scored"] = "labelled" if task.labels else "scored"
    labels = tuple(task.labels.values())
    return Source(
        "classification", kind, labels, files, per_split(read), layout, None, f"GLUE: {task.about}", published
    )


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


SOURCES: dict[str, Source] = {f"glue/{name}": _source(name, task) for name, task in _TASKS.items()}
