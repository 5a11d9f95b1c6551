"""The temporal shift of ZeroI2V: which heads see which frame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr

HEADS, FRAMES, TOKENS, DIM = 12, 5, 3, 4
OFFSETS = lr.shift_offsets(HEADS, 6, long_shift_div=12)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, FRAMES, TOKENS, HEADS, DIM)), jnp.float32)


def shift(x, offsets=OFFSETS):
    return np.asarray(jax.jit(lambda x: lr.temporal_shift(x, offsets))(x))


@pytest.mark.parametrize("frame", range(FRAMES))
def test_an_impulse_arrives_where_the_head_looks_for_it(frame):
    seen = shift(jnp.zeros_like(X).at[:, frame].set(1.0))[0, :, 0, :, 0]
    for head, offset in enumerate(OFFSETS):
        # Frame t takes frame t + offset; one whose source is outside the video keeps its own.
        expected = [float((t + offset if 0 <= t + offset < FRAMES else t) == frame) for t in range(FRAMES)]
        assert seen[:, head].tolist() == expected, (head, offset)


def test_first_heads_look_back_and_the_next_ahead():
    assert OFFSETS == (-1, -1, 1, 1, -2) + (0,) * 7
    inner = shift(jnp.zeros_like(X).at[:, 2].set(1.0))[0, :, 0, :, 0]
    assert np.flatnonzero(inner[:, 0]).tolist() == [3] and np.flatnonzero(inner[:, 2]).tolist() == [1]


def test_time_reversed_with_directions_swapped_is_the_reverse():
    swapped = tuple(-offset for offset in OFFSETS)
    assert (shift(X[:, ::-1], swapped) == shift(X)[:, ::-1]).all()
    assert not (shift(X[:, ::-1]) == shift(X)[:, ::-1]).all()


def test_a_still_video_and_unshifted_heads_stay():
    still = jnp.broadcast_to(X[:, :1], X.shape)
    assert (shift(still) == still).all()
    assert (shift(X)[..., 5:, :] == X[..., 5:, :]).all() and shift(X).dtype == X.dtype
    assert (shift(X, (0,) * HEADS) == X).all() and (shift(X[:, :1]) == X[:, :1]).all()


def test_axes_may_be_anywhere():
    elsewhere = jnp.transpose(X, (3, 0, 4, 2, 1))
    got = lr.temporal_shift(elsewhere, OFFSETS, time_axis=4, head_axis=0)
    assert (jnp.transpose(got, (1, 4, 3, 0, 2)) == shift(X)).all()


def test_heads_are_not_cut():
    with pytest.raises(ValueError, match="12 heads cannot be divided by 8"):
        lr.shift_offsets(12, 8)
    with pytest.raises(ValueError, match="24 of 12 heads would be shifted"):
        lr.shift_offsets(12, 1)
    with pytest.raises(ValueError, match="3 offsets for 12 heads"):
        lr.temporal_shift(X, [1, 2, 3])
