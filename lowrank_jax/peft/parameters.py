"""Which tensors belong to which parameter of a module: PEFT wraps a module once for each, the first innermost, and names none of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lowrank_jax.peft.fields import PeftFormatError
from lowrank_jax.peft.targets import selects_parameter
from lowrank_jax.peft.units import Parameter, Unit

if TYPE_CHECKING:
    from lowrank_jax.peft.keys import Contents

_WRAP = ".base_layer"


def nested(parameters: Iterable[Parameter]) -> dict[str, str]:
    """``{module.parameter: the module that its tensors stand below}`` of all parameters that are adapted.

    Raises:
      ValueError: two parameters at one position of a module.

    Example:
      >>> nested([Parameter("experts", "up", 0), Parameter("experts", "down", 1)])
      {'experts.up': 'experts.base_layer', 'experts.down': 'experts'}
    """
    found = sorted(set(parameters), key=lambda p: (p.module, p.position))
    for one, two in zip(found, found[1:], strict=False):
        if (one.module, one.position) == (two.module, two.position):
            raise ValueError(
                f"{one.module}: {one.name} and {two.name} both have position={one.position}; give their order in "
                "the module."
            )
    order = [p.module for p in found]
    return {
        f"{p.module}.{p.name}": p.module + _WRAP * order[n + 1 :].count(p.module)  # as many as are wrapped after it
        for n, p in enumerate(found)
    }


def name_parameters(contents: Contents, units: Iterable[Unit], config: Mapping[str, Any], file: Any) -> None:
    """Gives the tensors of parameters the name of theirs, ``module.parameter``, in place.

    Raises:
      PeftFormatError: another number of tensors than ``target_parameters`` names parameters.
    """
    chosen = [unit.parameter for unit in units if unit.parameter and selects_parameter(config, unit.name)]
    where = nested(chosen)
    for module in sorted({parameter.module for parameter in chosen}):
        expected = {name: contents.alias(place) for name, place in where.items() if name.rpartition(".")[0] == module}
        held = [place for place in contents.adapted if place.split(_WRAP)[0] == contents.alias(module)]
        if sorted(held) != sorted(expected.values()):
            raise PeftFormatError(
                f"{file}: target_parameters names {len(expected)} parameter(s) of {module!r}, but the file has tensors of {len(held)}; "
                "is the file complete, and does name_map have a Parameter for each?"
            )
        # Taken out first: a module's own name is where one of them stands.
        tensors = {name: contents.adapted.pop(place) for name, place in expected.items()}
        spelled = {name: contents.names.pop(place) for name, place in expected.items()}
        for name, of in tensors.items():
            key = contents.alias(name)
            contents.adapted[key] = of
            contents.names[key] = f"{spelled[name].split(_WRAP)[0]}.{name.rpartition('.')[2]}"
