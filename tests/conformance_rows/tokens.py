"""Trained rows of embeddings and heads."""

from __future__ import annotations

import numpy as np
from conformance_models import VOCAB
from conformance_row import Config, Leaves, Row

import lowrank_jax as lr

TOKENS = (5, 1)


def _count(site: lr.Site, config: Config) -> int:
    return 2 * (site.n_out if site.kind == "embed" else site.n_in)


def _update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    update = np.zeros_like(kernel)
    for place, token in enumerate(TOKENS):
        if kernel.shape[-2] == VOCAB:  # the embedding, whose rows are the tokens'
            update[..., token, :] = p["rows"][..., place, :] - kernel[..., token, :]
        else:
            update[..., :, token] = p["rows"][..., place, :] - kernel[..., :, token]
    return update


ROWS = [
    Row("trainable_tokens", lambda: lr.trainable_tokens(TOKENS), _count, _update, lambda config: 2, init_tolerance=1e-6)
]
