"""One file for each ``peft_type``: its fields and tensors, and the way from them to leaves and back."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_jax.forms import Dense, UnsupportedError
from lowrank_jax.peft.codecs.adalora import ADALORA
from lowrank_jax.peft.codecs.base import Codec
from lowrank_jax.peft.codecs.ia3 import IA3
from lowrank_jax.peft.codecs.lora import LORA
from lowrank_jax.peft.codecs.randlora import RANDLORA
from lowrank_jax.peft.codecs.trainable_tokens import TRAINABLE_TOKENS
from lowrank_jax.peft.codecs.vera import VERA
from lowrank_jax.plan import Entry

CODECS = {codec.peft_type: codec for codec in (TRAINABLE_TOKENS, IA3, LORA, ADALORA, RANDLORA, VERA)}


def choose(entries: Sequence[Entry], peft_type: str | None) -> Codec:
    """The codec that entries are written with.

    Args:
      peft_type: None takes the first in order that holds them all by default: low-rank updates of any method become LORA, which every
        reader of the format knows.

    Raises:
      ValueError: no such type. UnsupportedError: a weight that the type cannot hold; says why.
    """
    if peft_type is not None and peft_type not in CODECS:
        raise ValueError(f"peft_type={peft_type!r}: expected one of {', '.join(sorted(CODECS))}, or None.")
    rest = [entry for entry in entries if entry.method.form is not Dense]
    if not rest:
        raise UnsupportedError(
            "peft.save: the adapter has no low-rank update, only full weights; merge it and save the model."
        )
    offered = [
        codec for codec in CODECS.values() if codec.peft_type == peft_type or (peft_type is None and codec.native)
    ]
    for codec in offered:
        if all(map(codec.holds, rest)):
            return codec
    best = min(offered, key=lambda codec: sum(not codec.holds(entry) for entry in rest))
    entry = next(entry for entry in rest if not best.holds(entry))
    raise UnsupportedError(
        f"{entry.site.path}: {entry.method.name} cannot be written as {best.peft_type}. Convert it (lowrank_jax.to_lora), or merge it "
        "(lowrank_jax.merge) and save the model."
    )
