"""The spatio-temporal attention of ZeroI2V: some heads of an image transformer look at another frame, at no cost."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def temporal_shift(x: jax.Array, offsets: Sequence[int], time_axis: int = -4, head_axis: int = -2) -> jax.Array:
    """Moves keys or values between frames, head by head.

    ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video (arXiv 2310.01324). Applied to the keys and to the values
    before an image transformer's own attention, each frame's queries meet other frames' tokens in some of the heads; nothing is learned.
    A frame whose source would lie outside the video keeps its own values.

    Args:
      x: keys or values, ``[..., time, tokens, heads, head_dim]`` unless the axes say otherwise; any dtype.
      offsets: for each head the frame it takes, relative to its own: -1 the previous one, 1 the next, 0 its own. See `shift_offsets`.
      time_axis, head_axis: where frames and heads are in ``x``.

    Returns:
      The same shape and dtype.

    Raises:
      ValueError: another number of offsets than of heads.

    Example:
      >>> x = jnp.arange(3).reshape(3, 1, 1, 1) * jnp.ones((1, 1, 2, 1), jnp.int32)
      >>> temporal_shift(x, [-1, 0])[:, 0, :, 0].tolist()
      [[0, 0], [0, 1], [1, 2]]
    """
    time_axis, head_axis = time_axis % x.ndim, head_axis % x.ndim
    heads, frames = x.shape[head_axis], x.shape[time_axis]
    if len(offsets) != heads:
        raise ValueError(f"temporal_shift: {len(offsets)} offsets for {heads} heads; give one for each head.")
    parts = []
    for start, stop, offset in _runs(offsets):
        part = jax.lax.slice_in_dim(x, start, stop, axis=head_axis)
        if abs(offset) < frames and offset:
            own = slice(0, -offset) if offset < 0 else slice(frames - offset, frames)
            moved = slice(0, frames + offset) if offset < 0 else slice(offset, frames)
            pieces = [jax.lax.slice_in_dim(part, s.start, s.stop, axis=time_axis) for s in (own, moved)]
            part = jnp.concatenate(pieces if offset < 0 else pieces[::-1], axis=time_axis)
        parts.append(part)
    return jnp.concatenate(parts, axis=head_axis)


def shift_offsets(heads: int, shift_div: int, long_shift_div: int | None = None) -> tuple[int, ...]:
    """The paper's assignment: the first ``heads / shift_div`` heads look one frame back, as many next ones one ahead.

    The other heads stay with their own frame.

    Args:
      heads: of the attention. shift_div: one part in so many is shifted each way; 12 for a ViT-B, one head.
      long_shift_div: if given, ``heads / long_shift_div`` heads after those look two frames back.

    Raises:
      ValueError: a part that is not a whole number of heads, or more shifted heads than there are.

    Example:
      >>> shift_offsets(12, 6, long_shift_div=12)
      (-1, -1, 1, 1, -2, 0, 0, 0, 0, 0, 0, 0)
    """
    parts = [(-1, shift_div), (1, shift_div)] + ([(-2, long_shift_div)] if long_shift_div is not None else [])
    offsets: list[int] = []
    for offset, divisor in parts:
        if divisor < 1 or heads % divisor:
            raise ValueError(
                f"shift_offsets: {heads} heads cannot be divided by {divisor}, so a shift would cut a head in two. Take a divisor of "
                f"{heads}."
            )
        offsets += [offset] * (heads // divisor)
    if len(offsets) > heads:
        raise ValueError(f"shift_offsets: {len(offsets)} of {heads} heads would be shifted. Take larger divisors.")
    return tuple(offsets) + (0,) * (heads - len(offsets))


def _runs(offsets: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbouring heads of one offset, as ``(start, stop, offset)``."""
    edges = [n for n in range(len(offsets)) if n == 0 or offsets[n] != offsets[n - 1]]
    return [(a, b, offsets[a]) for a, b in zip(edges, [*edges[1:], len(offsets)], strict=True)]
