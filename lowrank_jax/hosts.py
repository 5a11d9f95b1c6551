"""What several processes of one program do together: bring an array to all of them, write once, wait for each other."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np

_barriers = itertools.count()


def on_host(x: Any) -> np.ndarray:
    """A whole array on this host, wherever its parts lie. Where others hold parts of it, all processes have to call.

    Args:
      x: a NumPy array, or a JAX array of any sharding.

    Example:
      >>> on_host(jax.numpy.arange(3)).tolist()
      [0, 1, 2]
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def leads() -> bool:
    """Whether this is process 0, the one that writes.

    Example:
      >>> leads()
      True
    """
    return jax.process_index() == 0


def wait(name: str, seconds: int = 24 * 3600) -> None:
    """Returns when every process has called it as often as this one; at once where there is one process.

    It goes through the coordination service, not the devices: their collectives may give up on a process that is a minute late.

    Args:
      name: for error messages.

    Raises:
      RuntimeError: a process is gone, or not there after ``seconds``.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=f"lowrank_jax {next(_barriers)} {name}", timeout_ms=1000 * seconds)
