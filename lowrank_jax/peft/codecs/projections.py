"""What types have in common whose random matrices are made by torch's generator: they are read, never made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_jax.forms import UnsupportedError
from lowrank_jax.models.tensors import LazyTensor
from lowrank_jax.peft.codecs.base import Item, Piece, take
from lowrank_jax.peft.fields import PeftFormatError

SILENT = frozenset({"projection_prng_key", "save_projection"})


def check_matrix(item: Item) -> None:
    """Raises a PeftFormatError unless the weight is a matrix, all that PEFT adapts in this way."""
    if item.site.kind != "dense":
        raise item.refuse("is not a matrix, which is all that PEFT adapts in this way.")


def stored(tensors: Mapping[str, LazyTensor], name: str, least: tuple[int, ...]) -> np.ndarray:
    """The corner ``least`` of a random matrix of the file.

    Raises:
      PeftFormatError: it is not there, or is smaller.
    """
    if name not in tensors:
        raise PeftFormatError(
            f"the adapter has no {name}: its random matrices come from torch's generator, which cannot be run here. Save it again with "
            "PEFT and save_projection=True."
        )
    shape = tensors[name].shape
    if len(shape) != len(least) or any(has < needs for has, needs in zip(shape, least, strict=True)):
        raise PeftFormatError(f"{tensors[name].file}: {name} has shape {shape}; expected at least {least}.")
    return take(tensors[name], name, shape, "all modules")[tuple(map(slice, least))]


def one_method(pieces: Sequence[Piece]) -> Mapping[str, Any]:
    """The fields of the one method that all pieces have; an UnsupportedError where there are two, or weights that are no matrices."""
    methods = {str(piece.entry.method): piece.entry for piece in pieces}
    if len(methods) > 1:
        raise UnsupportedError(
            f"{' and '.join(e.site.path for e in methods.values())} have methods of their own, but in PEFT all modules share one pair of "
            "random matrices. Save them as LORA."
        )
    for piece in pieces:
        if piece.entry.site.kind != "dense":
            raise UnsupportedError(
                f"{piece.entry.site.path} is not a matrix, which is all that PEFT adapts in this way. Save it as LORA."
            )
    return dict(pieces[0].entry.method.config)
