"""TRAINABLE_TOKENS: some rows of embeddings, by their values."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from lowrank_jax.forms import UnsupportedError
from lowrank_jax.methods.trainable_tokens import trainable_tokens
from lowrank_jax.peft import fields
from lowrank_jax.peft.codecs.base import NAME, Arrays, Codec, Config, Item, Piece, Written
from lowrank_jax.peft.targets import write_targets
from lowrank_jax.plan import Entry


def assemble_rows(item: Item, rows: Sequence[int]) -> tuple[Entry, Arrays]:
    """The `trainable_tokens` of an embedding or a head, from the rows in a file."""
    item.check("trainable_tokens_delta")
    site = item.site
    if site.kind not in ("embed", "dense") or site.batch or not rows:
        raise item.refuse("cannot have trained rows: expected an embedding or a head, and at least one row.")
    vocabulary, width = (site.n_in, site.n_out) if site.kind == "embed" else (site.n_out, site.n_in)
    if max(rows) >= vocabulary:
        raise item.refuse(f"has {vocabulary} rows, but row {max(rows)} was trained; resize the embedding first.")
    values = item.take("trainable_tokens_delta", (len(rows), width), f" with {len(rows)} trained rows")
    return Entry(site, trainable_tokens(tuple(rows))), {"rows": values}


def rows_of(piece: Piece) -> tuple[str, np.ndarray]:
    """The module's name and its trained rows ``[k, n]``."""
    if len(piece.units) != 1 or piece.entry.site.batch:
        raise UnsupportedError(
            f"{piece.entry.site.path}: rows of a stack cannot be written; merge it (lowrank_jax.merge)."
        )
    return piece.units[0].name, np.asarray(piece.leaves["rows"])


def _write(pieces: Sequence[Piece], known: Collection[str] | None) -> Written:
    rows = {dict(piece.entry.method.config)["token_indices"]: piece.entry.site.path for piece in pieces}
    if len(rows) != 1:
        raise UnsupportedError(
            f"{' and '.join(rows.values())} train different rows, but the format has one list for all. Save them beside a "
            "LoRA, which has one for each."
        )
    modules = {name: {"trainable_tokens_delta": values} for name, values in map(rows_of, pieces)}
    targets = list(modules)
    config = {
        "init_weights": True,
        "target_modules": write_targets(targets, known),
        "token_indices": list(next(iter(rows))),
    }
    return Written(modules, config)


def _read(items: Sequence[Item], config: Config) -> tuple[Entry, Arrays]:
    (item,) = items
    return assemble_rows(item, config["token_indices"])


TRAINABLE_TOKENS = Codec(
    "TRAINABLE_TOKENS",
    parts={"trainable_tokens_delta": rf"trainable_tokens_delta{NAME}"},
    fields={"token_indices": fields.Field([], fields.indices, "a list of different rows")},
    holds=lambda entry: entry.method.name == "trainable_tokens",
    native=True,
    saves_modules=False,
    read=_read,
    write=_write,
)
