"""What the chips are capable of, for predictions of a step's time."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """One accelerator, as its maker's documentation has it.

    Attributes:
      flops: bfloat16 operations a second at most. clock: cycles a second of the matrix units: ``flops`` over their operations a cycle.
      links: bytes a second that it can send to other chips over all its links. memory: bytes.
    """

    flops: float
    clock: float
    links: float
    memory: float


# By jax.Device.device_kind. Operations a cycle: 131,072 on v5e; 262,144 on v4 and v5p; 524,288 on v6e.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "TPU v4": Chip(275e12, 1.05e9, 300e9, 32 * 2**30),
        "TPU v5 lite": Chip(197e12, 1.5e9, 200e9, 16 * 2**30),
        "TPU v5": Chip(459e12, 1.75e9, 600e9, 95 * 2**30),
        "TPU v6 lite": Chip(918e12, 1.75e9, 400e9, 32 * 2**30),
    }
)


def chip(device: Any) -> Chip | None:
    """The chip of a `jax.Device`, real or of a topology; None where it is not in the table, as a CPU.

    Example:
      >>> import jax
      >>> chip(jax.devices("cpu")[0])
    """
    return CHIPS.get(device.device_kind)
