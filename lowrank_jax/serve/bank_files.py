"""Banks on disk: a directory with one adapter directory for each name, and a list of them."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from lowrank_jax.checkpoint import Base, CheckpointError, check_base, load_adapter, read_record, save_adapter
from lowrank_jax.checkpoint.reference import check_format, read_base
from lowrank_jax.files import json_object, write_directory
from lowrank_jax.serve.bank import Bank, check_name

_FORMAT = 1
_LIST, _ADAPTERS = "bank.json", "adapters"


def save_bank(directory: str | os.PathLike[str], bank: Bank, base: Base) -> pathlib.Path:
    """Writes every adapter of a bank with `lowrank_jax.checkpoint.save_adapter`; the base by its name and hash only.

    Args:
      directory: appears when it is complete. A bank that stood there is replaced, anything else is left alone.
      base: see `lowrank_jax.checkpoint.base_reference`.

    Raises:
      FileExistsError: something else is there. ValueError: names that a file system may take for one (they differ in case only).

    Example:
      >>> import jax, jax.numpy as jnp, tempfile, lowrank_jax as lr
      >>> from lowrank_jax.checkpoint import base_reference
      >>> params = {"layer": {"kernel": jnp.ones((8, 6))}}
      >>> one = lr.init(jax.random.key(0), params, lr.plan(params, {"layer": lr.lora(2)}))
      >>> where = save_bank(tempfile.mkdtemp(), lr.Bank(params, {"one": one}), base_reference("ones", params))
      >>> load_bank(where, params)
      Bank(one)
    """
    out = pathlib.Path(directory).absolute()
    _check_free(out)
    lower = [name.casefold() for name in bank]
    alike = [name for name in bank if lower.count(name.casefold()) > 1]
    if alike:
        raise ValueError(
            f"Names that differ in case only are one file on some systems: {', '.join(alike)}. Rename one."
        )

    def fill(folder: pathlib.Path) -> None:
        for name, adapters in bank.items():
            save_adapter(folder / _ADAPTERS / name, adapters, base)
        about = {"format": _FORMAT, "base": base._asdict(), "adapters": list(bank)}
        (folder / _LIST).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")

    write_directory(out, fill)
    return out


def load_bank(
    directory: str | os.PathLike[str], params: Any, base: Base | None = None, names: Sequence[str] | None = None
) -> Bank:
    """Reads what `save_bank` wrote.

    Args:
      params: the model's parameters. base: their reference, to check that the bank is theirs; None checks shapes only.
      names: the adapters to read; None: all.

    Raises:
      FileNotFoundError: not a bank. KeyError: a name it does not have. CheckpointError: a bank of another model, or a damaged one.
    """
    root = pathlib.Path(directory)
    about = _read(root)
    if base is not None:
        check_base(base, about["base"], str(root))
    missing = [name for name in names or () if name not in about["adapters"]]
    if missing:
        raise KeyError(f"{root}: no adapter {missing[0]!r}; it has {', '.join(about['adapters'])}.")
    adapters = {}
    for name in about["adapters"] if names is None else names:
        where = root / _ADAPTERS / name
        check_base(about["base"], read_record(where)["base"], str(where))
        adapters[name] = load_adapter(where, params)
    return Bank(params, adapters)


def _read(root: pathlib.Path) -> dict[str, Any]:
    file = root / _LIST
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a directory that save_bank wrote.")
    try:
        about = json_object(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} {error}; the file is damaged. Save the bank again.") from error
    check_format(about.get("format"), _FORMAT, str(file))
    names = about.get("adapters")
    if not isinstance(names, list):
        raise CheckpointError(
            f"{file}: not readable, its adapters are no list; the file is damaged. Save the bank again."
        )
    try:
        for name in names:
            check_name(name)  # a name is a directory's
    except ValueError as error:
        raise CheckpointError(f"{file}: {error} The file is damaged: save the bank again.") from error
    return about | {"base": read_base(about.get("base"), str(file))}


def _check_free(out: pathlib.Path) -> None:
    if not out.exists() or (out.is_dir() and ((out / _LIST).is_file() or not any(out.iterdir()))):
        return
    raise FileExistsError(f"{out} is there and no bank; only a bank is ever replaced. Choose another directory.")
