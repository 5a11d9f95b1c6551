"""Data sets of tensorflow-datasets by name: its builders' examples as our records, and what is said without a network."""

from __future__ import annotations

import pathlib
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from train.data import DataError
from train.data.builders import published
from train.data.builders.prepare import SOURCES, prepare

NAMES = [name for name, source in SOURCES.items() if source.published is not None]
E2E = {
    "input_text": {
        "table": [
            {"column_header": "name", "row_number": 1, "content": "Blue Spice"},
            {"column_header": "eatType", "row_number": 1, "content": "coffee shop"},
        ]
    },
    "target_text": "Blue Spice is a coffee shop.",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces what a data set's own builder reads from the network; its features and its files stay the real ones."""

    def replace(name: str, **splits: list[Mapping[str, Any]]) -> None:
        where = SOURCES[name].published
        assert where is not None
        kind = type(published.make_builder(where))
        monkeypatch.setattr(
            kind, "_split_generators", lambda self, manager: {s: iter(enumerate(rows)) for s, rows in splits.items()}
        )
        monkeypatch.setattr(published, "_reach", lambda host: None)

    return replace


def _glue(count: int, **texts: str) -> list[Mapping[str, Any]]:
    return [{**{name: f"{text} {i} " for name, text in texts.items()}, "label": i % 2, "idx": i} for i in range(count)]


def test_classification(examples: Callable[..., None]) -> None:
    examples("glue/sst2", train=_glue(5, sentence="great"), validation=_glue(2, sentence="dull"))
    data = prepare("glue/sst2", "validation")
    assert data.labels == ("negative", "positive")
    assert [dict(data.records[i], label=int(data.records[i]["label"])) for i in range(len(data.records))] == [
        {"text": "dull 0", "text_pair": "", "label": 0},
        {"text": "dull 1", "text_pair": "", "label": 1},
    ]
    assert data.records.__getitems__([1, 0])[0]["text"] == "dull 1"  # type: ignore[attr-defined]
    # What is prepared is not asked for again.
    examples("glue/sst2", train=[])
    assert len(prepare("glue/sst2", "train").records) == 5


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("glue/qnli", "question", "sentence"),
        ("glue/qqp", "question1", "question2"),
        ("glue/mrpc", "sentence1", "sentence2"),
    ],
)
def test_pairs(examples: Callable[..., None], name: str, first: str, second: str) -> None:
    examples(name, train=_glue(1, **{first: "a", second: "b"}))
    record = prepare(name, "train").records[0]
    assert (record["text"], record["text_pair"]) == ("a 0", "b 0")


def test_mnli_is_evaluated_on_matched_genres(examples: Callable[..., None]) -> None:
    rows = {"validation_matched": "yes", "validation_mismatched": "no"}
    examples("glue/mnli", **{split: _glue(1, premise=text, hypothesis="h") for split, text in rows.items()})
    data = prepare("glue/mnli", "validation")
    assert data.labels == ("entailment", "neutral", "contradiction") and data.records[0]["text"] == "yes 0"


def test_scores(examples: Callable[..., None]) -> None:
    examples("glue/stsb", train=[{"sentence1": "a", "sentence2": "b", "label": 3.75, "idx": 0}])
    data = prepare("glue/stsb", "train")
    assert data.labels == () and data.records[0]["label"] == np.float32(3.75)


def test_prompts(examples: Callable[..., None]) -> None:
    gsm8k = {"question": "1 + 1?", "answer": "It is 2.\n#### 2", "annotation": "It is 2.\n", "short_answer": "2"}
    examples("gsm8k", train=[gsm8k])
    assert prepare("gsm8k", "train").records[0] == {"prompt": "1 + 1?", "completion": "It is 2.\n#### 2"}
    examples("e2e", train=[E2E])
    assert prepare("e2e", "train").records[0] == {
        "prompt": "name : Blue Spice | Type : coffee shop",
        "completion": "Blue Spice is a coffee shop.",
    }


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_those_of_the_builder(name: str) -> None:
    source = SOURCES[name]
    assert source.published is not None
    builder = published.make_builder(source.published)
    label = builder.info.features["label"] if source.labels else None
    assert tuple(getattr(label, "names", ())) == source.labels


def test_other_labels_are_refused(examples: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    examples("glue/sst2", train=_glue(1, sentence="x"))
    monkeypatch.setitem(SOURCES, "glue/sst2", SOURCES["glue/sst2"]._replace(labels=("positive", "negative")))
    with pytest.raises(DataError, match="numbers its labels negative, positive; expected positive, negative"):
        prepare("glue/sst2", "train")


def test_a_split_it_lacks() -> None:
    with pytest.raises(DataError, match="glue/sst2 has no split 'test'; it has train, validation"):
        prepare("glue/sst2", "test")


@pytest.mark.parametrize(
    ("name", "files"), [("glue/sst2", "train.tsv and dev.tsv"), ("gsm8k", "train.jsonl"), ("e2e", "valid.txt")]
)
def test_no_network(name: str, files: str, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(DataError, match=rf"{name}: .*Name or service not known.*--config.data.directory.*{files}"):
        prepare(name, "train")
    assert not [file for file in cache.rglob("*") if file.is_file() and "tfds" not in file.parts]


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise tfds.download.DownloadError("HTTP code: 404.")

    monkeypatch.setattr(published, "_reach", lambda host: None)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(DataError, match="could not get gsm8k.*404.*Or pass directory="):
        prepare("gsm8k", "train")


def test_a_host_that_answers_with_an_error_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.HTTPError("https://host", 403, "Forbidden", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    published._reach("https://host")
