"""Checkpoints of a run (Orbax, asynchronous) and small adapter directories (safetensors and JSON).

The base is never stored: a checkpoint names it and holds the hash of its content. The only file that knows Orbax.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.adapters import Adapters
from lowrank_jax.files import write_directory
from lowrank_jax.plan import Plan, from_config
from lowrank_jax.sites import flatten

_FORMAT = 1
_WEIGHTS, _RECORD = "adapter.safetensors", "adapter.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or of another model, plan or format."""


class Base(NamedTuple):
    """A reference to base parameters: a name for people, and the hash of their content."""

    name: str
    hash: str


class Restored(NamedTuple):
    """A checkpoint read back: its step, the adapter, the optimizer's state (None if not asked for), and the caller's record."""

    step: int
    adapters: Adapters
    optimizer: Any
    record: dict[str, Any]


def base_reference(name: str, params: Any, exclude: Iterable[str] = ()) -> Base:
    """The reference of base parameters: SHA-256 over every leaf's path, dtype, shape and bytes.

    Args:
      params: a tree of arrays. exclude: paths that are not part of it, such as a freshly initialised head.

    Example:
      >>> base_reference("m", {"w": np.zeros(2, np.float32)}).hash[:8]
      'e4f441a1'
    """
    skip = set(exclude)
    return Base(name, tree_hash({path: leaf for path, leaf in flatten(params).items() if path not in skip}))


