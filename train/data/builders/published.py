"""Data sets that tensorflow-datasets has under a name of its own: fetched once over the network, read without TensorFlow."""

from __future__ import annotations

import contextlib
import importlib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from lowrank_jax import assets
from train.data.builders.source import DataError, Published, Record

_TIMEOUT = 15.0  # seconds
PREFIX = "tfds:"
_HOST = "https://storage.googleapis.com"  # asked first whether there is a network


class View(Sequence[Record]):
    """Random access to the examples of a source as records of ours."""

    def __init__(self, examples: Any, record: Callable[[Mapping[str, Any]], Record]):
        self._examples, self._record = examples, record

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return self._record(self._examples[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """Several records in one read."""
        return [self._record(example) for example in self._examples.__getitems__(indices)]


def fetch(published: Published, split: str, labels: tuple[str, ...]) -> tuple[View, str]:
    """Returns a split's records and a fingerprint, downloading and preparing the data set at the first call.

    tensorflow-datasets checks every file against the checksum it has on record, so name and version say what was read.

    Args:
        split: a key of `published.splits`.
        labels: the names that the label numbers are to mean; () if there are none.
    Raises:
        DataError: no network, or data that is not what it was.
    """
    builder = make_builder(published)
    names = tuple(getattr(builder.info.features["label"], "names", ())) if labels else ()
    if names != labels:
        raise DataError(f"tensorflow-datasets numbers its labels {', '.join(names)}; expected {', '.join(labels)}.")
    with quiet():
        prepared = builder.is_prepared()
    if not prepared:
        _download(published, builder)
    examples = builder.as_data_source(split=published.splits[split])
    return View(examples, published.record), builder.info.full_name


def running_text(name: str, split: str) -> tuple[View, str]:
    """Texts of any data set of tensorflow-datasets as running text, downloading and preparing it at the first call.

    Args:
        name: of a builder, with its configuration where it has several ('wiki40b/en'). split: of the builder.
    Returns:
        records with `text` and `last`, and a fingerprint.
    Raises:
        DataError: no such builder, no texts in it, no such split, or it could not be fetched.
    """
    importlib.import_module("tensorflow_datasets.text")  # its builders are known by name only once this is imported
    try:
        with quiet():
            builder = tfds.builder(name, data_dir=str(assets.cache_dir() / "tfds"), file_format="array_record")
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise DataError(f"tensorflow-datasets has no builder {name!r} ({str(error).splitlines()[0]}).") from error
    features = builder.info.features or {}
    texts = [field for field, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if not texts:
        raise DataError(f"{PREFIX}{name} has no text feature; it has {', '.join(features) or 'no features'}.")
    field = "text" if "text" in texts else texts[0]
    if not builder.is_prepared():
        _download(Published("", name, {}, dict, _HOST if builder.url_infos else ""), builder)
    if split not in builder.info.splits:
        raise DataError(f"{PREFIX}{name} has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}.")
    examples = builder.as_data_source(split=split)
    return View(examples, lambda example: {"text": example[field], "last": True}), f"{builder.info.full_name}:{field}"


def make_builder(published: Published) -> tfds.core.DatasetBuilder:
    """The builder, with its files in the cache of this project."""
    importlib.import_module(published.module)
    with quiet():
        return tfds.builder(published.name, data_dir=str(assets.cache_dir() / "tfds"), file_format="array_record")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what tensorflow-datasets logs about configurations and directories to itself."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


def _download(published: Published, builder: tfds.core.DatasetBuilder) -> None:
    try:
        if published.host:
            _reach(published.host)
        builder.download_and_prepare()
    except (OSError, tfds.download.DownloadError, NonMatchingChecksumError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise DataError(
            f"tensorflow-datasets could not get {published.name} from {published.host} ({reason})."
        ) from error


def _reach(host: str) -> None:
    """Asks for an answer, of any status, before the downloader begins: without a network it retries for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(host, method="HEAD"), timeout=_TIMEOUT).close()
    except urllib.error.HTTPError as answer:
        answer.close()
