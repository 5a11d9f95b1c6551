"""Which examples go into which batch: packing into rows, and batches of rows of like length.

Everything here is a pure function of lengths and seeds; that is what makes the loader exactly resumable.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from train.data.hashing import permutation

BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
# Batches whose rows are sorted by length together: long enough to save padding, short enough to stay random.
CHUNK = 64


class Rows(NamedTuple):
    """Rows of examples: row i holds members[starts[i]:starts[i + 1]] and has lengths[i] tokens."""

    members: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:  # type: ignore[override]
        return self.members[self.starts[row] : self.starts[row + 1]]


def bucket(length: int, max_length: int) -> int:
    """Returns the width of a batch whose longest row has `length` tokens.

    Example:
        >>> bucket(20, 128), bucket(100, 120)
        (24, 120)
    """
    return min(next((b for b in BUCKETS if b >= length), max_length), max_length)


def single_rows(lengths: np.ndarray) -> Rows:
    """Returns one row per example."""
    count = len(lengths)
    return Rows(np.arange(count), np.arange(count + 1), np.asarray(lengths))


def packed_rows(lengths: np.ndarray, max_length: int, seed: int) -> Rows:
    """Packs examples into rows of at most `max_length` tokens: each into the fullest row it fits (best fit
    decreasing).

    The longest come first; the seed sets the order among equals. The packing is the same in every epoch, and
    so is the number of steps.

    Args:
        lengths: int [examples], each at most `max_length`.

    Example:
        >>> rows = packed_rows(np.array([6, 4, 4, 6]), 10, seed=0)
        >>> rows.lengths.tolist()
        [10, 10]
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(max_length + 1)]  # by room left; a heap makes the choice definite
    shuffled = permutation(len(lengths), seed)
    for example in shuffled[np.argsort(-lengths[shuffled], kind="stable")].tolist():
        length = int(lengths[example])
        room = next((r for r in range(length, max_length) if open_rows[r]), max_length)
        if room < max_length:
            row = heapq.heappop(open_rows[room])
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(example)
        heapq.heappush(open_rows[room - length], row)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    members = np.asarray([example for row in rows for example in row], np.int64)
    return Rows(members, starts, np.asarray([int(lengths[row].sum()) for row in rows], np.int64))


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the rows of every batch of an epoch, int64 [batches, batch_size].

    Rows are shuffled; within chunks of `CHUNK` batches they are sorted by length and cut into batches; the
    batches are shuffled. The rows that do not fill the last batch wait for another epoch.

    Example:
        >>> batches = epoch_batches(np.arange(10), 4, seed=0, epoch=0)
        >>> batches.shape, len(set(batches.ravel().tolist()))
        ((2, 4), 8)
    """
    count = len(lengths) // batch_size
    order = permutation(len(lengths), seed, epoch)[: count * batch_size]
    for start in range(0, len(order), CHUNK * batch_size):
        chunk = order[start : start + CHUNK * batch_size]
        order[start : start + len(chunk)] = chunk[np.argsort(lengths[chunk], kind="stable")]
    return order.reshape(count, batch_size)[permutation(count, seed, epoch, 1)]


def evaluation_batches(lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns every row once, sorted by length, int64 [batches, batch_size]; -1 fills up the last batch."""
    order = np.argsort(lengths, kind="stable")
    padding = np.full(-len(order) % batch_size, -1)
    return np.concatenate([order, padding]).reshape(-1, batch_size)
