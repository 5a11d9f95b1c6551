"""From chosen rows to the arrays of a batch."""

from __future__ import annotations

import numpy as np

from train.data.batching import Rows
from train.data.tokens import TokenTable

Batch = dict[str, np.ndarray]


def classification(table: TokenTable, chosen: np.ndarray, width: int, pad_id: int, label_dtype: type) -> Batch:
    """Returns a batch for classification or regression.

    Args:
        chosen: examples, int [batch]; -1 makes a row of padding.
        width: tokens in a row.
        label_dtype: np.int32 for classes, np.float32 for scores.
    Returns:
        tokens int32, mask bool and token_types int32, all [batch, width]; label [batch].
    """
    shape = (len(chosen), width)
    tokens, types, mask = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    label: np.ndarray = np.zeros(len(chosen), label_dtype)
    for row, example in enumerate(chosen):
        if example < 0:
            mask[row, 0] = True  # attention over nothing is not a number; `valid` takes the row out of every mean
            continue
        begin, end = table.offsets[example], table.offsets[example + 1]
        tokens[row, : end - begin] = table.ids[begin:end]
        types[row, : end - begin] = table.marks[begin:end]
        mask[row, : end - begin] = True
        label[row] = table.labels[example]
    return {"tokens": tokens, "mask": mask, "token_types": types, "label": label}


def causal_lm(table: TokenTable, rows: Rows, chosen: np.ndarray, width: int, pad_id: int) -> Batch:
    """Returns a batch for language modelling.

    Args:
        chosen: rows, int [batch]; -1 makes a row of padding.
    Returns:
        All [batch, width]: tokens int32; loss_mask bool, true where tokens[b, t] is to be predicted from what
        stands before it (never the first token of an example: shift by one and use it as it is); positions
        int32, from 0 in every example; segment_ids int32, 1, 2, ... per example in the row and 0 for padding.
    """
    shape = (len(chosen), width)
    tokens, positions = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    segments, learned = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, members in ((i, rows[r]) for i, r in enumerate(chosen) if r >= 0):
        place = 0
        for segment, example in enumerate(members, 1):
            begin, end = table.offsets[example], table.offsets[example + 1]
            part = slice(place, place := place + int(end - begin))
            tokens[row, part] = table.ids[begin:end]
            learned[row, part] = table.marks[begin:end]
            learned[row, part.start] = False
            positions[row, part] = np.arange(end - begin)
            segments[row, part] = segment
    return {"tokens": tokens, "loss_mask": learned, "positions": positions, "segment_ids": segments}
