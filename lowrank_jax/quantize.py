"""Quantising the weights of a model: QLoRA, QPiSSA and Q-LaMDA are LoRA, PiSSA and LaMDA on what this makes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lowrank_jax.quantized import KINDS, Quantized, dense, is_quantized
from lowrank_jax.shard import fitted
from lowrank_jax.sites import Site, flatten, hits, named_sharding, with_leaves
from lowrank_jax.unread import Unread, read

Rules = Mapping[str, str]


def quantize(params: Any, rules: Rules, *, block: int = 64, sites: Mapping[str, Site] | None = None) -> Any:
    """Parameters with some weights quantised, to be used like the dense ones: by the model itself and under adapters.

    Each block of numbers along a weight's input is scaled by its largest magnitude and rounded, by qwix: to 8-bit integers, or to
    NormalFloat 4, kept two to a byte. int8 takes ``1 + 4 / block`` bytes a number, nf4 ``1/2 + 2 / block``. Weights in their files
    (`lowrank_jax.unread`) are read and quantised one at a time, a stack one layer at a time; what no rule names is read.

    Args:
      params: tree of arrays, of `Unread` leaves, or of ShapeDtypeStructs (nothing is computed).
      rules: ``{pattern: 'int8' or 'nf4'}``, patterns as in `lowrank_jax.plan`; the last that matches decides. Of what a pattern matches,
        kernels are quantised; biases, norms and embedding tables stay as they are.
      block: numbers that share a scale, along the axis before the last.
      sites: from `lowrank_jax.linen.sites` or `lowrank_jax.nnx.sites`, which tell weights of other names; None: what is called ``kernel``.

    Returns:
      A tree with `Quantized` leaves. Sharded weights stay sharded the same way.

    Raises:
      ValueError: an unknown kind, a pattern that matches nothing or nothing to quantise, a block that does not divide a weight.
      ImportError: qwix is not installed.

    Example:
      >>> small = quantize({"layer": {"kernel": jnp.ones((64, 4)), "bias": jnp.zeros(4)}}, {"layer": "nf4"})
      >>> small["layer"]["kernel"].shape, small["layer"]["kernel"].nbytes
      ((64, 4), 136)
    """
    flat = flatten(params)
    kinds = chosen(flat, rules, block, sites)
    return read(with_leaves(params, {path: quantized(flat[path], kind, block) for path, kind in kinds.items()}))


def dequantize(params: Any) -> Any:
    """A tree of parameters with every quantised weight dense again: the rounded one, not the original.

    Example:
      >>> dequantize(quantize({"kernel": jnp.ones((2, 1))}, {"kernel": "nf4"}, block=2))["kernel"].tolist()
      [[1.0], [1.0]]
    """
    return jax.tree.map(dense, params, is_leaf=is_quantized)


def chosen(
    flat: Mapping[str, Any], rules: Rules, block: int, sites: Mapping[str, Site] | None = None
) -> dict[str, str]:
    """``{path: kind}`` of the weights that rules quantise; see `quantize` for what it raises."""
    if block < 2 or block % 2:
        raise ValueError(f"quantize(block={block}): expected an even number of at least 2, such as 64.")
    kinds: dict[str, str] = {}
    for pattern, kind in rules.items():
        if kind not in KINDS:
            raise ValueError(f"quantize({{{pattern!r}: {kind!r}}}): expected {' or '.join(map(repr, KINDS))}.")
        matched = hits(f"quantize({{{pattern!r}: ...}})", pattern, flat)
        kernels = [path for path in matched if _is_kernel(path, flat[path], sites)]
        if not kernels:
            raise ValueError(
                f"quantize({{{pattern!r}: {kind!r}}}) matches {matched[0]}, which is no kernel: embedding tables, biases and norms stay "
                "dense. Name the kernels; if it is one under another name, pass sites=lowrank_jax.linen.sites(model, ...)."
            )
        kinds |= dict.fromkeys(kernels, kind)
    for path in kinds:
        weight = flat[path]
        if is_quantized(weight):
            raise ValueError(f"quantize: {path} is quantised already; start from the dense weights.")
        if weight.shape[-2] % block:
            raise ValueError(
                f"quantize(block={block}): {path} has shape {tuple(weight.shape)}, whose {weight.shape[-2]} inputs the block does not "
                "divide. Choose a block that does, or leave the weight out."
            )
    return kinds


def quantized(weight: Any, kind: str, block: int) -> Quantized:
    """One weight quantised: an array, a ShapeDtypeStruct or an `Unread`."""
    if isinstance(weight, jax.ShapeDtypeStruct):
        codes, scales = jax.eval_shape(lambda: _empty(weight.shape, kind, block))
        return _laid_like(weight, Quantized(codes, scales, kind, jnp.dtype(weight.dtype)))
    if isinstance(weight, Unread) and weight.stacked:
        return quantized_layers(weight, weight.layers(), kind, block)
    codes, scales = _codes(jnp.asarray(dense(weight)), kind, block)
    return _laid_like(weight, Quantized(codes, scales, kind, jnp.dtype(weight.dtype)))


def quantized_layers(like: Any, made: Iterable[jax.Array], kind: str, block: int) -> Quantized:
    """A stack quantised from its layers as they are made; shape, dtype and sharding are those of ``like``."""
    codes, scales = _empty(like.shape, kind, block)
    out = _laid_like(like, Quantized(codes, scales, kind, jnp.dtype(like.dtype)))
    for n, layer in enumerate(made):
        codes, scales = _put(out.codes, out.scales, n, *_codes(layer, kind, block))
        out = out.replace(codes=codes, scales=scales)
    return _laid_like(like, out)


def _is_kernel(path: str, leaf: Any, sites: Mapping[str, Site] | None) -> bool:
    if sites is not None:
        return sites[path].kind in ("dense", "conv")
    return path.rpartition("/")[2] == "kernel" and len(leaf.shape) >= 2


def _empty(shape: tuple[int, ...], kind: str, block: int) -> tuple[jax.Array, jax.Array]:
    *batch, rows, columns = shape
    how = KINDS[kind]
    return jnp.zeros((*batch, rows // how.per_byte, columns), how.codes), jnp.zeros(
        (*batch, rows // block, columns), how.scales
    )


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _put(codes: jax.Array, scales: jax.Array, n: jax.Array, *layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A stack with its layer ``n`` set, in place."""
    return codes.at[n].set(layer[0]), scales.at[n].set(layer[1])


