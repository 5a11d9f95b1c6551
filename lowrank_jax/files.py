"""Files and directories that appear only when they are complete, and JSON that is not trusted."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any


def write_file(path: pathlib.Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes chunks of bytes to a temporary file beside ``path``, syncs it, and renames it to ``path``."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def write_directory(out: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    """Makes ``out`` with what ``fill`` writes into a temporary directory beside it; what stood there is replaced, and removed last."""
    out.parent.mkdir(parents=True, exist_ok=True)
    room = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        new = room / "new"
        new.mkdir()
        new.chmod(0o777 & ~_umask())
        fill(new)
        old = room / "old"
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(new, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
    finally:
        shutil.rmtree(room, ignore_errors=True)


def json_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that bytes spell.

    Raises:
      ValueError: they are not UTF-8, no JSON, nested too deeply to be read, an object in which a name occurs twice, or no object.

    Example:
      >>> json_object(b'{"a": 1}')
      {'a': 1}
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"is a JSON {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _umask() -> int:
    """The user's umask: what mkstemp and mkdtemp make is private, and should obey it like anything else."""
    umask = os.umask(0)
    os.umask(umask)
    return umask
