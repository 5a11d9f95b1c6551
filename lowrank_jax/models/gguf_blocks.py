"""The block formats of GGUF tensors: their sizes in bytes and how each becomes ordinary numbers.

A quantised row is a run of blocks of 32 weights. A block stores a float16 scale `d` (and in Q4_1 a float16
offset `m`) and the 32 small integers `q`; four-bit integers come two a byte, the first half of the block in
the low nibbles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

BLOCK = 32


class BlockType(NamedTuple):
    """One GGUF tensor type.

    Attributes:
        name: the name used by llama.cpp.
        weights: weights in a block.
        size: bytes in a block.
        dtype: dtype of the decoded numbers.
        decode: uint8 [blocks, size] -> dtype [blocks, weights].
    """

    name: str
    weights: int
    size: int
    dtype: np.dtype
    decode: Callable[[np.ndarray], np.ndarray]


def _half(column: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(column).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)


def q4_0(blocks: np.ndarray) -> np.ndarray:
    """Decodes Q4_0, `d * (q - 8)`: uint8 [blocks, 18] -> float32 [blocks, 32].

    Example:
        >>> block = np.concatenate([np.float16([0.5]).view(np.uint8), np.full(16, 0x9A, np.uint8)])
        >>> q4_0(block[None])[0, [0, 31]].tolist()
        [1.0, 0.5]
    """
    return (_nibbles(blocks[:, 2:]) - 8.0) * _half(blocks[:, :2])


def q4_1(blocks: np.ndarray) -> np.ndarray:
    """Decodes Q4_1, `d * q + m`: uint8 [blocks, 20] -> float32 [blocks, 32].

    Example:
        >>> block = np.concatenate([np.float16([0.5, -1]).view(np.uint8), np.full(16, 0x21, np.uint8)])
        >>> q4_1(block[None])[0, [0, 31]].tolist()
        [-0.5, 0.0]
    """
    return _nibbles(blocks[:, 4:]) * _half(blocks[:, :2]) + _half(blocks[:, 2:4])


def q8_0(blocks: np.ndarray) -> np.ndarray:
    """Decodes Q8_0, `d * q`: uint8 [blocks, 34] -> float32 [blocks, 32].

    Example:
        >>> block = np.concatenate([np.float16([0.5]).view(np.uint8), np.int8([-3] * 32).view(np.uint8)])
        >>> q8_0(block[None])[0, 0].item()
        -1.5
    """
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * _half(blocks[:, :2])


def _plain(dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda blocks: np.ascontiguousarray(blocks).view(dtype)


def _plain_type(name: str, dtype: np.dtype) -> BlockType:
    return BlockType(name, 1, dtype.itemsize, dtype, _plain(dtype))


BLOCK_TYPES: dict[int, BlockType] = {
    0: _plain_type("F32", np.dtype("<f4")),
    1: _plain_type("F16", np.dtype("<f2")),
    2: BlockType("Q4_0", BLOCK, 18, np.dtype(np.float32), q4_0),
    3: BlockType("Q4_1", BLOCK, 20, np.dtype(np.float32), q4_1),
    8: BlockType("Q8_0", BLOCK, 34, np.dtype(np.float32), q8_0),
    30: _plain_type("BF16", np.dtype(ml_dtypes.bfloat16)),
}

# Named so that a refusal can say what the file holds.
UNREAD_TYPES: dict[int, str] = {
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