@functools.partial(jax.jit, static_argnames=("kind", "block"))
def _codes(weight: jax.Array, kind: str, block: int) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of a weight with any batch axes in front, one matrix after another."""
    matrices = weight.reshape(-1, *weight.shape[-2:])
    codes, scales = jax.lax.map(lambda matrix: _matrix_codes(matrix, kind, block), matrices)
    return tuple(x.reshape(*weight.shape[:-2], *x.shape[1:]) for x in (codes, scales))


def _matrix_codes(matrix: jax.Array, kind: str, block: int) -> tuple[jax.Array, jax.Array]:
    qwix = _qwix()
    qtype = jnp.int8 if kind == "int8" else kind
    found = qwix.quantize(matrix.astype(jnp.float32), qtype, channelwise_axes=(1,), tiled_axes={0: block})
    codes, columns = found.qvalue, matrix.shape[-1]
    if kind == "nf4":
        halves = codes.astype(jnp.uint8).reshape(-1, 2, block // 2, columns)
        codes = (halves[:, 0] | halves[:, 1] << 4).reshape(-1, columns)
    return codes, found.scale.astype(KINDS[kind].scales)


def _laid_like(weight: Any, made: Quantized) -> Quantized:
    """The codes and scales laid out over the weight's mesh, if it lies on one."""
    sharding = named_sharding(weight)
    if sharding is None:
        return made
    mesh: Any = sharding.mesh
    spec = (*sharding.spec, *[None] * (len(weight.shape) - len(sharding.spec)))

    def lay(part: Any) -> Any:
        where = NamedSharding(mesh, fitted(part.shape, spec, mesh))
        if isinstance(part, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=where)
        return jax.device_put(part, where)

    return jax.tree.map(lay, made)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError("quantize needs qwix: pip install 'lowrank_jax[quant]'.") from error
    return qwix
