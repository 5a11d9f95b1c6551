"""Small adapter directories: leaves as safetensors, the plan as JSON."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.adapters import Adapters
from lowrank_jax.checkpoint.reference import Base, CheckpointError, check_base, check_format, read_base
from lowrank_jax.files import json_object, write_directory
from lowrank_jax.hosts import leads, on_host, wait
from lowrank_jax.plan import from_config
from lowrank_jax.sites import flatten

_FORMAT = 1
_WEIGHTS, _RECORD = "adapter.safetensors", "adapter.json"


def save_adapter(
    directory: os.PathLike[str] | str, adapters: Adapters, base: Base, extra: Mapping[str, Any] | None = None
) -> pathlib.Path:
    """Writes an adapter as a small directory: its leaves as safetensors, its plan as JSON. Equal adapters give equal bytes.

    Of several processes all call, the first writes, and all return when it has.

    Args:
      directory: appears when it is complete; one that exists is replaced. base: what it was trained on.
      extra: JSON-able data to keep with it.

    Raises:
      ValueError: a stack of adapters.
    """
    from lowrank_jax.models.tensors import save_safetensors

    if adapters.stacked is not None:
        raise ValueError("save_adapter takes one adapter; pick one of the stack with lowrank_jax.take.")
    out = pathlib.Path(directory).absolute()
    record = {"format": _FORMAT, "base": base._asdict(), "plan": adapters.plan.to_config(), "extra": dict(extra or {})}

    leaves = jax.tree.map(on_host, flatten({"sites": adapters.sites, "shared": adapters.shared}))

    def fill(folder: pathlib.Path) -> None:
        save_safetensors(folder / _WEIGHTS, leaves)
        (folder / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    if leads():
        write_directory(out, fill)
    wait("adapter")
    return out


def read_record(directory: os.PathLike[str] | str) -> dict[str, Any]:
    """What stands in an adapter directory beside its weights: 'base' (a `Base`), 'plan' and 'extra'.

    Raises:
      FileNotFoundError: not an adapter directory. CheckpointError: it cannot be read.
    """
    file = pathlib.Path(directory) / _RECORD
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; expected a directory that save_adapter wrote (runs/<name>/adapter)."
        )
    try:
        record = json_object(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} {error}; the file is damaged. Save the adapter again.") from error
    check_format(record.get("format"), _FORMAT, str(file))
    if not isinstance(record.get("plan"), list) or not isinstance(record.get("extra"), dict):
        raise CheckpointError(f"{file}: it has no plan or no extra; the file is damaged. Save the adapter again.")
    return record | {"base": read_base(record.get("base"), str(file))}


def load_adapter(directory: os.PathLike[str] | str, params: Any, base: Base | None = None) -> Adapters:
    """Reads what `save_adapter` wrote.

    Args:
      params: the model's parameters. base: their `base_reference`, to check that the adapter is theirs; None checks shapes only.

    Raises:
      FileNotFoundError: not an adapter directory.
      CheckpointError: an adapter of another model, or leaves that do not fit its plan. CorruptFileError: a damaged weight file.

    Example:
      >>> import jax, tempfile
      >>> import lowrank_jax as lr
      >>> from lowrank_jax.checkpoint import base_reference
      >>> params = {"x": {"kernel": jnp.eye(4)}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"x": lr.lora(rank=2)}))
      >>> where = save_adapter(pathlib.Path(tempfile.mkdtemp()) / "adapter", adapters, base_reference("eye", params))
      >>> load_adapter(where, params).plan.trainable
      16
    """
    from lowrank_jax.models.tensors import open_safetensors

    record = read_record(directory)
    if base is not None:
        check_base(base, record["base"], str(directory))
    try:
        plan = from_config(params, record["plan"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: its plan cannot be read: {error}") from error
    tensors = open_safetensors(pathlib.Path(directory) / _WEIGHTS)
    wanted = {
        f"sites/{e.site.path}/{name}": (leaf, e.local.batch_shape if e.site.kind != "param" else ())
        for e in plan.entries
        for name, leaf in e.leaves.items()
    }
    wanted |= {
        f"shared/{group}/{name}": (leaf, ())
        for group, leaves in plan.shared_leaves.items()
        for name, leaf in leaves.items()
    }
    for name in sorted(set(wanted) ^ set(tensors)):
        problem = "is missing" if name in wanted else "belongs to nothing in its plan"
        raise CheckpointError(
            f"{directory}: leaf {name!r} {problem}; the directory was put together from different adapters."
        )
    for name, (leaf, batch) in wanted.items():
        shape, dtype = (*batch, *leaf.shape), tensors[name].dtype
        if tensors[name].shape != shape:
            raise CheckpointError(f"{directory}: leaf {name!r} has shape {tensors[name].shape}, its plan says {shape}.")
        kind = jnp.floating if leaf.dtype is None else leaf.dtype
        if not jnp.issubdtype(dtype, kind):
            raise CheckpointError(f"{directory}: leaf {name!r} has type {dtype}, its plan says {kind.__name__}.")
    read = lambda name: jnp.array(tensors[name].read())  # noqa: E731
    sites = {e.site.path: {n: read(f"sites/{e.site.path}/{n}") for n in e.leaves} for e in plan.entries}
    shared = {group: {n: read(f"shared/{group}/{n}") for n in leaves} for group, leaves in plan.shared_leaves.items()}
    return Adapters(sites, shared, plan)
