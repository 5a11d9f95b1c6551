"""One call from the name of a data set to batches."""

from __future__ import annotations

import os

import numpy as np

from lowrank_jax.models.tokenizer import Tokenizer
from train.data import batching, encode
from train.data.builders.prepare import Prepared, prepare
from train.data.builders.source import DataError, Task
from train.data.loader import Loader
from train.data.tokens import TokenTable, token_table


def load(
    name: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    max_length: int,
    task: Task | None = None,
    seed: int = 0,
    share: np.ndarray | None = None,
    directory: os.PathLike[str] | str | None = None,
    pack: bool = False,
    chat: bool = False,
    limit: int | None = None,
) -> Loader:
    """Returns the loader of a split, preparing and tokenizing it at the first call.

    Texts for classification are cut to `max_length` tokens; examples for language modelling that are longer
    are dropped, and their number is logged and stands in `loader.table.dropped`.

    Args:
        name: see `train.data.builders.prepare.SOURCES`, such as 'tweets', 'glue/sst2', 'e2e', 'text'.
        split: 'train', 'validation' or 'test'.
        tokenizer: of the model.
        batch_size: rows in a global batch.
        max_length: tokens in the widest row, special ones included.
        task: 'classification' or 'causal_lm'; None takes the data set's. A data set serves one task.
        seed: of the shuffling and the packing.
        share: the rows of every global batch that this process reads, int [rows], such as `train.sharding.share`; None reads all.
        directory: where the files lie, for data sets that no asset provides; None lets tensorflow-datasets fetch
            those it knows.
        pack: put several examples into a row (language modelling), all rows of width `max_length`.
        chat: use the tokenizer's chat template (prompts with completions).
        limit: use the first so many examples only.
    Raises:
        ValueError: settings that do not fit together or the data, see the message; DataError is a subclass.
        lowrank_jax.assets.AssetError: the data cannot be fetched.

    Example:
        >>> loader = load("tweets", "train", tokenizer, batch_size=32, max_length=64)  # doctest: +SKIP
        >>> next(loader.iterator())["tokens"].shape  # doctest: +SKIP
        (32, 24)
    """
    _check(batch_size, max_length, share, limit)
    data = prepare(name, split, directory)
    source = data.source
    if task is not None and task != source.task:
        raise DataError(f"{name} is for {source.task}, not {task}.")
    if pack and source.kind != "prompted" or chat and source.kind != "prompted":
        raise DataError(f"pack and chat are for prompts with completions; {name} has none.")
    records = data.records if limit is None else _First(data.records, min(limit, len(data.records)))
    key = [data.fingerprint, split, name, tokenizer.fingerprint, limit]
    table = _table(data, records, tokenizer, key, max_length, chat)
    lengths = np.diff(table.offsets)
    if not len(lengths):
        raise DataError(f"the split {split!r} of {name} has no examples.")
    rows = batching.packed_rows(lengths, max_length, seed) if pack else batching.single_rows(lengths)
    num_labels = {"labelled": len(data.labels), "scored": 1}.get(source.kind, 0)
    return Loader(
        table=table,
        rows=rows,
        task=source.task,
        label_names=data.labels,
        num_labels=num_labels,
        batch_size=batch_size,
        max_length=max_length,
        pad_id=tokenizer.pad_id,
        seed=seed,
        fixed_width=pack or source.kind == "running",
        share=share,
    )


class _First:
    """The first records of a source."""

    def __init__(self, records: object, count: int):
        self._records, self._count = records, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> object:
        return self._records[index]  # type: ignore[index]


def _table(data: Prepared, records: object, tokenizer: Tokenizer, key: list, max_length: int, chat: bool) -> TokenTable:
    kind = data.source.kind
    if kind == "prompted":
        return token_table(records, encode.prompted(tokenizer, chat), [*key, chat], drop_above=max_length)  # type: ignore[arg-type]
    if kind == "running":
        return _in_blocks(token_table(records, encode.running(tokenizer), key), max_length)  # type: ignore[arg-type]
    encoder = encode.classification(tokenizer, max_length, len(data.labels) if kind == "labelled" else None)
    return token_table(records, encoder, [*key, max_length])  # type: ignore[arg-type]


def _in_blocks(table: TokenTable, length: int) -> TokenTable:
    """Cuts running text into examples of `length` tokens wherever they fall; the last may be shorter."""
    total = len(table.ids)
    offsets = np.append(np.arange(0, total, length, dtype=np.int64), total)
    return table._replace(offsets=offsets, labels=np.zeros(len(offsets) - 1, np.float32))


def _check(batch_size: int, max_length: int, share: np.ndarray | None, limit: int | None) -> None:
    if batch_size < 1 or max_length < 2 or (limit is not None and limit < 1):
        raise ValueError(
            f"batch_size={batch_size}, max_length={max_length}, limit={limit}; expected at least 1, 2 and 1."
        )
    if share is not None and not (len(share) and share.min() >= 0 and share.max() < batch_size):
        raise ValueError(
            f"share={share}: expected rows of a batch, at least one of 0 to batch_size - 1 = {batch_size - 1}."
        )
