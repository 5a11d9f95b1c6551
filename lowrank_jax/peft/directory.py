"""What an adapter directory holds, and when one may be replaced."""

from __future__ import annotations

import pathlib

FILE = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"


def check_free(out: pathlib.Path, overwrite: bool) -> None:
    """Raises a FileExistsError unless the directory may be made, or be replaced without losing anything but an adapter."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another directory.")
    names = sorted(file.name for file in out.iterdir())
    if not names:
        return
    others = [name for name in names if name not in (FILE, WEIGHTS, CARD)]
    if FILE not in names or others:
        found = f"holds {others[0]!r}" if others else "holds files but no adapter"
        raise FileExistsError(
            f"{out} {found}; only a directory with nothing but an adapter is ever replaced. Choose another."
        )
    if not overwrite:
        raise FileExistsError(f"{out} holds an adapter; choose another directory or pass overwrite=True.")
