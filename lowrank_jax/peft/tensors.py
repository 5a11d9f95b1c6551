"""The torch layout of one element of a site: LoRA factors and whole weights, there and back."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from lowrank_jax.sites import Site


def factor_names(site: Site) -> tuple[str, str]:
    """The names of the two factors, below the module's.

    Example:
      >>> factor_names(Site("x/kernel", "dense", (2, 3), "float32", (), (0,), (1,)))
      ('lora_A.weight', 'lora_B.weight')
    """
    return ("lora_embedding_A", "lora_embedding_B") if site.kind == "embed" else ("lora_A.weight", "lora_B.weight")


def factor_shapes(site: Site, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes in torch's layout: ``(r, in)`` and ``(out, r)``; a convolution has its window on A and ones on B."""
    if site.kind != "conv":
        return (rank, site.n_in), (site.n_out, rank)
    window, channels = _window(site)
    return (rank, channels, *window), (site.n_out, rank, *(1 for _ in window))


def factors_to_torch(site: Site, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``a [n_in, r]`` and ``b [r, n_out]`` in the shapes of `factor_shapes`."""
    if site.kind != "conv":
        return a.T, b.T
    return _conv_to_torch(site, a), b.T.reshape(factor_shapes(site, b.shape[0])[1])


def factors_from_torch(site: Site, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `factors_to_torch`."""
    if site.kind != "conv":
        return a.T, b.T
    return _conv_from_torch(a), b.reshape(b.shape[:2]).T


def experts_to_torch(a: np.ndarray, b: np.ndarray, flipped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``a [experts, n_in, r]``, ``b [experts, r, n_out]`` of a `units.Parameter` as PEFT lays them beside each other.

    The rows of A go expert by expert, the columns of B direction by direction: row ``e r + k`` meets column ``k experts + e``.
    """
    rows, columns = (b, np.swapaxes(a, -1, -2)) if flipped else (np.swapaxes(a, -1, -2), b)  # [experts, r, n]
    return rows.reshape(-1, rows.shape[-1]), columns.transpose(2, 1, 0).reshape(columns.shape[-1], -1)


def experts_from_torch(a: np.ndarray, b: np.ndarray, experts: int, flipped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `experts_to_torch`."""
    rows = a.reshape(experts, -1, a.shape[-1])
    columns = b.reshape(b.shape[0], -1, experts).transpose(2, 1, 0)
    return (np.swapaxes(columns, -1, -2), rows) if flipped else (np.swapaxes(rows, -1, -2), columns)


def within_rank(site: Site, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same update ``a [..., n_in, r] @ b`` at a rank that the weight can have: above it, one factor is multiplied out."""
    if a.shape[-1] <= site.max_rank:
        return a, b
    dtype = jnp.promote_types(a.dtype, b.dtype)
    update = (a.astype(np.float32) @ b.astype(np.float32)).astype(dtype)
    one = np.broadcast_to(np.eye(site.max_rank, dtype=dtype), (*update.shape[:-2], site.max_rank, site.max_rank))
    return (update, one) if site.n_out <= site.n_in else (one, update)


def vector_shape(site: Site, size: int) -> tuple[int, ...]:
    """The shape of a vector over channels: itself, or for a convolution with the axes of its outputs."""
    return (1, size, *(1 for _ in _window(site)[0])) if site.kind == "conv" else (size,)


def weight_shape(site: Site) -> tuple[int, ...]:
    """The shape of a whole weight in torch: ``(out, in)``, ``(out, in, *window)``, ``(rows, dim)``; biases and scales are vectors."""
    if site.kind == "conv":
        window, channels = _window(site)
        return (site.n_out, channels, *window)
    if site.kind == "param":
        return (int(np.prod(site.shape)),)
    return (site.n_in, site.n_out) if site.kind == "embed" else (site.n_out, site.n_in)


def weight_to_torch(site: Site, weight: np.ndarray) -> np.ndarray:
    """A canonical weight ``[n_in, n_out]`` (a param: its own shape) in the shape of `weight_shape`."""
    if site.kind == "conv":
        return _conv_to_torch(site, weight)
    return weight.T if site.kind == "dense" else weight.reshape(weight_shape(site))


def weight_from_torch(site: Site, weight: np.ndarray) -> np.ndarray:
    """Inverse of `weight_to_torch`."""
    if site.kind == "conv":
        return _conv_from_torch(weight)
    return weight.T if site.kind == "dense" else weight.reshape(site.shape)


def is_matrix_or_image(site: Site, *more: int) -> bool:
    """Whether a weight is a matrix or a convolution over two axes, or over one of ``more``: not every method of PEFT has all."""
    return site.kind == "dense" or (site.kind == "conv" and len(site.inputs) - 1 in (2, *more))


def _window(site: Site) -> tuple[tuple[int, ...], int]:
    *window, channels = (site.shape[axis] for axis in site.inputs)
    return tuple(window), channels


def _conv_to_torch(site: Site, matrix: np.ndarray) -> np.ndarray:
    """``[window * channels, k]`` -> ``(k, channels, *window)``."""
    window, channels = _window(site)
    grid = matrix.reshape(*window, channels, matrix.shape[-1])
    return np.moveaxis(grid, (-1, -2), (0, 1))


def _conv_from_torch(tensor: np.ndarray) -> np.ndarray:
    return np.moveaxis(tensor, (0, 1), (-1, -2)).reshape(-1, tensor.shape[0])
