"""Several processes that train one model together: how they find each other, and how they stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from lowrank_jax.hosts import leads, wait

# JAX itself reads the first only.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
STOPPED = 128 + signal.SIGTERM  # the exit status that schedulers take for a job to be started again


class Stopped(SystemExit):
    """The run was asked to stop by SIGTERM and has saved where it is; the exit status is 143."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


def start() -> None:
    """Joins the other processes, before JAX is used for anything else; does nothing where there are none.

    They are found by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by JAX where it knows
    the cluster: Cloud TPU, SLURM, Open MPI, Kubernetes. JAX_NUM_PROCESSES=1 keeps a process by itself.

    Raises:
      ValueError: some of the variables are missing or no numbers. RuntimeError: the others did not come.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    count, index = (_number(given, name) for name in VARIABLES[1:])
    if count == 1:
        return
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except ValueError as error:
        if not given and "coordinator_address" in str(error):
            return  # no cluster that JAX knows
        missing = [name for name in VARIABLES if name not in given]
        what = f"{', '.join(missing)} not set" if missing else " ".join(f"{k}={v}" for k, v in given.items())
        raise ValueError(
            f"{what}: {error} Expected {VARIABLES[0]}=host:port of process 0, {VARIABLES[1]}, and {VARIABLES[2]} from 0; or none of them, "
            "on one machine or where JAX knows the cluster (Cloud TPU, srun of SLURM)."
        ) from error
    # Python ends by waiting for all processes, and those that wait for this one would wait for ever.
    sys.excepthook = _leave_after(sys.excepthook)


def leave(status: int) -> None:
    """Ends this process because of an error; the others, which need it, then end too."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def one_first(name: str) -> Iterator[None]:
    """Process 0 goes through the block, then the others: what it leaves on a disk that they share they find there."""
    if not leads():
        wait(name)
    yield
    if leads():
        wait(name)


class Termination:
    """Notices SIGTERM, which announces that this machine will be taken away. A context manager.

    Example:
      >>> with Termination() as termination:
      ...     signal.raise_signal(signal.SIGTERM)
      ...     termination.asked(step=7)
      True
    """

    def __init__(self) -> None:
        self._noticed = False
        self._alone = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Termination:
        if self._alone:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def asked(self, step: int) -> bool:
        """Whether to stop now. Every process asks after every step and gets the same answer, whichever got the signal."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noticed

    def _notice(self, number: int, frame: types.FrameType | None) -> None:
        self._noticed = True


def _number(given: dict[str, str], name: str) -> int | None:
    if name not in given:
        return None
    try:
        return int(given[name])
    except ValueError as error:
        raise ValueError(f"{name}={given[name]!r}: expected a whole number.") from error


def _leave_after(hook: Any) -> Any:
    def report(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        hook(kind, error, trace)
        if isinstance(error, jax.errors.JaxRuntimeError):
            print(
                "If another process is gone, the same command on all of them goes on from the newest checkpoint.",
                file=sys.stderr,
            )
        leave(1)

    return report
