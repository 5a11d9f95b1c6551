"""FLoRA: a Tucker update, which keeps the axes of a kernel apart."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lowrank_jax.forms import Leaf, Tucker
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_dropout, check_rank, method, scaling
from lowrank_jax.sites import Site


@method
def flora(
    rank: int = 16, out_rank: int | None = None, window_rank: int = 2, scale: float = 4.0, dropout: float = 0.0
) -> Method:
    """FLoRA: Low-Rank Core Space for N-dimension (arXiv 2405.14739).

    The update of a convolution's kernel ``[k_1, ..., n_in, n_out]`` is a Tucker product ``s * G x_1 U_1 ... x_in U_in x_out U_out``: a core
    ``G [r_1, ..., r_in, r_out]`` and a matrix ``U_i [dim_i, r_i]`` for each axis, all trained. A dense weight has two axes:
    ``s * U_in G U_out^T``. For convolutions of any rank: LoRA flattens the window into the channels and pays
    ``r * (k_1 k_2 n_in + n_out)`` for it. ``G`` starts at zero, and until it has moved, at the second step, nothing else gets a gradient.
    Count: ``prod(r_i) + sum(dim_i r_i)``.

    Args:
      rank: of the input channels. out_rank: of the output channels; None: the same.
      window_rank: of each axis of a convolution's window, at most the window's size.
      scale: s, a plain factor that is not divided by a rank. dropout: on the input of this path, during training.

    Raises:
      ValueError: a rank below 1, or (at a site) rank above its channels or outputs, out_rank above its outputs.

    Example:
      >>> flora(rank=4).form.record.low_rank
      True
    """
    check_dropout("flora", dropout)
    for r in (rank, window_rank) if out_rank is None else (rank, window_rank, out_rank):
        scaling(r, None)  # raises for a rank below 1

    def modes(site: Site) -> dict[str, tuple[int, int]]:
        """Size and rank of each axis: those of the window, the input's, the output's."""
        sizes = [site.shape[a] for a in site.inputs] if site.kind == "conv" else [site.n_in]
        window = {f"in{n}": (size, min(window_rank, size)) for n, size in enumerate(sizes[:-1])}
        return window | {f"in{len(window)}": (sizes[-1], rank), "out": (site.n_out, out_rank or rank)}

    def leaves(site: Site) -> dict[str, Leaf]:
        axes = modes(site)
        channels = axes[f"in{len(axes) - 2}"][0]
        check_rank("flora", rank, site, min(channels, site.n_out))
        check_rank("flora", out_rank or rank, site, site.n_out)
        # Roles are for canonical axes; a convolution's single axes are not sharded.
        role = {"out": "out"} | ({"in0": "in"} if len(axes) == 2 else {})
        kept = {name: Leaf(shape, (role.get(name, ""), "rank")) for name, shape in axes.items()}
        return {"core": Leaf(tuple(r for _, r in axes.values()), ("rank",) * len(axes))} | kept

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        core, *matrices = ((name, (*site.batch_shape, *leaf.shape)) for name, leaf in leaves(site).items())
        made = {core[0]: jnp.zeros(core[1])}
        for n, (name, shape) in enumerate(matrices):
            # Kaiming's normal init with a = sqrt(3), where the rank is the fan-in.
            made[name] = math.sqrt(0.5 / shape[-1]) * jax.random.normal(jax.random.fold_in(key, n), shape)
        return made

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Tucker:
        inputs = tuple(leaves[name] for name in modes(site) if name != "out")
        return Tucker(leaves["core"], inputs, leaves["out"], scale=scale, dropout=dropout)

    return Method(Tucker, leaves, init, expand)
