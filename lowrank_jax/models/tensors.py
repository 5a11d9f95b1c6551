"""Safetensors files as a mapping of lazy tensors, and a writer whose bytes depend on nothing but the tensors.

The header is checked in full before any of it is believed: a damaged or forged file ends in one
    `CorruptFileError`
that names the file, never in a huge allocation or in silently wrong weights. Reading maps the file, so a
tensor costs host memory only for the pages that are touched.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lowrank_jax.files import json_object, write_file

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's reference reader
INDEX_NAME = "model.safetensors.index.json"
_SHARD = re.compile(r"[ -.0-9;-\[\]-~]{1,200}\.safetensors")  # printable ASCII without '/', ':' and '\\'

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "C64": np.dtype("<c8"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CorruptFileError(ValueError):
    """A weight file whose bytes contradict themselves: cut short, damaged, or not what its name says."""

    def __init__(self, file: os.PathLike[str] | str, found: str, expected: str, remedy: str = "Fetch it again."):
        super().__init__(f"{file}: {found}; expected {expected}. {remedy}")


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still in its file.

    Attributes:
        shape: the shape `read()` will return.
        dtype: the dtype `read()` will return.
        file: where the bytes are.
        reader: produces the array; call `read()` instead.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: pathlib.Path
    reader: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    def read(self) -> np.ndarray:
        """Returns the array, of `shape` and `dtype`; it may be a read-only view of the mapped file."""
        return self.reader()


def open_safetensors(path: os.PathLike[str] | str) -> Mapping[str, LazyTensor]:
    """Opens a safetensors file, or a directory holding one file or an index with its shards.

    Args:
        path: a `.safetensors` file, a `.safetensors.index.json` file, or a directory.
    Returns:
        name -> LazyTensor, in the order of the names.
    Raises:
        FileNotFoundError: nothing to read there.
        CorruptFileError: the bytes contradict themselves.

    Example:
        >>> import tempfile, numpy as np
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> save_safetensors(folder / "model.safetensors", {"w": np.ones((2, 3), np.float32)})
        >>> tensors = open_safetensors(folder)
        >>> tensors["w"].shape, tensors["w"].read().sum().item()
        ((2, 3), 6.0)
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _choose(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Expected a .safetensors file or a directory holding one.")
    tensors = _open_index(path) if path.name.endswith(".index.json") else _open_file(path)
    return dict(sorted(tensors.items()))


def save_safetensors(
    path: os.PathLike[str] | str, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to one safetensors file; equal input gives equal bytes.

    The file appears under its name only when it is complete. Tensors are laid out by falling item size, then
    by name, which keeps every tensor aligned (and is the reference writer's order).

    Args:
        path: the file to write; its directory must exist.
        tensors: name -> NumPy or JAX array; one is brought to the host at a time.
        metadata: optional strings stored in the header.
    Raises:
        ValueError: a name, a dtype or the metadata that the format cannot hold; nothing is written.
    """
    path = pathlib.Path(path)
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"{path}: metadata holds strings only, got {key!r}: {value!r}.")
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    order = sorted(tensors, key=lambda name: (-_dtype_of(path, name, tensors[name]).itemsize, name))
    start = 0
    for name in order:
        dtype = _dtype_of(path, name, tensors[name])
        shape = [int(n) for n in tensors[name].shape]
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)

    def chunks() -> Iterator[Any]:
        yield len(encoded).to_bytes(8, "little") + encoded
        for name in order:
            array = np.asarray(tensors[name])
            yield np.ascontiguousarray(array, dtype=_dtype_of(path, name, array)).tobytes()

    write_file(path, chunks())


def _dtype_of(path: pathlib.Path, name: str, value: Any) -> np.dtype:
    if name == "__metadata__":
        raise ValueError(f"{path}: a tensor may not be named '__metadata__', the format keeps that name.")
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise ValueError(f"{path}: tensor {name!r} is a {type(value).__name__}; expected a NumPy or JAX array.")
    try:
        dtype = np.dtype(value.dtype).newbyteorder("<")
    except TypeError:
        dtype = None
    if dtype is None or dtype not in _NAMES:
        raise ValueError(f"{path}: tensor {name!r} has dtype {value.dtype}; safetensors holds {', '.join(DTYPES)}.")
    return dtype


def _choose(folder: pathlib.Path) -> pathlib.Path:
    for name in ("model.safetensors", INDEX_NAME):
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = ", ".join(f.name for f in files) or "no .safetensors file"
    raise FileNotFoundError(f"{folder}: found {found}; expected model.safetensors, or {INDEX_NAME} with its shards.")


def check_shape(path: pathlib.Path, name: str, shape: Sequence[int], dtype: np.dtype) -> None:
    """Raises a CorruptFileError where NumPy has no array of this shape, which an axis of length 0 lets pass every other check."""
    if math.prod(n for n in shape if n) * dtype.itemsize >= 2**63:
        raise CorruptFileError(path, f"tensor {name!r} has shape {tuple(shape)}", "sizes that an array can have")


def _parse(path: pathlib.Path, raw: bytes, what: str) -> dict[str, Any]:
    try:
        return json_object(raw)
    except ValueError as error:
        raise CorruptFileError(path, f"{what} {error}", "a JSON object") from error


def _open_index(path: pathlib.Path) -> dict[str, LazyTensor]:
    size = path.stat().st_size
    if size > MAX_HEADER_BYTES:
        raise CorruptFileError(path, f"an index of {size:,} bytes", f"at most {MAX_HEADER_BYTES:,}")
    weight_map = _parse(path, path.read_bytes(), "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(path, "no 'weight_map'", "an object from tensor names to file names")
    shards: dict[str, dict[str, LazyTensor]] = {}
    result = {}
    for name, file in weight_map.items():
        # A plain name only: an index from the network must not make us read elsewhere on the disk.
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise CorruptFileError(path, f"tensor {name!r} points to {file!r}", "a .safetensors name in this directory")
        if file not in shards:
            if not (path.parent / file).is_file():
                raise FileNotFoundError(f"{path.parent / file}: the shard is missing, but {path.name} lists it.")
            shards[file] = _open_file(path.parent / file)
        if name not in shards[file]:
            raise CorruptFileError(path.parent / file, f"no tensor {name!r}", f"it, because {path.name} lists it here")
        result[name] = shards[file][name]
    return result


def _open_file(path: pathlib.Path) -> dict[str, LazyTensor]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if start.startswith(b"version "):
            raise CorruptFileError(
                path, "a Git LFS pointer, not the weights", "a safetensors file", "Run `git lfs pull`."
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            found = f"the first bytes announce a header of {length:,} bytes in a file of {size:,}"
            raise CorruptFileError(path, found, "a header that fits its file")
        header = _parse(path, stream.read(length), "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFileError(path, f"'__metadata__' is {str(metadata)[:80]}", "strings by name")
    base, data_size = 8 + length, size - 8 - length
    result, spans = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _check_entry(path, name, entry, data_size)
        spans.append((begin, end, name))
        result[name] = LazyTensor(shape, dtype, path, _Mapped(path, base + begin, shape, dtype))
    _check_cover(path, sorted(spans), data_size)
    return result


def _check_entry(
    path: pathlib.Path, name: str, entry: Any, data_size: int
) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError(path, f"tensor {name!r} is described by {str(entry)[:80]}", "dtype, shape, data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CorruptFileError(
            path,
            f"tensor {name!r} has dtype {entry['dtype']!r}",
            f"one of {', '.join(DTYPES)}",
            "Convert the file to one of these.",
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape) and len(shape) <= 32):
        raise CorruptFileError(path, f"tensor {name!r} has shape {str(shape)[:80]}", "a list of sizes")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)):
        raise CorruptFileError(path, f"tensor {name!r} has offsets {str(offsets)[:80]}", "a pair of integers")
    begin, end = offsets
    if not 0 <= begin <= end <= data_size:
        found = f"tensor {name!r} lies at bytes {begin:,} to {end:,} of {data_size:,}"
        raise CorruptFileError(
            path, found, "offsets inside the file", "The file is cut short or damaged: fetch it again."
        )
    if math.prod(shape) * dtype.itemsize != end - begin:
        found = f"tensor {name!r} of shape {tuple(shape)} and dtype {entry['dtype']} has {end - begin:,} bytes"
        raise CorruptFileError(path, found, f"{math.prod(shape) * dtype.itemsize:,}")
    check_shape(path, name, shape, dtype)
    return dtype, tuple(shape), begin, end


def _check_cover(path: pathlib.Path, spans: list[tuple[int, int, str]], data_size: int) -> None:
    position = 0
    for begin, end, name in spans:
        if begin != position:
            found = f"tensor {name!r} begins at byte {begin:,}"
            raise CorruptFileError(path, found, f"byte {position:,}, where the tensor before it ends")
        position = end
    if position != data_size:
        raise CorruptFileError(path, f"{data_size:,} bytes of data", f"{position:,}, the end of the last tensor")


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """Reads one tensor by mapping its part of the file."""

    path: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __call__(self) -> np.ndarray:
        if math.prod(self.shape) == 0:  # an empty part of a file cannot be mapped
            return np.zeros(self.shape, self.dtype)
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (math.prod(self.shape) * self.dtype.itemsize,))
        return raw.view(np.ndarray).view(self.dtype).reshape(self.shape)
