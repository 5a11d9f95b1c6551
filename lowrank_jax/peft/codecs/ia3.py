"""IA3: factors of outputs, or of inputs where a module is one of ``feedforward_modules``."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

from lowrank_jax.forms import UnsupportedError
from lowrank_jax.methods.ia3 import ia3
from lowrank_jax.peft import fields
from lowrank_jax.peft.codecs.base import NAME, Arrays, Codec, Config, Item, Piece, Written
from lowrank_jax.peft.targets import write_targets
from lowrank_jax.peft.tensors import is_matrix_or_image, vector_shape
from lowrank_jax.peft.units import flat, stack
from lowrank_jax.plan import Entry
from lowrank_jax.sites import Site


def _shape(site: Site, side: str) -> tuple[int, ...]:
    if site.kind == "conv":
        return vector_shape(site, site.shape[site.inputs[-1]] if side == "input" else site.n_out)
    return (1, site.n_in) if side == "input" else (site.n_out, 1)


def _side(module: str, config: Config) -> Literal["output", "input"]:
    """PEFT compares the ends of names, not of words."""
    chosen = config["feedforward_modules"]
    found = re.fullmatch(chosen, module) if isinstance(chosen, str) else any(map(module.endswith, chosen))
    return "input" if found else "output"


def _read(items: Sequence[Item], config: Config) -> tuple[Entry, Arrays]:
    site = items[0].site
    if site.kind not in ("dense", "conv"):
        raise items[0].refuse("is neither a matrix nor a convolution, which is all that IA3 scales.")
    if config["feedforward_modules"] is None:
        raise items[0].refuse(
            "may be scaled at either side: the configuration lacks feedforward_modules, which PEFT always writes."
        )
    sides = {_side(item.module, config): item for item in items}
    if len(sides) > 1:
        raise items[0].refuse(
            "is scaled at its input in some layers and at its output in others; load it on a model whose "
            "layers are not scanned."
        )
    ((side, _),) = sides.items()
    found = {}
    for item in items:
        item.check("ia3_l")
        found[item.unit.elements[0]] = {"l": item.take("ia3_l", _shape(site, side)).reshape(-1)}
    layers, leaves = stack(site, found, fill=1.0)
    return Entry(site, ia3(side=side), layers), leaves


def _write(pieces: Sequence[Piece], known: Collection[str] | None) -> Written:
    modules: dict[str, Arrays] = {}
    sides: dict[str, list[str]] = {"input": [], "output": []}
    for piece in pieces:
        site, side = piece.entry.site, dict(piece.entry.method.config)["side"]
        if not is_matrix_or_image(site, 3):
            raise UnsupportedError(
                f"{site.path}: PEFT's IA3 has matrices and convolutions over 2 or 3 axes only; merge it (lowrank_jax.merge)."
            )
        factors = flat(piece.leaves["l"], piece.entry)
        for name, place in piece.modules():
            modules[name] = {"ia3_l": factors[place].reshape(_shape(site, side))}
            sides[side].append(name)
    targets, feedforward = _selectors(sides["output"], sides["input"], known)
    config = {
        "fan_in_fan_out": False,
        "feedforward_modules": feedforward,
        "init_ia3_weights": True,
        "target_modules": targets,
    }
    return Written(modules, config)


def _selectors(outputs: list[str], inputs: list[str], known: Collection[str] | None) -> tuple[Any, Any]:
    """``target_modules`` and ``feedforward_modules``: two lists of which one holds the other, as PEFT wants them, or two expressions."""
    one, two = (write_targets(of, known) if of else [] for of in (outputs, inputs))
    # An ending that means one module to `target_modules` may mean more to `feedforward_modules`.
    strays = any(name.endswith(end) for name in outputs for end in two)
    if strays or isinstance(one, str) or isinstance(two, str):
        return tuple("|".join(re.escape(name) for name in sorted(of)) for of in (outputs + inputs, inputs))  # type: ignore[return-value]
    return sorted({*one, *two}), two


IA3 = Codec(
    "IA3",
    parts={"ia3_l": rf"ia3_l{NAME}"},
    fields={"feedforward_modules": fields.SELECTOR},
    silent=frozenset({"init_ia3_weights"}),
    holds=lambda entry: entry.method.name == "ia3",
    native=True,
    read=_read,
    write=_write,
)
