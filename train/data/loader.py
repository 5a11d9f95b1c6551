"""The loader: batches in a fixed order, resumable at any step, fed by grain's threads."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from train.data import batching, collate
from train.data.collate import Batch
from train.data.tokens import TokenTable

_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


@dataclasses.dataclass(frozen=True, eq=False)
class Loader:
    """Batches of one split.

    Every batch is formed globally and then dealt out: the batches do not depend on the number of processes, and all see the same
    width at the same step.

    Attributes:
        table: the tokens.
        rows: the examples in each row.
        task: 'classification' or 'causal_lm'.
        label_names: () for regression and language modelling.
        num_labels: outputs of a classification head: classes, 1 for a score, 0 in language modelling.
        batch_size: rows in a global batch.
        max_length: the widest row.
        pad_id: fills up rows.
        seed: of the shuffling.
        fixed_width: give every training batch the width `max_length`.
        share: the rows of a global batch that this process reads, int [rows]; None reads all.
    """

    table: TokenTable
    rows: batching.Rows
    task: str
    label_names: tuple[str, ...]
    num_labels: int
    batch_size: int
    max_length: int
    pad_id: int
    seed: int = 0
    fixed_width: bool = False
    share: np.ndarray | None = None

    @property
    def num_examples(self) -> int:
        """Examples in the split, all processes together."""
        return len(self.table.labels)

    @property
    def steps_per_epoch(self) -> int:
        """Training batches in an epoch, the same in every epoch."""
        return len(self.rows.lengths) // self.batch_size

    @property
    def times(self) -> float:
        """How many rows a global batch has for each that this process reads."""
        return 1.0 if self.share is None else self.batch_size / len(self.share)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with anything that changes the global batches; the number of processes does not."""
        parts = [
            self.table.fingerprint,
            self.task,
            self.batch_size,
            self.max_length,
            self.seed,
            self.fixed_width,
            len(self.rows.lengths),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def iterator(self, state: dict[str, Any] | None = None) -> TrainIterator:
        """Returns an endless iterator over training batches.

        Args:
            state: what `TrainIterator.state()` returned; the iterator goes on with the next batch. None
                begins.
        Raises:
            ValueError: the state belongs to other data or settings, or there are fewer rows than a batch has.
        """
        if not self.steps_per_epoch:
            raise ValueError(
                f"{len(self.rows.lengths)} rows do not fill a batch of {self.batch_size}. Lower batch_size."
            )
        if state is None:
            return TrainIterator(self, 0)
        if state.get("fingerprint") != self.fingerprint or not isinstance(state.get("step"), int):
            raise ValueError(
                "the iterator's state was saved with other data, tokenizer, batch_size, max_length, packing "
                "or seed. "
                "Restore these, or begin anew with state=None."
            )
        return TrainIterator(self, state["step"])

    def evaluation_batches(self) -> Iterator[Batch]:
        """Yields every row exactly once, all processes together.

        The keys are those of training and `valid`, bool [batch], false in rows that only fill up the last
        batch, and `index`, int32 [batch], the number of the row in the split (-1 in rows that fill up).
        """
        for chosen in batching.evaluation_batches(self.rows.lengths, self.batch_size):
            batch = self._collate(chosen)
            mine = self._mine(chosen)
            yield batch | {"valid": mine >= 0, "index": mine.astype(np.int32)}

    def training_batch(self, step: int) -> Batch:
        """Returns this process's rows of the batch of a step, counted from 0 over all epochs."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self._collate(self._epoch(epoch)[number], self.fixed_width)

    def padding_share(self, epoch: int = 0) -> float:
        """Returns the share of an epoch's tokens that is padding, 0 to 1."""
        lengths = self.rows.lengths[self._epoch(epoch)]
        widths = [self._width(row, self.fixed_width) for row in lengths]
        return 1.0 - float(lengths.sum()) / float(sum(widths) * self.batch_size)

    def _mine(self, chosen: np.ndarray) -> np.ndarray:
        return chosen if self.share is None else chosen[self.share]

    @functools.cached_property
    def _epoch(self) -> Any:
        # Two epochs, because threads prefetch across the boundary between them.
        @functools.lru_cache(maxsize=2)
        def batches(epoch: int) -> np.ndarray:
            return batching.epoch_batches(self.rows.lengths, self.batch_size, self.seed, epoch)

        return batches

    def _width(self, lengths: np.ndarray, fixed: bool) -> int:
        return self.max_length if fixed else batching.bucket(int(lengths.max()), self.max_length)

    def _collate(self, chosen: np.ndarray, fixed: bool = False) -> Batch:
        width = self._width(self.rows.lengths[chosen[chosen >= 0]], fixed)
        mine = self._mine(chosen)
        if self.task == "causal_lm":
            return collate.causal_lm(self.table, self.rows, mine, width, self.pad_id)
        label_dtype = np.int32 if self.label_names else np.float32
        return collate.classification(self.table, mine, width, self.pad_id, label_dtype)


class TrainIterator(Iterator[Batch]):
    """An endless iterator whose place is a small dictionary."""

    def __init__(self, loader: Loader, step: int):
        self._loader = loader
        self._step = step
        steps = grain.MapDataset.range(step, np.iinfo(np.int32).max)
        self._batches = iter(steps.map(lambda s: loader.training_batch(int(s))).to_iter_dataset(_READ))

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._step += 1
        return batch

    @property
    def step(self) -> int:
        """The number of batches handed out since the beginning of training."""
        return self._step

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self._step // self._loader.steps_per_epoch

    def state(self) -> dict[str, Any]:
        """Returns the place of the next batch; JSON-able. Prefetched batches do not count."""
        return {"step": self._step, "fingerprint": self._loader.fingerprint}
