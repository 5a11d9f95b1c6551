"""The checkpoints of a run that trains an adapter: they name its base and hold its plan, and refuse others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from lowrank_jax.adapters import Adapters
from lowrank_jax.checkpoint.reference import Base, CheckpointError, check_base, check_format, read_base
from lowrank_jax.checkpoint.store import Store
from lowrank_jax.plan import Plan

_FORMAT = 1


class Restored(NamedTuple):
    """A checkpoint read back: its step, the adapter, the optimizer's state (None if not asked for), and the caller's record."""

    step: int
    adapters: Adapters
    optimizer: Any
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in a directory, see `Store`. A context manager.

    Args:
      directory, keep: see `Store`. base, plan: what the run trains; every checkpoint has to agree.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile
      >>> import lowrank_jax as lr
      >>> from lowrank_jax.checkpoint import base_reference
      >>> params = {"x": {"kernel": jnp.eye(4)}}
      >>> plan = lr.plan(params, {"x": lr.lora(rank=2)})
      >>> adapters = lr.init(jax.random.key(0), params, plan)
      >>> with Checkpoints(tempfile.mkdtemp(), base_reference("eye", params), plan) as checkpoints:
      ...     checkpoints.save(7, adapters, optimizer={"count": jnp.ones(())}, record={"note": "hello"})
      ...     checkpoints.wait()
      ...     restored = checkpoints.restore(adapters, {"count": jnp.zeros(())})
      >>> restored.step, restored.record["note"], float(restored.optimizer["count"])
      (7, 'hello', 1.0)
    """

    def __init__(self, directory: os.PathLike[str] | str, base: Base, plan: Plan, keep: int = 2):
        self._store, self._base, self._plan = Store(directory, keep), base, plan
        self.directory = self._store.directory

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._store.__exit__(*exc_info)

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return self._store.steps

    def save(
        self, step: int, adapters: Adapters, optimizer: Any, record: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Saves in the background; returns once the arrays are safe from being donated or changed.

        Args:
          adapters: the whole adapter (`lowrank_jax.join`). optimizer: a pytree of arrays. record: JSON-able data.
          score: of an evaluation at this step, higher is better; None: not evaluated.
        """
        about = {
            "format": _FORMAT, "base": self._base._asdict(), "plan": self._plan.to_config(), "record": dict(record),
        }  # fmt: skip
        self._store.save(step, {"adapters": _leaves(adapters), "optimizer": optimizer}, about, score)

    def wait(self) -> None:
        """Waits until everything saved is on the disk."""
        self._store.wait()

    def record(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the arrays of a step (None: the newest), after checking base and plan.

        Raises:
          CheckpointError: no such checkpoint, a damaged one, or one of another base or plan.
        """
        return self._about(self._store.existing(step))["record"]

    def restore(self, adapters: Adapters, optimizer: Any = None, step: int | None = None) -> Restored:
        """Reads a checkpoint.

        Args:
          adapters: an adapter of the run's plan, for shapes and shardings. optimizer: likewise the optimizer's state; None leaves it out.
          step: None takes the newest.

        Raises:
          CheckpointError: as `record`, or its content differs from what was saved.
        """
        step = self._store.existing(step)
        about = self._about(step)
        like: dict[str, Any] = {"adapters": _leaves(adapters)} | ({} if optimizer is None else {"optimizer": optimizer})
        state = self._store.restore(step, like)
        whole = adapters.replace(sites=state["adapters"]["sites"], shared=state["adapters"]["shared"])  # type: ignore[attr-defined]
        return Restored(step, whole, state.get("optimizer"), about["record"])

    def _about(self, step: int) -> dict[str, Any]:
        about, where = self._store.about(step), f"{self.directory}, step {step}"
        check_format(about.get("format"), _FORMAT, where)
        check_base(self._base, read_base(about.get("base"), where), where)
        plan = _plain(self._plan.to_config())
        if about.get("plan") != plan:
            raise CheckpointError(
                f"{where}: {_difference(about.get('plan'), plan)} Restore the plan, or choose another workdir."
            )
        if not isinstance(about.get("record"), dict):
            raise CheckpointError(
                f"{where}: its record is missing; it is damaged. Remove it to go on from the one before."
            )
        return about


def _leaves(adapters: Adapters) -> dict[str, Any]:
    return {"sites": adapters.sites, "shared": adapters.shared}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _difference(saved: Any, now: list[dict[str, Any]]) -> str:
    """The first place where two plans differ, in words."""
    if not isinstance(saved, list) or not all(isinstance(e, dict) and isinstance(e.get("config"), dict) for e in saved):
        return "its plan is damaged."
    ours, theirs = {e["path"]: e for e in now}, {str(e.get("path")): e for e in saved}
    for path in [*ours, *theirs]:
        a, b = theirs.get(path), ours.get(path)
        if a != b:
            words = [
                (
                    "nothing"
                    if e is None
                    else f"{e.get('method')}({', '.join(f'{k}={v}' for k, v in e['config'].items())})"
                )
                for e in (a, b)
            ]
            return f"it was made with another plan: at {path} it has {words[0]}, the plan here {words[1]}."
    return "it was made with another plan: the order of the sites differs."
