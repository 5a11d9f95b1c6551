"""Conformer adapters: bottlenecks with a depthwise convolution over time, for audio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank_jax.checks import check_choice
from lowrank_jax.forms import ConformerBottleneck, Leaf
from lowrank_jax.methods.base import Context, Given, Leaves, Method, check_dropout, method, random_a
from lowrank_jax.methods.bottleneck_leaves import bottleneck_leaves, check_width, factors, width_at, zero_up
from lowrank_jax.sites import Site


@method
def conformer_adapter(
    width: int | None = None,
    reduction: float = 16,
    kernel_size: int = 9,
    position: Literal["parallel", "sequential"] = "sequential",
    scale: float = 1.0,
    dropout: float = 0.0,
) -> Method:
    """Conformer adapters of Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers (arXiv 2312.03694).

    ``y = z + s (silu(norm(conv(glu(u D + c)))) U + e)`` with ``z = x K + b``, ``D [n, 2 m]``, ``U [m, n_out]``, ``u = z`` (sequential) or
    ``x`` (parallel); ``glu`` halves its input, ``conv`` is depthwise over time with ``kernel_size`` taps. After the convolution module of
    Conformer (arXiv 2005.08100). For speech and audio, where neighbouring frames say more than a wider adapter; cannot be merged. The
    weight's input needs axes [batch, time, features]; padding is convolved like any other position.
    Count: ``2 n m + 2 m + k m + m + 2 m + m n_out + n_out``.

    Two departures: the norm is a layer norm over the m channels, of the same size, where the release has batch norm, whose running
    statistics an adapter that is a value could not keep and which would tie the rows of a batch together; and U starts at zero, so the
    output starts at the base's. The norm on the adapter's input that the release computes and then ignores is left out.

    Args:
      width: m; None: ``round(n / reduction)``. reduction: of the width, ignored where it is given. scale: s.
      kernel_size: k, odd or even; the default is a choice made here. position: as in `bottleneck`. dropout: before U, during training.

    Raises:
      ValueError: an unknown position, no taps, or a width below 2 (one channel is normalised away), given or (at a site) left by the
        reduction.

    Example:
      >>> conformer_adapter(reduction=8).exact_init
      True
    """
    check_width("conformer_adapter", width, reduction)
    check_choice("conformer_adapter", "position", position, ("parallel", "sequential"))
    check_dropout("conformer_adapter", dropout)
    if kernel_size < 1:
        raise ValueError(f"conformer_adapter(kernel_size={kernel_size}): expected at least 1.")

    def leaves(site: Site) -> dict[str, Leaf]:
        m = width_at("conformer_adapter", site, position, width, reduction)
        if m < 2:
            raise ValueError(
                f"conformer_adapter at {site.path}: a width of 1 leaves nothing to normalise. Give a width of at least 2, or exclude the "
                "site."
            )
        kept = bottleneck_leaves(site, position, m, bias=True)
        for name in ("down", "down_bias"):  # values and gates
            kept[name] = kept[name]._replace(shape=(*kept[name].shape[:-1], 2 * m))
        narrow = Leaf((m,), ("rank",))
        return kept | {
            "taps": Leaf((kernel_size, m), ("", "rank")), "taps_bias": narrow, "gain": narrow, "shift": narrow,
        }  # fmt: skip

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        made = zero_up(key, site, leaves(site), "kaiming")
        # A tap's fan-in is the length of the filter.
        taps = random_a(jax.random.fold_in(key, 1), made["taps"].shape)
        return made | {"taps": taps, "gain": jnp.ones_like(made["gain"])}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> ConformerBottleneck:
        own = {name: leaves[name] for name in ("taps", "taps_bias", "gain", "shift")}
        return ConformerBottleneck(**factors(leaves), **own, scale=scale, dropout=dropout, position=position)  # type: ignore[arg-type]

    return Method(ConformerBottleneck, leaves, init, expand)
