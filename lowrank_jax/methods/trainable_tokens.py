"""Trainable tokens: a few rows of an embedding, trained as they are."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.forms import Leaf, Rows
from lowrank_jax.methods.base import Context, Given, Leaves, Method, method
from lowrank_jax.sites import Site


@method
def trainable_tokens(token_indices: tuple[int, ...]) -> Method:
    """Trains the vectors of some tokens and leaves the rest of the vocabulary alone; the method of this name in PEFT, without a paper.

    ``rows [k, n]`` starts as the weight's own rows ``token_indices`` and takes their place: rows of an embedding ``[n_in, n_out]``, looked
    up and, where the head is tied to it, attended to; columns of a head ``[n_in, n_out]`` that is a weight of its own. Use it beside LoRA
    when special tokens are new, or mean something new.
    Count: ``k * n``, where n is the width of the model.

    Because the values themselves are kept, not what is added, the rows mean the same on a base whose own rows for new tokens were drawn
    anew.

    Args:
      token_indices: ids of the k tokens, all different.

    Raises:
      ValueError: no token, one twice, a negative one, or (at a site) one beyond the vocabulary.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"embed": {"embedding": jnp.ones((10, 4))}}
      >>> lr.plan(params, {"embed": trainable_tokens((3, 7))}).trainable
      8
    """
    indices = token_indices
    if not indices or min(indices) < 0 or len(set(indices)) != len(indices):
        raise ValueError(f"trainable_tokens(token_indices={indices}): expected ids of different tokens, 0 or more.")

    def leaves(site: Site) -> dict[str, Leaf]:
        vocabulary, axis = (site.n_in, "out") if site.kind == "embed" else (site.n_out, "in")
        if max(indices) >= vocabulary:
            raise ValueError(
                f"trainable_tokens at {site.path}: token {max(indices)} is beyond its {vocabulary} rows. Leave it out, or resize the "
                "embedding first."
            )
        width = site.n_out if site.kind == "embed" else site.n_in
        return {"rows": Leaf((len(indices), width), ("token", axis))}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        kernel = given.need("kernel")
        table = kernel if site.kind == "embed" else jnp.swapaxes(kernel, -1, -2)
        return {"rows": table[..., np.asarray(indices), :]}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Rows:
        numbers = jnp.broadcast_to(jnp.asarray(indices, jnp.int32) + 1, (*site.batch_shape, len(indices)))
        return Rows(leaves["rows"], numbers, side="in" if site.kind == "embed" else "out")

    # What is added is zero at first, but where rows of the output are adapted XLA may multiply in another order.
    return Method(Rows, leaves, init, expand, exact_init=False, needs=frozenset({"kernel"}))
