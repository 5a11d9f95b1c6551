"""IA3: every activation behind or in front of a weight multiplied by a learned number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax.checks import check_choice
from lowrank_jax.forms import InputRescale, Leaf, Rescale
from lowrank_jax.methods.base import Context, Given, Leaves, Method, method
from lowrank_jax.sites import Site


@method
def ia3(side: Literal["output", "input"] = "output") -> Method:
    """IA3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (arXiv 2205.05638).

    ``y = (x K + bias) * l`` with ``l [n_out]`` trained, ones at first; with ``side="input"`` ``y = (x * l) K + bias`` with ``l [n_in]``,
    for a convolution ``[n_channels]``. For a few dozen examples, where anything larger overfits; it merges into weight and bias, and
    the product with the weight is the only one, forward and backward.
    Count: ``n_out``, or ``n_in`` (``n_channels``).

    The paper puts ``l`` on keys, values and the inner activations of the MLP: ``output`` at the key and value projections and ``input`` at
    the MLP's second weight. As in PEFT, the bias is scaled with the output; PEFT calls ``input`` sites ``feedforward_modules``.

    Args:
      side: what is multiplied: ``output`` or ``input`` of the weight.

    Raises:
      ValueError: an unknown side.

    Example:
      >>> ia3(side="input").form.__name__
      'InputRescale'
    """
    check_choice("ia3", "side", side, ("output", "input"))
    form = Rescale if side == "output" else InputRescale

    def leaves(site: Site) -> dict[str, Leaf]:
        size, axis = (site.n_out, "out") if side == "output" else (site.n_in, "in")
        if side == "input" and site.kind == "conv":
            size, axis = site.shape[site.inputs[-1]], "channel"
        # Float32 whatever the adapter is stored in: in bfloat16 the step from 1 to the next number is 0.8%.
        return {"l": Leaf((size,), (axis,), dtype=jnp.float32)}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        return {"l": jnp.ones((*site.batch_shape, *leaves(site)["l"].shape))}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Rescale | InputRescale:
        return form(leaves["l"] - 1)

    return Method(form, leaves, init, expand, exact_init=side == "output")