def tree_hash(leaves: Mapping[str, Any]) -> str:
    """SHA-256, in hex, over ``{path: array}`` in the order of the paths."""
    total = hashlib.sha256()
    for path in sorted(leaves):
        array = np.ascontiguousarray(leaves[path])
        total.update(f"{path}:{array.dtype.name}:{array.shape};".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


class Checkpoints:
    """The checkpoints of one run in a directory: the newest few and the best. A context manager.

    A checkpoint is visible when it is complete and never before; what a killed process left behind is removed.

    Args:
      directory: where; made if it does not exist. base, plan: what the run trains; every checkpoint has to agree.
      keep: how many of the newest are kept; the one with the highest score is kept beside them.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"x": {"kernel": jnp.eye(4)}}
      >>> plan = lr.plan(params, {"x": lr.lora(rank=2)})
      >>> adapters = lr.init(jax.random.key(0), params, plan)
      >>> import tempfile
      >>> with Checkpoints(tempfile.mkdtemp(), base_reference("eye", params), plan) as checkpoints:
      ...     checkpoints.save(7, adapters, optimizer={"count": jnp.ones(())}, record={"note": "hello"})
      ...     checkpoints.wait()
      ...     restored = checkpoints.restore(adapters, {"count": jnp.zeros(())})
      >>> restored.step, restored.record["note"], float(restored.optimizer["count"])
      (7, 'hello', 1.0)
    """

    def __init__(self, directory: os.PathLike[str] | str, base: Base, plan: Plan, keep: int = 2):
        from orbax.checkpoint import v1 as ocp

        self.directory = pathlib.Path(directory).absolute()
        self._base, self._plan = base, plan
        self._manager = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.ContinuousCheckpointingPolicy(),
            preservation_policy=_NewestAndBest(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._manager.checkpoints]

    def save(
        self, step: int, adapters: Adapters, optimizer: Any, record: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Saves in the background; returns once the arrays are safe from being donated or changed.

        Args:
          adapters: the whole adapter (`lowrank_jax.join`). optimizer: a pytree of arrays. record: JSON-able data.
          score: of an evaluation at this step, higher is better; None: not evaluated.
        """
        state = _detached({"adapters": _leaves(adapters), "optimizer": optimizer})
        about = {
            "format": _FORMAT, "base": self._base._asdict(), "plan": self._plan.to_config(), "digests": _digests(state),
            "record": dict(record),
        }  # fmt: skip
        metrics = None if score is None else {"score": float(score)}
        self._manager.save_checkpointables_async(step, state, force=True, overwrite=step in self.steps, metrics=metrics,
                                                 custom_metadata=about)  # fmt: skip

    def wait(self) -> None:
        """Waits until everything saved is on the disk."""
        self._manager.wait()

    def record(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the arrays of a step (None: the newest), after checking base and plan.

        Raises:
          CheckpointError: no such checkpoint, a damaged one, or one of another base or plan.
        """
        return self._about(self._existing(step))["record"]

    def restore(self, adapters: Adapters, optimizer: Any = None, step: int | None = None) -> Restored:
        """Reads a checkpoint.

        Args:
          adapters: an adapter of the run's plan, for shapes and shardings. optimizer: likewise the optimizer's state; None leaves it out.
          step: None takes the newest.

        Raises:
          CheckpointError: as `record`, or its content differs from what was saved.
        """
        step = self._existing(step)
        about = self._about(step)
        like: dict[str, Any] = {"adapters": _leaves(adapters)} | ({} if optimizer is None else {"optimizer": optimizer})
        try:
            state = self._manager.load_checkpointables(step, jax.tree.map(_abstract, like))
        except Exception as error:  # Orbax and TensorStore raise errors of many types for a damaged file
            raise self._damaged(step, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}") from error
        for name, digest in _digests(state).items():
            if digest != about["digests"].get(name):
                raise self._damaged(step, f"the content of {name!r} is not what was saved")
        whole = adapters.replace(sites=state["adapters"]["sites"], shared=state["adapters"]["shared"])  # type: ignore[attr-defined]
        return Restored(step, whole, state.get("optimizer"), about["record"])

    def _existing(self, step: int | None) -> int:
        steps = self.steps
        if not steps or (step is not None and step not in steps):
            wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise CheckpointError(f"{self.directory}: {wanted}; there are {steps or 'none'}.")
        return steps[-1] if step is None else step

    def _about(self, step: int) -> dict[str, Any]:
        try:
            about = self._manager.checkpointables_metadata(step).custom_metadata
        except Exception as error:  # as in `restore`
            raise self._damaged(step, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}") from error
        if not isinstance(about, dict) or "record" not in about:
            raise self._damaged(step, "its metadata is missing")
        if about["format"] != _FORMAT:
            raise CheckpointError(
                f"{self.directory}, step {step}: format {about['format']}; this version reads {_FORMAT}."
            )
        check_base(self._base, Base(**about["base"]), f"{self.directory}, step {step}")
        if about["plan"] != _plain(self._plan.to_config()):
            raise CheckpointError(f"{self.directory}, step {step}: {_difference(about['plan'], _plain(self._plan.to_config()))} "
                                  "Restore the plan, or choose another workdir.")  # fmt: skip
        return about

    def _damaged(self, step: int, why: str) -> CheckpointError:
        others = [s for s in self.steps if s != step]
        remedy = f"Remove {self.directory / str(step)} to go on from "
        remedy += f"step {others[-1]}." if others else "the beginning: there is no other."
        return CheckpointError(f"{self.directory}: the checkpoint of step {step} is damaged ({why}). {remedy}")


def save_params(directory: os.PathLike[str] | str, params: Any) -> pathlib.Path:
    """Writes plain parameters as an Orbax checkpoint: ``orbax.checkpoint.v1.load(directory)`` reads them. Replaces what is there."""
    from orbax.checkpoint import v1 as ocp

    out = pathlib.Path(directory).absolute()
    ocp.save(out, params, overwrite=True)
    return out


def check_base(expected: Base, found: Base, where: str) -> None:
    """Raises a CheckpointError that names both bases unless their content is the same."""
    if expected.hash != found.hash:
        raise CheckpointError(
            f"{where}: this belongs to another model: it was made on {found.name} (content {found.hash[:12]}), the base loaded here is "
            f"{expected.name} (content {expected.hash[:12]}). Load the model it was trained on, with the same layout and dtype."
        )


def save_adapter(
    directory: os.PathLike[str] | str, adapters: Adapters, base: Base, extra: Mapping[str, Any] | None = None
) -> pathlib.Path:
    """Writes an adapter as a small directory: its leaves as safetensors, its plan as JSON. Equal adapters give equal bytes.

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

    def fill(folder: pathlib.Path) -> None:
        save_safetensors(folder / _WEIGHTS, flatten(_leaves(adapters)))
        (folder / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    write_directory(out, fill)
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
        record = json.loads(file.read_text())
        record["base"] = Base(**record["base"])
        fits = record["format"] == _FORMAT and isinstance(record["plan"], list)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: not readable ({error}); the file is damaged. Save the adapter again."
        ) from error
    if not fits:
        raise CheckpointError(f"{file}: format {record['format']}; this version reads {_FORMAT}.")
    return record


def load_adapter(directory: os.PathLike[str] | str, params: Any, base: Base | None = None) -> Adapters:
    """Reads what `save_adapter` wrote.

    Args:
      params: the model's parameters. base: their `base_reference`, to check that the adapter is theirs; None checks shapes only.

    Raises:
      FileNotFoundError: not an adapter directory.
      CheckpointError: an adapter of another model, or leaves that do not fit its plan. CorruptFileError: a damaged weight file.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"x": {"kernel": jnp.eye(4)}}
      >>> adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"x": lr.lora(rank=2)}))
      >>> import tempfile
      >>> where = save_adapter(pathlib.Path(tempfile.mkdtemp()) / "adapter", adapters, base_reference("eye", params))
      >>> load_adapter(where, params).plan.trainable
      16
    """
    from lowrank_jax.models.tensors import open_safetensors

    record = read_record(directory)
    if base is not None:
        check_base(base, record["base"], str(directory))
    plan = from_config(params, record["plan"])
    tensors = open_safetensors(pathlib.Path(directory) / _WEIGHTS)
    wanted = {f"sites/{e.site.path}/{name}": (*e.local.batch_shape, *leaf.shape) if e.site.kind != "param" else leaf.shape
              for e in plan.entries for name, leaf in e.leaves.items()}  # fmt: skip
    wanted |= {
        f"shared/{group}/{name}": leaf.shape
        for group, leaves in plan.shared_leaves.items()
        for name, leaf in leaves.items()
    }
    for name in sorted(set(wanted) ^ set(tensors)):
        problem = "is missing" if name in wanted else "belongs to nothing in its plan"
        raise CheckpointError(
            f"{directory}: leaf {name!r} {problem}; the directory was put together from different adapters."
        )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise CheckpointError(
                f"{directory}: leaf {name!r} has shape {tuple(tensors[name].shape)}, its plan says {tuple(shape)}."
            )
    read = lambda name: jnp.array(tensors[name].read())  # noqa: E731
    sites = {e.site.path: {n: read(f"sites/{e.site.path}/{n}") for n in e.leaves} for e in plan.entries}
    shared = {group: {n: read(f"shared/{group}/{n}") for n in leaves} for group, leaves in plan.shared_leaves.items()}
    return Adapters(sites, shared, plan)


class _NewestAndBest:
    """Orbax's preservation policy: the newest ``keep``, and the earliest of those with the highest score."""

    def __init__(self, keep: int):
        self._keep = keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        scored = [c for c in checkpoints if c.metrics and "score" in c.metrics]
        best = max(scored, key=lambda c: (c.metrics["score"], -c.step)).step if scored else None
        newest = sorted((c.step for c in checkpoints), reverse=True)[: self._keep]
        return [c.step in newest or c.step == best for c in checkpoints]


