"""low_rank_matmul against the formula it stands for, and what it keeps for the backward pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.forms._matmul import low_rank_matmul

N_IN, N_OUT, RANK = 24, 20, 4


def naive(x, a, mid, b, scale):
    u = x @ a
    if mid is not None:
        u = u * mid if mid.ndim == 1 else u @ mid
    return scale * (u @ b)


def operands(mid: str, lead=(3, 5), dtype=jnp.float32, n_in=N_IN, n_out=N_OUT, rank=RANK):
    keys = jax.random.split(jax.random.key(0), 4)
    shape = {"none": None, "vector": (rank,), "matrix": (rank, rank)}[mid]
    return (
        jax.random.normal(keys[0], (*lead, n_in)).astype(dtype),
        jax.random.normal(keys[1], (n_in, rank)),
        None if shape is None else jax.random.normal(keys[2], shape),
        jax.random.normal(keys[3], (rank, n_out)),
    )


def loss(matmul, x, a, mid, b, scale):
    # A sum of squares: the gradient of the scale is then a sum without cancellation, fit for a relative bound.
    return jnp.sum(matmul(x, a, mid, b, scale).astype(jnp.float32) ** 2)


def gradients(matmul, args, scale=0.7):
    return jax.jit(jax.grad(functools.partial(loss, matmul), argnums=(0, 1, 2, 3, 4)))(*args, jnp.float32(scale))


def assert_close(got, want, rtol):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
        assert g.shape == w.shape
        np.testing.assert_allclose(g, w, rtol=0, atol=rtol * np.abs(w).max())


@pytest.mark.parametrize("mid", ["none", "vector", "matrix"])
@pytest.mark.parametrize("lead", [(), (7,), (3, 5), (2, 3, 4)])
def test_value_and_every_gradient_equal_the_formula(mid, lead):
    args = operands(mid, lead)
    assert_close(low_rank_matmul(*args, 0.7), naive(*args, 0.7), 1e-5)
    assert_close(gradients(low_rank_matmul, args), gradients(naive, args), 1e-5)


@pytest.mark.parametrize(("n_in", "n_out", "rank"), [(3, 20, 8), (20, 3, 8), (8, 8, 8)])
def test_a_rank_wider_than_the_layer(n_in, n_out, rank):
    args = operands("matrix", n_in=n_in, n_out=n_out, rank=rank)
    assert_close(gradients(low_rank_matmul, args), gradients(naive, args), 1e-5)


@pytest.mark.parametrize("mid", ["none", "vector", "matrix"])
def test_bfloat16_input_with_float32_factors(mid):
    args = operands(mid, lead=(4, 16), dtype=jnp.bfloat16)
    exact = (args[0].astype(jnp.float32), *args[1:])
    y = low_rank_matmul(*args, 0.05)
    assert y.dtype == jnp.bfloat16
    assert_close(y, naive(*exact, 0.05), 2e-2)
    got = gradients(low_rank_matmul, args, 0.05)
    assert got[0].dtype == jnp.bfloat16
    assert {g.dtype for g in jax.tree.leaves(got[1:])} == {jnp.dtype("float32")}
    assert_close(got, gradients(naive, exact, 0.05), 3e-2)


def test_bfloat16_input_is_never_widened():
    """PEFT's float32 adapters keep a float32 copy of every input."""
    x, a, mid, b = operands("matrix", lead=(4, 16), dtype=jnp.bfloat16)
    text = jax.jit(jax.grad(lambda ab: loss(low_rank_matmul, x, ab[0], mid, ab[1], 1.0))).lower((a, b)).as_text()
    assert f"4x16x{N_IN}xbf16" in text
    assert f"4x16x{N_IN}xf32" not in text


def test_gradients_accumulate_in_float32():
    """4,096 tokens of 1 + 1/256: a bfloat16 sum would stick at 256."""
    x = jnp.ones((64, 64, 1), jnp.bfloat16)
    grad = jax.grad(lambda a: jnp.sum(low_rank_matmul(x, a, None, jnp.ones((1, 1)), 1.0).astype(jnp.float32)))
    assert float(grad(jnp.ones((1, 1)))[0, 0]) == 4096.0


