"""Forms: applying is multiplying by the weight plus the delta, read both ways; zero factors change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from numpy_seeded import numpy_fold, numpy_uniform

import lowrank_jax as lr
from lowrank_jax.forms import (
    AdaptiveLowRank,
    Bottleneck,
    Branches,
    Call,
    Chain,
    Dense,
    InputBottleneck,
    InputRescale,
    Leaf,
    LowRank,
    Magnitude,
    NonlinearBottleneck,
    RandomBases,
    Rescale,
    Sparse,
    Tucker,
    UnsupportedError,
    apply_rows,
    leaf_spec,
)

N_IN, N_OUT, RANK = 6, 8, 3


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape), jnp.float32)


A, B = random(N_IN, RANK), random(RANK, N_OUT)
LOW = LowRank(A, B, scale=0.5)
PARALLEL = Bottleneck(A, B, random(RANK), random(N_OUT), scale=0.5)
BASES = RandomBases(
    random(2, RANK), random(2, N_OUT), None, random(N_IN, 2, RANK), random(RANK, N_OUT), d=N_IN, at_once=RANK, scale=0.5
)
SEQUENTIAL = Bottleneck(random(N_OUT, RANK), B, random(RANK), random(N_OUT), scale=0.5, position="sequential")
FORMS = {
    "low rank": LOW,
    "low rank vector": LowRank(A, B, random(RANK), scale=0.5),
    "low rank matrix": LowRank(A, B, random(RANK, RANK), scale=0.5),
    "random bases": BASES,
    "random bases seed": BASES.replace(wide=None, narrow=None, seed=jnp.array([1, 2], jnp.uint32)),
    "tucker": Tucker(random(2, 2, 3), (random(2, 2), random(3, 2)), random(N_OUT, 3), scale=0.5),
    "sparse": Sparse(jnp.array([0, 7, 7, 47]), random(4), shape=(N_IN, N_OUT)),
    "bottleneck": Bottleneck(A, B, scale=0.5),
    "bottleneck biased": PARALLEL,
    "bottleneck sequential": Bottleneck(random(N_OUT, RANK), B, scale=0.5, position="sequential"),
    "bottleneck sequential biased": SEQUENTIAL,
    "bottleneck input": InputBottleneck(A, random(RANK, N_IN), scale=0.5),
    "bottleneck input biased": InputBottleneck(A, random(RANK, N_IN), random(RANK), random(N_IN), scale=0.5),
    "branches": Branches((PARALLEL, SEQUENTIAL)),
    "rescale": Rescale(random(N_OUT)),
    "rescale input": InputRescale(random(N_IN)),
    "magnitude": Magnitude(LOW, random(N_OUT, seed=2)),
    "adaptive low rank": AdaptiveLowRank(LOW, eta=2.0),
    "dense": Dense(random(N_IN, N_OUT)),
    "chain": Chain((LOW, Sparse(jnp.array([5]), random(1), shape=(N_IN, N_OUT)))),
}
X, KERNEL, BIAS = random(2, 5, N_IN, seed=3), random(N_IN, N_OUT, seed=4), random(N_OUT, seed=5)
BIASES = random(2, N_OUT, seed=9)


def dense_call(x, kernel, bias=None):
    return Call("dense", x, x @ kernel + (0 if bias is None else bias), kernel, jnp.matmul, None, bias)


def numpy_delta(name, form):
    """The update by its formula, in float64."""
    f = jax.tree.map(
        lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x), form
    )
    kernel = np.asarray(KERNEL, np.float64)
    if name.startswith("low rank"):
        mid = np.eye(RANK) if f.mid is None else np.diag(f.mid) if f.mid.ndim == 1 else f.mid
        return 0.5 * f.a @ mid @ f.b
    if name.startswith("random bases"):
        if f.seed is not None:
            wide = numpy_uniform(numpy_fold(f.seed, 0), (N_IN, 2, RANK))
            f = f.replace(wide=wide, narrow=numpy_uniform(numpy_fold(f.seed, 1), (RANK, N_OUT)))
        return 0.5 * np.einsum("inr,nr,ro,no->io", f.wide, f.lam, f.narrow, f.gam)
    if name == "tucker":
        return 0.5 * np.einsum("abz,ia,jb,oz->ijo", f.core, *f.inputs, f.output).reshape(N_IN, N_OUT)
    if name == "sparse":
        out = np.zeros(N_IN * N_OUT)
        np.add.at(out, f.indices, f.values)
        return out.reshape(N_IN, N_OUT)
    if name == "branches":
        return sum(numpy_delta("bottleneck", part) for part in form.parts)
    if name.startswith("bottleneck"):
        update = 0.5 * f.down @ f.up
        return update @ kernel if "input" in name else kernel @ update if f.position == "sequential" else update
    if name.startswith("rescale"):
        return kernel * (f.change[:, None] if "input" in name else f.change)
    if name == "magnitude":
        weight = kernel + numpy_delta("low rank", form.low)
        return f.magnitude * weight / np.linalg.norm(weight, axis=0) - kernel
    if name == "adaptive low rank":
        return numpy_delta("low rank", form.low)
    if name == "dense":
        return f.weight - kernel
    return sum(numpy_delta(part, one) for part, one in zip(("low rank", "sparse"), form.forms, strict=True))


def numpy_bias(form):
    """The bias after a bottleneck or a factor, by its formula."""
    if isinstance(form, Rescale):
        return BIAS + BIAS * form.change
    if isinstance(form, Branches):
        return BIAS + sum(numpy_bias(part) - BIAS for part in form.parts)
    if not isinstance(form, Bottleneck):
        return BIAS
    down, up, down_bias, up_bias = (
        0 if f is None else np.asarray(f, np.float64) for f in (form.down, form.up, form.down_bias, form.up_bias)
    )
    source = np.asarray(BIAS, np.float64) if form.position == "sequential" else np.zeros(len(down))
    constant = 0.5 * ((source @ down + down_bias) @ up + up_bias)
    return BIAS + (constant @ np.asarray(KERNEL) if isinstance(form, InputBottleneck) else constant)


@pytest.mark.parametrize("name", FORMS)
def test_applying_is_the_weight_plus_the_delta(name):
    form, delta = FORMS[name], numpy_delta(name, FORMS[name])
    np.testing.assert_allclose(form.delta(KERNEL), delta, atol=1e-5)
    bias_delta = form.delta_bias(KERNEL, BIAS)
    bias = BIAS if bias_delta is None else BIAS + bias_delta
    np.testing.assert_allclose(bias, numpy_bias(form), atol=1e-5)
    expected = np.asarray(X, np.float64) @ (np.asarray(KERNEL, np.float64) + delta) + np.asarray(bias)
    np.testing.assert_allclose(form.apply(dense_call(X, KERNEL, BIAS)), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", [n for n, f in FORMS.items() if "embed" in f.record.kinds])
def test_embeddings_read_both_ways(name):
    form, ids = FORMS[name], jnp.array([[0, 5, 2], [2, 2, 1]])
    table = np.asarray(KERNEL + form.delta(KERNEL))
    call = Call("embed", ids, KERNEL[ids], KERNEL, lambda ids, w: jnp.take(w, ids, axis=0))
    np.testing.assert_allclose(form.apply(call), table[ids], atol=1e-5)
    query = random(2, 5, N_OUT, seed=6)
    np.testing.assert_allclose(form.transpose().apply(dense_call(query, KERNEL.T)), query @ table.T, atol=1e-4)


# Factors of input channels fit a convolution or a matmul, not both: tests/methods/test_ia3.py has the convolution.
@pytest.mark.parametrize("name", [n for n, f in FORMS.items() if "conv" in f.record.kinds and n != "rescale input"])
def test_convolutions(name):
    """A window of 2 over 3 channels, written out as a matmul on patches."""
    form, x = FORMS[name], random(2, 7, 3, seed=8)
    patches = lambda x: jnp.concatenate([x[:, :-1], x[:, 1:]], -1)  # noqa: E731
    call = Call("conv", x, patches(x) @ KERNEL, KERNEL, lambda x, w: patches(x) @ w)
    bias = form.delta_bias(KERNEL, None)
    expected = patches(x) @ (KERNEL + form.delta(KERNEL)) + (0 if bias is None else bias)
    np.testing.assert_allclose(form.apply(call), expected, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_zero_factors_change_nothing(name):
    if name == "dense":
        assert not Dense(KERNEL).delta(KERNEL).any()
        return
    zero = jax.tree.map(jnp.zeros_like, FORMS[name])
    call = dense_call(X, KERNEL)
    assert (zero.apply(call) == call.y).all() and not zero.delta(KERNEL).any()


@pytest.mark.parametrize("name", [n for n, f in FORMS.items() if f.record.low_rank])
def test_low_rank_forms_convert_exactly(name):
    form = FORMS[name].as_low_rank()
    assert isinstance(form, LowRank)
    np.testing.assert_allclose(form.delta(KERNEL), numpy_delta(name, FORMS[name]), atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_what_the_record_says(name):
    form = FORMS[name]
    stacked = jax.tree.map(lambda x: jnp.stack([x, x if jnp.issubdtype(x.dtype, jnp.integer) else 2 * x]), form)
    call, rows = dense_call(X, KERNEL), jnp.array([1, -1])
    if not form.record.rows:
        with pytest.raises(UnsupportedError, match="cannot apply a different adapter to each row"):
            apply_rows(stacked, rows, call)
        return
    got = apply_rows(stacked, rows, call)
    second = jax.tree.map(lambda x: x[1], stacked)
    np.testing.assert_allclose(got[0], second.apply(dense_call(X[0], KERNEL)), atol=1e-4)
    assert (got[1] == call.y[1]).all()
    with pytest.raises(ValueError, match="rows has 3 entries but the batch at this site has 2"):
        apply_rows(stacked, jnp.array([0, 1, 0]), call)


@pytest.mark.parametrize("name", [n for n in FORMS if n not in ("dense", "chain")])
def test_batch_axes_are_one_by_one(name):
    form = FORMS[name]
    two = [form, jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else -2 * x, form)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *two)
    kernels = jnp.stack([KERNEL, 2 * KERNEL])
    for n, one in enumerate(two):
        np.testing.assert_allclose(stacked.delta(kernels)[n], one.delta(kernels[n]), atol=1e-4)
        if (change := one.delta_bias(kernels[n], BIASES[n])) is not None:
            np.testing.assert_allclose(stacked.delta_bias(kernels, BIASES)[n], change, atol=1e-4)
    batched = Call("dense", X, jax.vmap(jnp.matmul)(X, kernels), kernels, jax.vmap(jnp.matmul))
    for n, one in enumerate(two):
        np.testing.assert_allclose(stacked.apply(batched)[n], one.apply(dense_call(X[n], kernels[n])), atol=1e-4)


@pytest.mark.parametrize("position", ["parallel", "sequential"])
def test_a_nonlinear_bottleneck_has_no_delta(position):
    part = PARALLEL if position == "parallel" else SEQUENTIAL
    form = NonlinearBottleneck(part.down, part.up, part.down_bias, part.up_bias, 0.5, 0.0, position, "gelu")
    call = dense_call(X, KERNEL, BIAS)
    source = X if position == "parallel" else call.y
    expected = call.y + 0.5 * (jax.nn.gelu(source @ part.down + part.down_bias) @ part.up + part.up_bias)
    np.testing.assert_allclose(form.apply(call), expected, atol=1e-4)
    with pytest.raises(UnsupportedError, match="'gelu' is not a linear update"):
        form.delta(KERNEL)
    assert not form.record.delta and form.record.rows


def test_a_bottleneck_drops_between_its_products_in_training_only():
    form = Bottleneck(jnp.eye(N_IN), jnp.eye(N_IN), scale=0.5, dropout=0.25)
    x = jnp.ones((400, N_IN))
    call = dense_call(x, jnp.zeros((N_IN, N_IN)))
    assert (form.apply(call) == 0.5).all()
    dropped = np.asarray(form.apply(call._replace(rng=jax.random.key(0))))
    np.testing.assert_allclose(np.unique(dropped), [0, 0.5 / 0.75], atol=1e-6)
    # 2400 draws: the standard error of the share kept is 0.009.
    assert abs((dropped > 0).mean() - 0.75) < 0.03
    two = np.asarray(Branches((form, form)).apply(call._replace(rng=jax.random.key(0))))
    # One of two branches kept somewhere: they do not drop alike.
    np.testing.assert_allclose(np.unique(two), [0, 0.5 / 0.75, 1 / 0.75], atol=1e-6)


@pytest.mark.parametrize("name", ["bottleneck biased", "bottleneck sequential biased", "bottleneck input biased"])
def test_a_bottleneck_multiplies_in_the_dtype_of_the_model(name):
    """Float32 factors on a bfloat16 model make no float32 copy of anything as wide as the model."""
    x, kernel = X.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16)
    run = lambda form, x: form.apply(dense_call(x, kernel, BIAS.astype(jnp.bfloat16)))  # noqa: E731
    assert run(FORMS[name], x).dtype == jnp.bfloat16
    program = jax.make_jaxpr(jax.grad(lambda *args: run(*args).astype(jnp.float32).sum(), argnums=1))(FORMS[name], x)
    wide = [v.aval for e in program.eqns if e.primitive.name == "dot_general" for v in e.invars]
    assert {v.dtype for v in wide} == {jnp.dtype(jnp.bfloat16)}


def test_leaves_shard_like_their_kernels():
    site = lr.Site(
        "w", "dense", (2, 8, 4, 4), "float32", (0,), (1,), (2, 3), (0,), True, P(None, "fsdp", "tensor", None)
    )
    a, b = Leaf((8, 3), ("in", "rank")), Leaf((3, 16), ("rank", "out"))
    assert leaf_spec(a, site) == P(None, "fsdp", None) and leaf_spec(b, site) == P(None, None, "tensor")
    later = lr.Site(
        "w", "dense", (2, 8, 4, 4), "float32", (0,), (1,), (2, 3), (0,), True, P("data", None, None, "tensor")
    )
    assert leaf_spec(b, later) == P("data", None, None)
    assert leaf_spec(a, lr.Site("w", "dense", (8, 4), "float32", (), (0,), (1,))) is None


def test_a_leaf_of_one_side_is_divided_over_the_axes_of_the_other_too():
    mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
    site = lr.Site("w", "dense", (512, 516), "float32", (), (0,), (1,), spec=P("fsdp", "tensor"))
    spec = lambda *axes, shape: leaf_spec(Leaf(shape, axes), site, mesh)  # noqa: E731
    assert spec("in", "rank", shape=(512, 16)) == P(("fsdp", "tensor"), None)
    assert spec("rank", "out", shape=(16, 516)) == P(None, "tensor"), "516 does not divide by 8"
    assert spec("rank", "rank", shape=(64, 64)) == P(None, None) and spec("in", "out", shape=(512, 516)) == site.spec
    assert spec("in", shape=(512,)) == P("fsdp"), "small ones are not worth a collective"
