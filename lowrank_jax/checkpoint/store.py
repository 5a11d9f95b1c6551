"""Steps of a run on the disk: named trees of arrays with a record, by Orbax. The only file that knows Orbax."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.checkpoint.checksum import checksum
from lowrank_jax.checkpoint.reference import CheckpointError
from lowrank_jax.files import StorageError, fault
from lowrank_jax.sites import flatten


class Store:
    """The checkpoints of one run in a directory: the newest few and the best. A context manager.

    A checkpoint is visible when it is complete and never before; what a killed process left behind is removed. Several processes make the
    same calls on a directory that they share; what they saved may be restored by any number of them, into other shardings.

    Args:
      directory: where; made if it does not exist.
      keep: how many of the newest are kept; the one with the highest score is kept beside them.

    Example:
      >>> import tempfile
      >>> with Store(tempfile.mkdtemp()) as store:
      ...     store.save(7, {"weights": {"w": jnp.ones(2)}}, {"note": "hello"})
      ...     store.wait()
      ...     about, trees = store.about(7), store.restore(7, {"weights": {"w": jnp.zeros(2)}})
      >>> about["note"], trees["weights"]["w"].tolist()
      ('hello', [1.0, 1.0])
    """

    def __init__(self, directory: os.PathLike[str] | str, keep: int = 2):
        from orbax.checkpoint import v1 as ocp

        self.directory = pathlib.Path(directory).absolute()
        self._manager = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.ContinuousCheckpointingPolicy(),
            preservation_policy=_NewestAndBest(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if kind is None:
            self.close()
        elif jax.process_count() == 1:  # what is being saved needs all processes, and the error may be that one is gone
            with contextlib.suppress(
                StorageError
            ):  # a disk that fails fails everything: the first error is the one to be seen
                self.close()

    def close(self) -> None:
        """Waits for what is being saved, and lets the directory go.

        Raises:
          StorageError: as `wait`.
        """
        with self._storing():
            self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._manager.checkpoints]

    def save(self, step: int, trees: Mapping[str, Any], about: Mapping[str, Any], score: float | None = None) -> None:
        """Saves in the background; returns once the arrays are safe from being donated or changed.

        Args:
          trees: pytrees of arrays by name. about: JSON-able data.
          score: of an evaluation at this step, higher is better; None: not evaluated.

        Raises:
          StorageError: the disk is full or failing, now or while the checkpoint before was written.
        """
        state = _detached(dict(trees))
        metrics = None if score is None else {"score": float(score)}
        with self._storing():
            self._manager.save_checkpointables_async(step, state, force=True, overwrite=step in self.steps, metrics=metrics,
                                                     custom_metadata={**about, "checksums": _checksums(state)})  # fmt: skip

    def wait(self) -> None:
        """Waits until everything saved is on the disk.

        Raises:
          StorageError: the disk is full or failing.
        """
        with self._storing():
            self._manager.wait()

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        """The disk's errors as StorageErrors; they may be those of an earlier save, which is done in the background."""
        try:
            yield
        except (OSError, ValueError) as error:
            why = _fault(error)
            if why is None:
                raise
            steps = self.steps  # the one that failed is not among them any more
            rest = f"goes on from the newest that is complete, of step {steps[-1]}" if steps else "begins again"
            raise StorageError(
                f"{self.directory}: a checkpoint could not be written ({why}). Make room; the same command {rest}."
            ) from error

    def existing(self, step: int | None = None) -> int:
        """The step itself, or the newest for None.

        Raises:
          CheckpointError: there is no such checkpoint.
        """
        steps = self.steps
        if not steps or (step is not None and step not in steps):
            wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise CheckpointError(f"{self.directory}: {wanted}; there are {steps or 'none'}.")
        return steps[-1] if step is None else step

    def about(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of a step.

        Raises:
          CheckpointError: a damaged checkpoint.
        """
        try:
            about = self._manager.checkpointables_metadata(step).custom_metadata
        except Exception as error:  # Orbax and TensorStore raise errors of many types for a damaged file
            raise self._damaged(step, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}") from error
        if not isinstance(about, dict) or "checksums" not in about:
            raise self._damaged(step, "its metadata is missing")
        return about

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Reads trees of a step.

        Args:
          like: the trees wanted, for shapes, dtypes and shardings; others are left alone.

        Raises:
          CheckpointError: a damaged checkpoint: it cannot be read, or its content differs from what was saved.
        """
        saved = self.about(step)["checksums"]
        try:
            state = self._manager.load_checkpointables(step, jax.tree.map(_abstract, dict(like)))
        except Exception as error:  # as in `about`
            raise self._damaged(step, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}") from error
        for name, found in _checksums(state).items():
            if found != saved.get(name):
                raise self._damaged(step, f"the content of {name!r} is not what was saved")
        return state

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


class _NewestAndBest:
    """Orbax's preservation policy: the newest ``keep``, and the earliest of those with the highest score."""

    def __init__(self, keep: int):
        self._keep = keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        scored = [c for c in checkpoints if c.metrics and "score" in c.metrics]
        best = max(scored, key=lambda c: (c.metrics["score"], -c.step)).step if scored else None
        newest = sorted((c.step for c in checkpoints), reverse=True)[: self._keep]
        return [c.step in newest or c.step == best for c in checkpoints]


def _fault(error: OSError | ValueError) -> str | None:
    """What happened to the disk; None for an error of another kind."""
    if isinstance(error, TimeoutError):  # Orbax measures on the clock of the wall
        return "not in time; the disk is slow, or the clock was set forward"
    number = re.search(r"os_error_code='(\d+)'", str(error))  # in the text of TensorStore's ValueErrors
    return fault(int(number[1]) if number else getattr(error, "errno", None))


def _detached(tree: Any) -> Any:
    """On a CPU the host's view of an array is the array itself, which a later step that donates it would write over."""
    return jax.tree.map(lambda x: jnp.copy(x) if next(iter(x.devices())).platform == "cpu" else x, tree)


def _checksums(state: Mapping[str, Any]) -> dict[str, str]:
    return {name: checksum(flatten(part)) for name, part in state.items()}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
