"""Reads the GGUF container (versions 2 and 3, little-endian): metadata, and tensors decoded one at a time.

Every length in the file is checked against the bytes that are left before anything is allocated for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from lowrank_jax.models import gguf_blocks
from lowrank_jax.models.tensors import CorruptFileError, LazyTensor, check_shape

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_NESTING = 4


@dataclasses.dataclass(frozen=True)
class GGUF:
    """An open GGUF file.

    Attributes:
        metadata: key -> bool, int, float, str, or list of these.
        tensors: name -> LazyTensor; shapes are (out, in), the reverse of the order in the file.
        types: name -> llama.cpp's name of the stored type, such as 'Q4_1'.
        file: the file.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    types: Mapping[str, str]
    file: pathlib.Path


def open_gguf(path: os.PathLike[str] | str) -> GGUF:
    """Opens a GGUF file; tensors stay in the file until `read()`.

    F32, F16 and BF16 keep their dtype; Q4_0, Q4_1 and Q8_0 are decoded to float32.

    Raises:
        FileNotFoundError: no such file.
        CorruptFileError: not a GGUF file, cut short, or contradicting itself.
        NotImplementedError: a version, byte order or tensor type that is not read here.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Expected a .gguf file.")
    size = path.stat().st_size
    if size < 24:
        raise CorruptFileError(path, f"{size} bytes", "a GGUF file, which has at least 24")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        tensor_count, key_count = _read_start(cursor)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.string()
            if key in metadata:
                cursor.fail(f"metadata key {key!r} occurs twice", "unique keys")
            metadata[key] = _read_value(cursor, cursor.scalar("<I"), 0)
        entries = [_read_entry(cursor) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            cursor.fail(f"general.alignment is {alignment!r}", "a positive multiple of 8")
        start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, LazyTensor] = {}
    types, spans = {}, []
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise CorruptFileError(path, f"tensor {name!r} occurs twice", "unique names")
        stored = _stored(path, size, alignment, name, shape, kind, start + offset)
        spans.append((stored.offset, stored.offset + stored.blocks * stored.block.size, name))
        tensors[name] = LazyTensor(shape, stored.block.dtype, path, stored)
        types[name] = stored.block.name
    # Many tensors over the same bytes would be read as more numbers than the file can hold.
    spans.sort()
    for (_, end, before), (begin, _, name) in itertools.pairwise(spans):
        if begin < end:
            raise CorruptFileError(path, f"tensor {name!r} begins within {before!r}", "tensors one after the other")
    return GGUF(metadata, tensors, types, path)


@dataclasses.dataclass
class _Cursor:
    """Walks through the mapped file; every step is checked against its end."""

    path: pathlib.Path
    data: mmap.mmap
    position: int = 0

    def fail(self, found: str, expected: str) -> NoReturn:
        raise CorruptFileError(self.path, f"{found} (at byte {self.position:,})", expected)

    def need(self, count: int) -> None:
        left = len(self.data) - self.position
        if count > left:
            self.fail(f"{count:,} bytes are announced where {left:,} are left", "a complete file")

    def take(self, count: int) -> bytes:
        self.need(count)
        self.position += count
        return self.data[self.position - count : self.position]

    def scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        raw = self.take(self.scalar("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail("a string is not UTF-8", "UTF-8")


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.take(4)
    if magic == b"vers":
        raise CorruptFileError(cursor.path, "a Git LFS pointer, not the weights", "a GGUF file", "Run `git lfs pull`.")
    if magic != b"GGUF":
        cursor.fail(f"the file begins with {magic!r}", "b'GGUF'")
    version = cursor.scalar("<I")
    if version not in (2, 3):
        what = "big-endian" if version in (2 << 24, 3 << 24) else f"version {version}"
        raise NotImplementedError(f"{cursor.path}: a {what} GGUF file; versions 2 and 3, little-endian, are read here.")
    tensor_count, key_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    cursor.need(tensor_count * 24 + key_count * 12)  # the least that so many entries take
    return tensor_count, key_count


def _read_value(cursor: _Cursor, kind: int, depth: int) -> Any:
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY or depth >= _MAX_NESTING:
        cursor.fail(f"metadata of type {kind} at depth {depth}", f"types 0 to 12, at most {_MAX_NESTING} deep")
    item, count = cursor.scalar("<I"), cursor.scalar("<Q")
    if item in _SCALARS:
        raw = cursor.take(count * struct.calcsize(_SCALARS[item]))
        return np.frombuffer(raw, _SCALARS[item]).tolist()
    cursor.need(count * 8)  # every string or array takes eight bytes at least
    return [_read_value(cursor, item, depth + 1) for _ in range(count)]


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    rank = cursor.scalar("<I")
    if rank > 8:
        cursor.fail(f"tensor {name!r} has {rank} axes", "at most 8")
    shape = tuple(cursor.scalar("<Q") for _ in range(rank))[::-1]
    return name, shape, cursor.scalar("<I"), cursor.scalar("<Q")


def _stored(
    path: pathlib.Path, size: int, alignment: int, name: str, shape: tuple[int, ...], kind: int, begin: int
) -> _Stored:
    block = gguf_blocks.BLOCK_TYPES.get(kind)
    if block is None:
        stored = gguf_blocks.UNREAD_TYPES.get(kind, f"type {kind}")
        readable = ", ".join(b.name for b in gguf_blocks.BLOCK_TYPES.values())
        raise NotImplementedError(
            f"{path}: tensor {name!r} is stored as {stored}; read here are {readable}. "
            "Take the model in one of these, or as safetensors."
        )
    if block.weights > 1 and (not shape or shape[-1] % block.weights):
        raise CorruptFileError(
            path, f"tensor {name!r} of shape {shape} in {block.name}", f"rows of whole {block.weights}s"
        )
    count = math.prod(shape) // block.weights * block.size
    if begin % alignment or begin + count > size:
        found = f"tensor {name!r} lies at bytes {begin:,} to {begin + count:,} of {size:,}"
        raise CorruptFileError(
            path,
            found,
            f"an offset inside the file that {alignment} divides",
            "The file is cut short or damaged: fetch it again.",
        )
    check_shape(path, name, shape, block.dtype)
    return _Stored(path, begin, shape, block)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Maps and decodes one tensor."""

    path: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    block: gguf_blocks.BlockType

    @property
    def blocks(self) -> int:
        return math.prod(self.shape) // self.block.weights

    def __call__(self) -> np.ndarray:
        if not self.blocks:  # an empty part of a file cannot be mapped
            return np.zeros(self.shape, self.block.dtype)
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (self.blocks, self.block.size)).view(np.ndarray)
        return self.block.decode(raw).reshape(self.shape)