def _leaves(adapters: Adapters) -> dict[str, Any]:
    return {"sites": adapters.sites, "shared": adapters.shared}


def _detached(tree: Any) -> Any:
    """On a CPU the host's view of an array is the array itself, which a later step that donates it would write over."""
    return jax.tree.map(lambda x: jnp.copy(x) if next(iter(x.devices())).platform == "cpu" else x, tree)


def _digests(state: Mapping[str, Any]) -> dict[str, str]:
    """A hash of every part whose arrays this process can see in full."""
    out = {}
    for name, part in state.items():
        leaves = flatten(part)
        if all(leaf.is_fully_addressable for leaf in leaves.values()):
            out[name] = tree_hash(leaves)
    return out


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _difference(saved: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """The first place where two plans differ, in words."""
    ours, theirs = {e["path"]: e for e in now}, {e["path"]: e for e in saved}
    for path in [*ours, *theirs]:
        a, b = theirs.get(path), ours.get(path)
        if a != b:
            words = [
                ("nothing" if e is None else f"{e['method']}({', '.join(f'{k}={v}' for k, v in e['config'].items())})")
                for e in (a, b)
            ]
            return f"it was made with another plan: at {path} it has {words[0]}, the plan here {words[1]}."
    return "it was made with another plan: the order of the sites differs."
