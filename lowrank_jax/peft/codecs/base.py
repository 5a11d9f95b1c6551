"""What a codec is: one ``peft_type``, its fields and tensors, and the way from them to leaves and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lowrank_jax.forms import Form, UnsupportedError
from lowrank_jax.models.tensors import LazyTensor
from lowrank_jax.peft.fields import Field, PeftFormatError
from lowrank_jax.peft.units import Unit, adapted
from lowrank_jax.plan import Entry
from lowrank_jax.sites import Site

Config = Mapping[str, Any]
Arrays = dict[str, np.ndarray]
NAME = r"(?:\.[^.]+)?"  # the adapter's name, which PEFT takes out of a tensor's, but others leave in


class Item(NamedTuple):
    """The tensors that a file has for one unit.

    Attributes:
      site: of our weight. unit: the part of it. module: the name as the file spells it. tensors: by the names of the codec's ``parts``.
    """

    site: Site
    unit: Unit
    module: str
    tensors: Mapping[str, LazyTensor]

    def check(self, *parts: str) -> None:
        """Raises a PeftFormatError unless just these tensors are there."""
        if set(self.tensors) != set(parts):
            raise PeftFormatError(
                f"{self.module}: the adapter holds {sorted(self.tensors)} for {self.site.path}; expected {' and '.join(parts)}."
            )

    def take(self, part: str, shape: tuple[int, ...], what: str = "") -> np.ndarray:
        """Reads one tensor; a PeftFormatError if it is of another shape."""
        return take(self.tensors[part], f"{self.module}.{part}", shape, self.site.path + what)

    def refuse(self, why: str) -> PeftFormatError:
        """The error for what the weight cannot take."""
        return PeftFormatError(f"{self.module}: {self.site.path} {why}")


class Piece(NamedTuple):
    """One adapted weight on its way into a file.

    Attributes:
      units: the modules of the other model. leaves: of its method; shared: those common to the method's sites.
      form: makes the form of both, of the whole stack; asked for only where it is needed, because frozen random matrices are large.
    """

    entry: Entry
    units: tuple[Unit, ...]
    leaves: Mapping[str, Any]
    shared: Mapping[str, Any]
    form: Callable[[], Form]

    def modules(self) -> Iterator[tuple[str, int]]:
        """The modules that are adapted, and the place of each among the leaves (see `units.flat`).

        Raises:
          UnsupportedError: one of them is a module's parameter.
        """
        where = adapted(self.entry)
        for unit in self.units:
            if unit.parameter is not None:
                raise UnsupportedError(
                    f"{self.entry.site.path}: {unit.name} is a parameter, which PEFT adapts by LoRA only."
                )
            if unit.elements[0] in where:
                yield unit.name, where[unit.elements[0]]


class Written(NamedTuple):
    """What a codec makes of adapters.

    Attributes:
      modules: ``{module: {tensor below it: array}}``. fields: of the configuration. common: tensors that belong to no module.
    """

    modules: dict[str, Arrays]
    fields: dict[str, Any]
    common: Mapping[str, np.ndarray] = MappingProxyType({})


@dataclass(frozen=True)
class Codec:
    """One ``peft_type``.

    Attributes:
      parts: ``{name: regular expression}`` of the tensors below a module; common: names of those that belong to no module.
      fields: what is honoured. refused: ``{field: why}``, fields that change what the tensors mean. silent: fields without effect.
      holds: whether it can write an entry as it is. native: whether it is what such entries are written as by default.
      write: ``(pieces, known modules) -> Written``. read: ``(items of one weight, config, common tensors) -> entry and leaves``.
      saves_modules: whether whole modules may stand beside it in ``modules_to_save``.
      read_common: ``(config, common tensors, entries) -> leaves`` shared by all sites, or None.
    """

    peft_type: str
    parts: Mapping[str, str]
    fields: Mapping[str, Field]
    holds: Callable[[Entry], bool]
    write: Callable[[Sequence[Piece], Any], Written]
    read: Callable[[Sequence[Item], Config], tuple[Entry, Arrays]]
    common: frozenset[str] = frozenset()
    read_common: Callable[[Config, Mapping[str, LazyTensor], Sequence[Entry]], Arrays] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    silent: frozenset[str] = frozenset()
    native: bool = False
    saves_modules: bool = True
    check: Callable[[Any, Config], None] = lambda file, config: None


def take(tensor: LazyTensor, name: str, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Reads one tensor.

    Raises:
      PeftFormatError: another shape, or no floating point.
    """
    if tensor.shape != shape:
        raise PeftFormatError(f"{tensor.file}: {name} has shape {tensor.shape}; expected {shape} for {what}.")
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise PeftFormatError(f"{tensor.file}: {name} has type {tensor.dtype}; expected floating point.")
    return tensor.read()
