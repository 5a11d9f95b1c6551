"""Prepares a source with tensorflow-datasets as array_record files, readable at random, without TensorFlow.

The name of a prepared data set contains a fingerprint of the source files: changed files give a new data set, and
equal files are prepared once.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from lowrank_jax import assets
from lowrank_jax.files import storing
from train.data.builders import classification, glue, language, published
from train.data.builders.source import DataError, Files, Published, Record, Source, fingerprint

SOURCES: dict[str, Source] = classification.SOURCES | glue.SOURCES | language.SOURCES


class Prepared(NamedTuple):
    """A split that is ready to read.

    Attributes:
        source: its source.
        records: random access to the records; a label is a number.
        labels: label names in the order of their numbers; () unless labelled.
        fingerprint: changes with the source files and the way they are read.
    """

    source: Source
    records: Sequence[Record]
    labels: tuple[str, ...]
    fingerprint: str


@dataclasses.dataclass
class SourceConfig(tfds.core.BuilderConfig):
    """Says what to build: a name in SOURCES, its files, and its label names."""

    source: str = ""
    files: Files = dataclasses.field(default_factory=dict, repr=False)
    labels: tuple[str, ...] = dataclasses.field(default=(), repr=False)


class LowrankData(tfds.core.GeneratorBasedBuilder):
    """The one builder: what differs between data sets is in their `Source`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        config: Any = self.builder_config
        source = SOURCES[config.source]
        label = (
            tfds.features.ClassLabel(names=list(config.labels)) if config.labels else tfds.features.Scalar(np.float32)
        )
        text = tfds.features.Text()
        features = {
            "labelled": {"text": text, "text_pair": text, "label": label},
            "scored": {"text": text, "text_pair": text, "label": label},
            "prompted": {"prompt": text, "completion": text},
            "running": {"text": text, "last": tfds.features.Scalar(np.bool_)},
        }[source.kind]
        return tfds.core.DatasetInfo(
            builder=self,
            description=source.about,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config: Any = self.builder_config
        readers = SOURCES[config.source].read(config.files)
        return {split: self._generate_examples(split, read) for split, read in readers.items()}

    def _generate_examples(self, split: str, read: Any) -> Iterator[tuple[int, Record]]:
        empty = True
        for number, record in enumerate(read()):
            empty = False
            yield number, record
        if empty:
            raise DataError(f"the split {split!r} of {self.builder_config.source} is empty.")


def prepare(name: str, split: str, directory: os.PathLike[str] | str | None = None) -> Prepared:
    """Returns one split of a data set, preparing it at the first call.

    Args:
        name: a key of SOURCES, or 'tfds:' and the name of any builder of tensorflow-datasets that has texts, such as
            'tfds:tiny_shakespeare': its first text feature (or the one called 'text') is read as running text.
        split: 'train', 'validation' or 'test'; what there is depends on the source.
        directory: the folder (for 'text' also a file) with the source's files; None where an asset provides
            them, or to have tensorflow-datasets fetch them (GLUE, GSM8K, E2E).
    Raises:
        DataError: an unknown name or split, missing or malformed files, no network to fetch them over.
        lowrank_jax.assets.AssetError: the asset cannot be fetched.
        StorageError: the disk of the cache is full or failing.
    """
    if name.startswith(published.PREFIX):
        records, mark = published.running_text(name.removeprefix(published.PREFIX), split)
        return Prepared(SOURCES["text"], records, (), mark)
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, 1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"no data set is called {name!r}.{hint} There are {', '.join(SOURCES)}, and {published.PREFIX}NAME."
        )
    source = SOURCES[name]
    if directory is None and source.published is not None:
        return _published(name, source, source.published, split)
    files = _files(name, source, directory)
    labels = _collect_labels(source, files) if source.labels is None else source.labels
    mark = fingerprint(files)
    config = SourceConfig(
        name=f"{name.replace('/', '_')}-{mark}",
        description=source.about,
        source=name,
        files=files,
        labels=labels,
    )
    try:
        builder = _build(config)
    except OSError as error:
        if not isinstance(error, FileExistsError) and error.errno != errno.ENOTEMPTY:
            raise
        builder = _build(config)  # another process was first, with the same bytes: now they only need opening
    if split not in builder.info.splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}.")
    return Prepared(source, builder.as_data_source(split=split), labels, f"{mark}-{builder.version}")


def _build(config: SourceConfig) -> LowrankData:
    with published.quiet():  # tfds warns of every configuration that is made on the fly, as ours are
        builder = LowrankData(config=config, data_dir=str(assets.cache_dir() / "tfds"), file_format="array_record")
    with storing(builder.data_dir, assets.IN_CACHE):
        builder.download_and_prepare()
    return builder


def _published(name: str, source: Source, where: Published, split: str) -> Prepared:
    if split not in where.splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(sorted(where.splits))}.")
    try:
        records, mark = published.fetch(where, split, source.labels or ())
    except DataError as error:
        raise DataError(
            f"{name}: {error} Or pass directory= (on the command line --config.data.directory), a folder with {source.layout}."
        ) from error.__cause__
    return Prepared(source, records, source.labels or (), mark)


def _files(name: str, source: Source, directory: os.PathLike[str] | str | None) -> Files:
    if directory is None and source.asset is None:
        raise DataError(
            f"{name} is read from files of yours: pass directory= (--config.data.directory), with {source.layout}."
        )
    if directory is not None and source.asset is not None:
        raise DataError(f"{name} is fetched as an asset; leave out directory=.")
    root = assets.fetch(source.asset) if source.asset is not None else pathlib.Path(directory or ".").expanduser()
    try:
        return source.files(root)
    except DataError as error:
        raise DataError(f"{error} {name} expects {source.layout}.") from None


def _collect_labels(source: Source, files: Files) -> tuple[str, ...]:
    return tuple(sorted({record["label"] for read in source.read(files).values() for record in read()}))
