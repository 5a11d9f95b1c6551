"""Causal attention by the splash kernel of JAX, which never writes the (length x length) weights to memory. TPUs only."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lowrank_jax.remat import NONLINEAR

_BLOCKS = (512, 256, 128)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal scaled dot-product attention; key/value heads are shared by groups of query heads.

    The output and the softmax's normalisers, which its backward pass needs, are tagged for `lowrank_jax.remat.policy`. Run it on one
    device, or inside `jax.shard_map`: the compiler cannot divide the kernel over a mesh by itself.

    Args:
      query: (batch, length, heads, head_dim); computed at the next multiple of 128 of the length.
      key, value: (batch, length, kv_heads, head_dim).
      segment_ids: int (batch, length); a token sees the tokens of its own segment only.
      window: a token sees itself and the window - 1 tokens before it; None: all before it.
      interpret: runs the kernel step by step on any device, for tests.

    Returns:
      (batch, length, heads, head_dim), the type of `query`.

    Example:
      >>> x = jax.ShapeDtypeStruct((1, 100, 2, 128), jnp.bfloat16)
      >>> jax.eval_shape(splash_attention, x, x, x).shape
      (1, 100, 2, 128)
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, head_dim = query.shape[1:]
    missing = -length % _BLOCKS[-1]  # what is added at the end no real token sees
    padded = length + missing
    block = next(size for size in _BLOCKS if padded % size == 0)
    square = (padded, padded)
    mask = masks.CausalMask(square) if window is None else masks.LocalMask(square, (window - 1, 0), 0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=NONLINEAR,
        interpret=interpret,
    )
    pad = lambda x: jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    scaled = (query * (1 / math.sqrt(head_dim))).astype(query.dtype)
    inputs = tuple(jnp.swapaxes(pad(x), 1, 2) for x in (scaled, key, value))
    segments = None if segment_ids is None else kernels.SegmentIds(*(pad(segment_ids),) * 2)
    out = jax.vmap(kernel)(*inputs, segments)
    return jnp.swapaxes(out, 1, 2)[:, :length].astype(query.dtype)
