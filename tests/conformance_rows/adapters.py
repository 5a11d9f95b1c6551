"""Adapters that are small networks of their own: Hydra, bottlenecks, ZeroI2V, FLoRA, MoSA, Conformer adapters."""

from __future__ import annotations

import numpy as np
from conformance_row import Config, Leaves, Row

import lowrank_jax as lr


def _hydra_count(site: lr.Site, config: Config) -> int:
    one, two = config["rank"], config["sequential_rank"]
    biases = one + two + 2 * site.n_out if config["bias"] else 0
    return one * (site.n_in + site.n_out) + 2 * two * site.n_out + biases


def _hydra_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    sequential = p["sequential_down"] @ p["sequential_up"]
    return 2 * (p["parallel_down"] @ p["parallel_up"] + kernel @ sequential)


def _hydra_bias(p: Leaves, shared: Leaves, kernel: np.ndarray, bias: np.ndarray | None) -> np.ndarray | None:
    """``s (a_p B_p + c_p + (b A_s + a_s) B_s + c_s)``; without biases of its own ``s b A_s B_s``."""
    source = None if bias is None else _row(bias, p["sequential_down"])
    if "parallel_up_bias" not in p:
        return None if source is None else 2 * _row(source, p["sequential_up"])
    parallel = _row(p["parallel_down_bias"], p["parallel_up"]) + p["parallel_up_bias"]
    return 2 * (parallel + _row(source + p["sequential_down_bias"], p["sequential_up"]) + p["sequential_up_bias"])


def _row(vector: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...io->...o", vector, matrix)


def _hydra_row(name: str, bias: bool) -> Row:
    return Row(
        name,
        lambda: lr.hydra(rank=2, sequential_rank=3, scale=2.0, bias=bias),
        _hydra_count,
        _hydra_update,
        lambda c: c["rank"] + c["sequential_rank"],
        bias_update=_hydra_bias,
        adds_bias=bias,
    )


def _width(site: lr.Site, config: Config) -> int:
    n = site.n_out if config["position"] in ("sequential", "after") else site.n_in
    return config["width"] or round(n / config["reduction"])


def _bottleneck_count(site: lr.Site, config: Config) -> int:
    source = site.n_out if config["position"] == "sequential" else site.n_in
    width = _width(site, config)
    return width * (source + site.n_out) + (width + site.n_out if config["bias"] else 0)


def _linear_bottleneck_bias(p: Leaves, shared: Leaves, kernel: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return 2 * (_row(p["down_bias"], p["up"]) + p["up_bias"])


def _zero_i2v_count(site: lr.Site, config: Config) -> int:
    n, width = site.n_in if config["position"] == "before" else site.n_out, _width(site, config)
    return 2 * n * width + width + n


def _zero_i2v_row(position: str) -> Row:
    """``M = I + s D_1 D_2``, ``c = s (c_1 D_2 + c_2)``: ``M K`` and ``b + c K``, or ``K M`` and ``b M + c``."""

    def update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
        m = np.eye(p["down"].shape[-2]) + 2 * p["down"] @ p["up"]
        return (m @ kernel if position == "before" else kernel @ m) - kernel

    def bias_update(p: Leaves, shared: Leaves, kernel: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        c = 2 * (_row(p["down_bias"], p["up"]) + p["up_bias"])
        return _row(c, kernel) if position == "before" else c + 2 * _row(_row(bias, p["down"]), p["up"])

    make = lambda: lr.zero_i2v(position, reduction=3, scale=2.0)  # noqa: E731
    width = lambda c: 3  # noqa: E731  # round(8 / 3) and round(10 / 3)
    return Row(f"zero_i2v_{position}", make, _zero_i2v_count, update, width, bias_update=bias_update, adds_bias=True)


def _flora_sizes(site: lr.Site) -> list[int]:
    return [site.shape[a] for a in site.inputs] if site.kind == "conv" else [site.n_in]


def _flora_count(site: lr.Site, config: Config) -> int:
    """``prod(r_i) + sum(dim_i r_i)`` over the axes of the kernel."""
    *window, channels = _flora_sizes(site)
    modes = [(n, min(config["window_rank"], n)) for n in window]
    modes += [(channels, config["rank"]), (site.n_out, config["out_rank"])]
    return int(np.prod([r for _, r in modes])) + sum(n * r for n, r in modes)


def _flora_update(p: Leaves, shared: Leaves, kernel: np.ndarray) -> np.ndarray:
    if "in1" not in p:
        return 4 * np.einsum("...ar,...rs,...os->...ao", p["in0"], p["core"], p["out"])
    update = np.einsum("...ka,...cr,...ars,...os->...kco", p["in0"], p["in1"], p["core"], p["out"])
    return 4 * update.reshape(kernel.shape)


def _conformer_count(site: lr.Site, config: Config) -> int:
    n, m = site.n_out if config["position"] == "sequential" else site.n_in, _width(site, config)
    return 2 * n * m + 2 * m + m * config["kernel_size"] + m + 2 * m + m * site.n_out + site.n_out


ROWS = [
    _hydra_row("hydra", bias=False),
    _hydra_row("hydra_bias", bias=True),
    Row("bottleneck", lambda: lr.bottleneck(reduction=3, scale=2.0), _bottleneck_count, None, None, init_tolerance=1e-2),
    Row("bottleneck_linear", lambda: lr.bottleneck(width=3, activation=None, position="parallel", scale=2.0, init="zero_up"),
        _bottleneck_count, lambda p, g, w: 2 * p["down"] @ p["up"], lambda c: c["width"], bias_update=_linear_bottleneck_bias,
        adds_bias=True),
    _zero_i2v_row("before"),
    _zero_i2v_row("after"),
    Row("flora", lambda: lr.flora(rank=3, out_rank=2, scale=4.0), _flora_count, _flora_update, lambda c: c["out_rank"]),
    Row("mosa", lambda: lr.mosa(reduction=3, share=None, scale=2.0), _bottleneck_count, None, None),
    Row("conformer_adapter", lambda: lr.conformer_adapter(reduction=3, kernel_size=4, scale=2.0), _conformer_count, None, None),
]  # fmt: skip