def test_one_adapter_per_row():
    x, a, mid, b = operands("matrix", lead=(6, 5))
    rows = jnp.arange(6.0)[:, None, None] + 1
    batched = (x, a * rows, mid / rows, b - rows)
    axes = (0, 0, 0, 0, None)
    per_row = jax.vmap(low_rank_matmul, axes)
    want = jnp.stack([naive(*(leaf[i] for leaf in batched), 0.5) for i in range(6)])
    assert_close(per_row(*batched, 0.5), want, 1e-5)
    assert_close(gradients(per_row, batched), gradients(jax.vmap(naive, axes), batched), 1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["scan", "scan of remat"])
def test_scan_over_layers(wrap):
    x, a, mid, b = operands("matrix", n_out=N_IN)
    layers = jax.tree.map(lambda w: jnp.stack([w, -w, 2 * w]) * 0.1, (a, mid, b))

    def stack(matmul, x, layers):
        body = wrap(lambda h, layer: (h + matmul(h, *layer, 0.5), None))
        return jnp.sum(jnp.sin(jax.lax.scan(body, x, layers)[0]))

    got, want = (
        jax.jit(jax.grad(functools.partial(stack, f), argnums=(0, 1)))(x, layers) for f in (low_rank_matmul, naive)
    )
    assert_close(got, want, 1e-5)


def test_only_what_is_differentiated_gets_a_gradient_product():
    """With a and b frozen the one product over tokens is that of mid, r x r."""
    x, a, mid, b = operands("matrix")
    text = jax.jit(jax.grad(lambda mid: loss(low_rank_matmul, x, a, mid, b, 1.0))).lower(mid).as_text()
    products = [
        line for line in text.splitlines() if "dot_general" in line and "contracting_dims = [0, 1] x [0, 1]" in line
    ]
    assert len(products) == 1
    assert products[0].rstrip().endswith(f"tensor<{RANK}x{RANK}xf32>")


def stacked_temp_bytes(trainable: tuple[str, ...], layers=16, tokens=512, width=256, rank=8) -> int:
    """Temporary memory of a scan over layers without remat, differentiated for some factors only."""
    shapes = {"a": (width, rank), "mid": (rank, rank), "b": (rank, width)}
    factors = {k: jax.ShapeDtypeStruct((layers, *s), jnp.float32) for k, s in shapes.items()}
    kernels = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)

    def total(train, frozen, kernels, x):
        def layer(h, xs):
            kernel, f = xs
            return h + h @ kernel + low_rank_matmul(h, f["a"], f["mid"], f["b"], 2.0), None

        return jnp.sum(jax.lax.scan(layer, x, (kernels, {**train, **frozen}))[0])

    train = {k: v for k, v in factors.items() if k in trainable}
    frozen = {k: v for k, v in factors.items() if k not in trainable}
    x = jax.ShapeDtypeStruct((4, tokens // 4, width), jnp.float32)
    return jax.jit(jax.grad(total)).lower(train, frozen, kernels, x).compile().memory_analysis().temp_size_in_bytes


def test_the_input_is_not_kept_when_a_is_frozen():
    inputs = 16 * 512 * 256 * 4
    core_only, everything = stacked_temp_bytes(("mid",)), stacked_temp_bytes(("a", "mid", "b"))
    assert everything - core_only > 0.9 * inputs
    assert core_only < 0.5 * inputs


def test_a_sharded_sequence_axis_is_not_gathered():
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    mesh = jax.make_mesh(
        (2, 2), ("data", "seq"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    args = operands("matrix", lead=(4, 8))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "seq"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sharded = (jax.device_put(args[0], spec), *jax.device_put(args[1:], whole))
    grad = jax.jit(
        jax.grad(functools.partial(loss, low_rank_matmul), argnums=(0, 1, 2, 3)),
        out_shardings=(spec, whole, whole, whole),
    )
    assert "all-gather" not in grad.lower(*sharded, 0.7).compile().as_text()
    assert_close(grad(*sharded, 0.7), gradients(naive, args)[:4], 1e-5)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 5), (4, 3), None, (3, 6)),
        ((2, 4), (4, 3), (2,), (3, 6)),
        ((2, 4), (4, 3), None, (2, 6)),
        ((2, 4), (9, 4, 3), None, (9, 3, 6)),
    ],
)
def test_shapes_that_do_not_chain(shapes):
    x, a, mid, b = (None if s is None else jnp.zeros(s) for s in shapes)
    with pytest.raises(ValueError, match="do not chain"):
        low_rank_matmul(x, a, mid, b, 1.0)
