"""Which mesh and which remat policy a run fits with: the compiler is asked for a few of each."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import ml_collections

from lowrank_jax.chips import Chip, chip
from lowrank_jax.memory import DoesNotFitError, topology_devices
from train import preview
from train.config import ConfigError

# From the one that computes nothing again to the one that does most.
POLICIES = ("none", "dots", "adapter", "full", "adapter_offload")
_TENSOR = (1, 2, 4, 8)


class Choice(NamedTuple):
    """A mesh and a policy.

    Attributes:
      sizes: of the mesh's axes. remat: the policy. needs: what the compiler says; None: it does not fit, see ``refused``.
      chip: None where it is not known.
    """

    sizes: dict[str, int]
    remat: str
    needs: preview.Needs | None
    refused: str = ""
    chip: Chip | None = None


def meshes(config: ml_collections.ConfigDict, chips: int, experts: int = 0) -> Iterator[dict[str, int]]:
    """Divisions of all chips that the batch allows: weights over 'fsdp' and a little 'tensor', or the whole model on each.

    The experts of a mixture, where the model has them, are either divided like other weights or dealt out over 'expert'.

    Example:
      >>> from train.config import base
      >>> config = base()
      >>> config.batch_size = 4
      >>> [{axis: size for axis, size in sizes.items() if size > 1} for sizes in meshes(config, 8)]
      [{'fsdp': 4, 'tensor': 2}, {'fsdp': 2, 'tensor': 4}, {'tensor': 8}]
    """
    dealt = math.gcd(experts, chips) if experts else 1
    for data, expert, tensor in itertools.product(dict.fromkeys((1, chips)), dict.fromkeys((1, dealt)), _TENSOR):
        fsdp, rest = divmod(chips, data * expert * tensor)
        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": expert}
        if fsdp and not rest and config.batch_size // config.accumulate % (chips // tensor) == 0:
            yield sizes


def search(
    config: ml_collections.ConfigDict,
    topology: str,
    length: int,
    total: int,
    labels: int,
    policies: Sequence[str] = POLICIES,
    on_try: Callable[[str], None] = lambda what: None,
) -> list[Choice]:
    """Every mesh with the first policy under which it fits; of those that fit with none, the last. The fastest by prediction stands first.

    Args:
      topology: as for `lowrank_jax.memory.topology_mesh`; all of its chips are used. length: tokens in a row.
      policies: tried in this order. on_try: told each attempt.

    Raises:
      ConfigError: the batch cannot be dealt out over so many chips.
    """
    chips = len(topology_devices(topology))
    experts = getattr(preview.abstract_model(config, labels).config, "num_local_experts", 0)
    found = []
    for sizes in meshes(config, chips, experts):
        for remat in policies:
            tried = _with(config, sizes, remat)
            on_try(f"{sizes} {remat}")
            mesh = preview.mesh(tried, topology)
            model = preview.abstract_model(tried, labels, mesh)
            plan = preview.make_plan(tried, model)
            try:
                needs = preview.needs(tried, model, plan, mesh, total, 0, length)
                choice = Choice(sizes, remat, needs, chip=chip(mesh.devices.flat[0]))
            except DoesNotFitError as error:
                choice = Choice(sizes, remat, None, str(error))
            if choice.needs is not None or remat == policies[-1]:
                found.append(choice)
                break
    if not found:
        raise ConfigError(
            f"config.batch_size={config.batch_size}: expected a multiple of the rows that {chips} chips take at a time, {chips} at best."
        )
    return sorted(found, key=_seconds)


def report(choices: Sequence[Choice], title: str, tokens: int) -> str:
    """The choices as a table; ``tokens`` in a batch."""
    rows = []
    for choice in choices:
        where = preview.shape(choice.sizes)
        if choice.needs is None:
            rows.append((where, f"not even {choice.remat}", *("-",) * len(preview.COLUMNS)))
        else:
            rows.append((where, choice.remat, *preview.cells(choice.needs, choice.chip, tokens)))
    return preview.text_table(title, ("mesh", "remat", *preview.COLUMNS), rows)


def _seconds(choice: Choice) -> tuple[bool, float, int]:
    """What is not predicted goes by its FLOPs, then by bytes sent."""
    if choice.needs is None:
        return True, math.inf, 0
    found = choice.needs.report
    return False, found.seconds if math.isfinite(found.seconds) else found.flops, found.peak


def _with(config: ml_collections.ConfigDict, sizes: dict[str, int], remat: str) -> ml_collections.ConfigDict:
    out = copy.deepcopy(config)
    out.mesh.update(sizes)
    out.model.remat = remat
    return out
