"""What is special to the Linen bridge."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lr
from lowrank_jax import linen as bridge

X = jax.random.normal(jax.random.key(7), (3, 4))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(4, name="down")(jnp.tanh(nn.Dense(8, name="up")(x))), None


class Stack(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            nn.remat(Block), variable_axes={"params": self.axis}, split_rngs={"params": True, "dropout": True}, length=3
        )
        return scan(name="layers")(x, None)[0]


class Expert(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Einsum((2, 4, 4), "ebi,eio->ebo", use_bias=False, name="up")(jnp.stack([x, -x])).sum(0)
        per_expert = nn.vmap(
            nn.Dense, in_axes=None, axis_size=2, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        return x + per_expert(4, name="experts")(y).mean(0), None


class ScanOfExperts(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.scan(Expert, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="layers")(
            x, None
        )[0]


class LateEinsum(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Einsum((4, 2, 3), use_bias=False, name="proj")(x, "bi,ioh->bho")


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, name="attention")(x, x)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, "model")))(x)


class Doubled(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


GENERAL_X = jnp.ones((3, 2, 4)) * X[:, None]
IMAGE = jnp.stack([X, X + 1])[None]
MODELS = {
    "general": (nn.DenseGeneral((3, 2), axis=(-2, -1)), GENERAL_X),
    "general batch": (nn.DenseGeneral(5, batch_dims=(0,)), GENERAL_X),
    "einsum": (nn.Einsum((4, 2, 3), "bi,ioh->bho"), X),
    "einsum of the call": (LateEinsum(), X),
    "attention": (Attention(), X[None]),
    "scanned": (Stack(), X),
    "scanned on axis 1": (Stack(axis=1), X),
    "scan of experts": (ScanOfExperts(), X),
    "remat": (nn.remat(nn.Dense)(5), X),
    "vmap": (nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(5), X),
    "jit": (nn.jit(nn.Dense)(5), X),
    "subclass": (Doubled(5), X),
    "conv 1d": (nn.Conv(5, (3,), strides=2), X[None]),
    "conv causal": (nn.Conv(5, (3,), padding="CAUSAL"), X[None]),
    "conv 2d": (nn.Conv(5, (3, 2), padding="CIRCULAR", kernel_dilation=(1, 2)), IMAGE),
    "conv 2d valid": (nn.Conv(5, (2, 2), padding="VALID", use_bias=False), IMAGE),
}


def parameters(model, *args):
    return model.init(jax.random.key(0), *args)["params"]


def random_adapters(model, params, args, method, seed=1):
    sites = {path: site for path, site in bridge.sites(model, params, *args).items() if site.kind != "param"}
    adapters = lr.init(jax.random.key(seed), params, lr.plan(params, {".*": method}, sites=sites))
    leaves, structure = jax.tree.flatten(adapters)
    moved = [x + 0.2 * jax.random.normal(jax.random.key(seed + n), x.shape) for n, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, moved)


def assert_close(actual, expected):
    assert jnp.allclose(actual, expected, rtol=1e-5, atol=1e-5), f"{actual}\n{expected}"


@pytest.mark.parametrize("name", MODELS)
def test_adapted_output_is_the_merged_models(name):
    model, x = MODELS[name]
    params = parameters(model, x)
    adapters = random_adapters(model, params, (x,), lr.lora(rank=2))
    expected = model.apply({"params": lr.merge(params, adapters)}, x)
    assert_close(bridge.apply(model, params, adapters, x), expected)
    assert not jnp.allclose(model.apply({"params": params}, x), expected)


@pytest.mark.parametrize("name", ["general", "einsum", "attention", "scanned", "scanned on axis 1", "jit", "conv 1d"])
def test_rows_have_their_own_adapters(name):
    model, x = MODELS[name]
    x = jnp.stack([x[0], x[0] + 1, x[0] * 2])
    params = parameters(model, x)
    two = [random_adapters(model, params, (x,), lr.lora(rank=2), seed) for seed in (1, 50)]
    for rows in ([1, -1, 0], [0, 0, 1]):  # eagerly, twice: no transform may reuse the first call's rows
        out = bridge.apply(model, params, lr.stack(two), x, rows=jnp.array(rows))
        for n, row in enumerate(rows):
            one = x[n : n + 1]
            expected = model.apply({"params": params}, one) if row < 0 else bridge.apply(model, params, two[row], one)
            assert_close(out[n], expected[0])


def test_stacks_are_found_by_their_axes():
    params = parameters(ScanOfExperts(), X)
    found = bridge.sites(ScanOfExperts(), params, X)
    up, experts = found["layers/up/kernel"], found["layers/experts/kernel"]
    assert (up.batch, up.scanned, experts.batch, experts.scanned) == ((0, 1), (0,), (0, 1), (0, 1))
    middle = bridge.sites(Stack(axis=1), parameters(Stack(axis=1), X), X)["layers/up/kernel"]
    assert (middle.batch, middle.inputs, middle.outputs, middle.scanned) == ((1,), (0,), (2,), (1,))


def test_sites_need_no_arrays_and_keep_static_arguments():
    class Switch(nn.Module):
        @nn.compact
        def __call__(self, x, train, name="a"):
            return nn.Dense(3, name=name)(x) if train else x

    model, x = Switch(), jax.ShapeDtypeStruct((3, 4), jnp.float32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((3, 4)), True, name="b"))["params"]
    assert bridge.sites(model, params, x, True, name="b")["b/kernel"].kind == "dense"


def test_gradients_reach_exactly_the_trained_leaves():
    model = Stack()
    params = parameters(model, X)
    train, frozen = lr.partition(random_adapters(model, params, (X,), lr.lamda(rank=2)))

    def loss(train):
        return jnp.sum(bridge.apply(model, params, lr.join(train, frozen), X) ** 2)

    def merged_loss(train):
        return jnp.sum(model.apply({"params": lr.merge(params, lr.join(train, frozen))}, X) ** 2)

    gradient = jax.jit(jax.grad(loss))(train)
    assert {p: set(leaves) for p, leaves in gradient.items()} == {
        f"layers/{n}/kernel": {"b", "m"} for n in ("up", "down")
    }
    expected = jax.jit(jax.grad(merged_loss))(train)
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-4, atol=1e-4), gradient, expected))


def test_equal_plans_do_not_compile_again():
    model, traces = nn.Dense(5), []
    params = parameters(model, X)

    @jax.jit
    def run(params, adapters):
        traces.append(1)
        return bridge.apply(model, params, adapters, X)

    for seed in (1, 2):
        run(params, random_adapters(model, params, (X,), lr.lora(rank=2), seed))
    assert len(traces) == 1


class Tied(nn.Module):
    def setup(self):
        self.embed, self.block = nn.Embed(6, 4), Block()

    def __call__(self, ids):
        twice = self.block(self.block(self.embed(ids))[0])[0]
        return self.embed.attend(twice)


def test_a_weight_used_twice_has_one_adapter():
    model, ids = Tied(), jnp.array([[0, 1], [4, 5], [2, 2]])
    params = parameters(model, ids)
    two = [random_adapters(model, params, (ids,), lr.lora(rank=2), seed) for seed in (1, 50)]
    assert set(two[0].sites) == {"embed/embedding", "block/up/kernel", "block/down/kernel"}
    expected = model.apply({"params": lr.merge(params, two[0])}, ids)
    assert_close(bridge.apply(model, params, two[0], ids), expected)
    assert_close(bridge.apply(model, params, lr.stack(two), ids, rows=jnp.array([0, -1, 1]))[0], expected[0])


def test_own_module_in_three_lines():
    class Projection(nn.Module):
        @nn.compact
        def __call__(self, equation, x):
            return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(), (5, 4)))

    model, args = Projection(), ("bi,oi->bo", X)
    params = parameters(model, *args)
    assert bridge.sites(model, params, *args)["w"].kind == "param"
    bridge.register(Projection, "w", lambda module, x, equation: equation, argument=1)
    site = bridge.sites(model, params, *args)["w"]
    assert (site.kind, site.n_in, site.n_out, site.factored) == ("dense", 4, 5, True)
    adapters = random_adapters(model, params, args, lr.lora(rank=2))
    assert_close(
        bridge.apply(model, params, adapters, *args), model.apply({"params": lr.merge(params, adapters)}, *args)
    )


def test_a_raw_matmul_is_named_by_the_plan():
    class Raw(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.normal(), (4, 5))

    params = parameters(Raw(), X)
    with pytest.raises(ValueError, match="w .*lora applies to .* weights only"):
        lr.plan(params, {"w": lr.lora(rank=2)}, sites=bridge.sites(Raw(), params, X))
    declared = lr.sites(params, declare={"w": "io"})
    with pytest.raises(ValueError, match="allow_dense"):
        lr.plan(params, {"w": lr.lora(rank=2)}, sites=declared)
    plan = lr.plan(params, {"w": lr.lora(rank=2)}, sites=declared, allow_dense=True)
    adapters = jax.tree.map(lambda x: x + 0.3, lr.init(jax.random.key(0), params, plan))
    assert_close(bridge.apply(Raw(), params, adapters, X), Raw().apply({"params": lr.merge(params, adapters)}, X))


def test_an_adapter_that_is_not_applied_is_an_error():
    class Skips(nn.Module):
        @nn.compact
        def __call__(self, x, skip=False):
            used, other = nn.Dense(3, name="used"), nn.Dense(3, name="other")
            return used(x) if skip else used(x) + other(x)

    model = Skips()
    params = parameters(model, X)
    adapters = random_adapters(model, params, (X,), lr.lora(rank=2))
    with pytest.raises(ValueError, match=r"other/kernel was not applied.*\(1 of 2 sites\)"):
        bridge.apply(model, params, adapters, X, skip=True)
    expected = model.apply({"params": lr.merge(params, adapters)}, X, skip=True)
    assert_close(bridge.apply(model, params, adapters, X, skip=True, unused="ignore"), expected)


def test_a_weight_read_two_ways_cannot_have_one_adapter():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            proj = nn.Einsum((4, 4), use_bias=False, name="proj")
            return proj(proj(x, "bi,io->bo"), "bi,oi->bo")

    params = parameters(Both(), X)
    with pytest.raises(ValueError, match="proj/kernel is used by two calls"):
        bridge.sites(Both(), params, X)


def test_parameters_are_untouched():
    model = Stack()
    params = parameters(model, X)
    before = jax.tree.map(jnp.copy, params)
    bridge.apply(model, params, random_adapters(model, params, (X,), lr.lora(rank=2)), X)
    assert jax.tree.structure(params) == jax.tree.structure(before)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, before))


def test_boxed_parameters_are_read_through_their_boxes():
    boxed = Boxed().init(jax.random.key(0), X)["params"]
    assert isinstance(boxed["Dense_0"]["kernel"], nn.Partitioned)
    params = nn.meta.unbox(boxed)
    adapters = random_adapters(Boxed(), params, (X,), lr.lora(rank=2))
    assert bridge.sites(Boxed(), boxed, X) == bridge.sites(Boxed(), params, X)
    assert_close(bridge.apply(Boxed(), boxed, adapters, X), Boxed().apply({"params": lr.merge(params, adapters)}, X))


def test_a_model_that_compiles_itself_never_reuses_anothers_trace():
    model = nn.jit(nn.Dense)(5)
    params = parameters(model, X)
    assert bridge.sites(model, params, X) == bridge.sites(model, params, X)
    plain, doubled = (random_adapters(model, params, (X,), lr.lora(rank=2, alpha=alpha)) for alpha in (2, 4))
    for adapters in (plain, doubled):
        assert_close(bridge.apply(model, params, adapters, X), model.apply({"params": lr.merge(params, adapters)}, X))
    run = bridge.adapted(model, plain)
    assert_close(run({"params": params}, X), run({"params": params}, X))


def test_grouped_convolutions_say_so():
    model = nn.Conv(6, (3,), feature_group_count=2)
    params = parameters(model, X[None])
    assert bridge.sites(model, params, X[None])["kernel"].factored is False


def test_dropout_needs_its_stream():
    model = Stack()
    params = parameters(model, X)
    adapters = random_adapters(model, params, (X,), lr.lora(rank=2, dropout=0.5))
    run = lambda **kw: bridge.adapted(model, adapters)({"params": params}, X, **kw)  # noqa: E731
    one, two = ({"dropout": jax.random.key(n)} for n in range(2))
    assert_close(run(), model.apply({"params": lr.merge(params, adapters)}, X))
    assert_close(run(rngs=one), run(rngs=one))
    assert not jnp.allclose(run(rngs=one), run(rngs=two))
