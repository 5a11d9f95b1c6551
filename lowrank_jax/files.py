"""Files and directories that appear only when they are complete, and JSON that is not trusted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_PART = ".part"  # ends the names of what is not complete
_LEFTOVER = re.compile(rf"\..+\.[a-z0-9_]{{8}}\{_PART}")


_FAILING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class StorageError(OSError):
    """A disk did not take what was to be written: it is full, over a quota, read-only or failing. What stood there before stands."""


def fault(number: int | None) -> str | None:
    """What the system says of an error by its number, if it is that a disk is full or failing; None for all others.

    Example:
      >>> fault(errno.ENOSPC), fault(errno.ENOENT)
      ('No space left on device', None)
    """
    return os.strerror(number) if number is not None and number in _FAILING else None


@contextlib.contextmanager
def storing(
    what: Any, remedy: str = "What stood there before is untouched. Make room and save again."
) -> Iterator[None]:
    """Makes the errors of a disk within the block a `StorageError`; others pass.

    Args:
      what: is written there, for the message. remedy: what to do.

    Example:
      >>> with storing("adapter"):
      ...     raise OSError(errno.ENOSPC, "No space left on device")
      Traceback (most recent call last):
      ...
      lowrank_jax.files.StorageError: adapter: could not be written (No space left on device). What stood there before is untouched. ...
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # A writer that is not Python's, such as array_record's, has the system's words in a RuntimeError.
        said = (os.strerror(number) for number in _FAILING if os.strerror(number) in str(error))
        why = fault(error.errno) if isinstance(error, OSError) else next(said, None)
        if why is None:
            raise
        raise StorageError(f"{what}: could not be written ({why}). {remedy}") from error


def sweep(directory: pathlib.Path) -> None:
    """Removes what killed writers left in a directory. Nobody else may be writing there."""
    for left in directory.iterdir():
        if _LEFTOVER.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def write_file(path: pathlib.Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes chunks of bytes to a temporary file beside ``path``, syncs it, and renames it to ``path``.

    Raises:
      StorageError: the disk is full or failing.
    """
    with storing(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
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
    """Makes ``out`` with what ``fill`` writes into a temporary directory beside it; what stood there is replaced, and removed last.

    Raises:
      StorageError: the disk is full or failing.
    """
    with storing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        room = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=_PART))
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
