"""What is special to the NNX bridge."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lowrank_jax as lr
from lowrank_jax import nnx as bridge

X = jax.random.normal(jax.random.key(7), (3, 4))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Stack(nnx.Module):
    """Three blocks made by nnx.vmap and run by nnx.scan over nnx.remat."""

    def __init__(self, rngs, axis=0, by_type=False):
        self.axis, self.by_type = axis, by_type
        axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=(0,), out_axes=axes))(rngs)

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.Param: self.axis, ...: None}) if self.by_type else self.axis

        @nnx.scan(in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def step(layer, x):
            return layer(x)

        return step(self.layers, x)


class Experts(nnx.Module):
    """An einsum with a batch axis of its own."""

    def __init__(self, rngs):
        self.up = nnx.Einsum("ebi,eio->ebo", (2, 4, 4), rngs=rngs)

    def __call__(self, x):
        return self.up(jnp.stack([x, -x])).sum(0)


def random_adapters(model, method, pattern=".*", seed=1, args=()):
    params, found = bridge.params(model), bridge.sites(model, *args)
    sites = {path: site for path, site in found.items() if site.kind != "param"}
    plan = lr.plan(params, {pattern: method}, sites=sites)
    adapters = lr.init(jax.random.key(seed), params, plan)
    moved = [
        0.2 * jax.random.normal(jax.random.key(seed + n), x.shape) for n, x in enumerate(jax.tree.leaves(adapters))
    ]
    return jax.tree.map(lambda x, d: x + d, adapters, jax.tree.unflatten(jax.tree.structure(adapters), moved))


def with_weights(model, params):
    copy = nnx.clone(model)
    nnx.update(copy, params)
    return copy


def assert_close(actual, expected):
    jax.tree.map(
        lambda a, b: jax.numpy.allclose(a, b, rtol=1e-5, atol=1e-5) or pytest.fail(f"{a}\n{b}"), actual, expected
    )


MODELS = {
    "linear": (lambda r: nnx.Linear(4, 5, rngs=r), X),
    "general": (lambda r: nnx.LinearGeneral((2, 4), (3, 2), axis=(-2, -1), rngs=r), jnp.ones((3, 2, 4)) * X[:, None]),
    "general batch": (lambda r: nnx.LinearGeneral(4, 5, axis=-1, batch_axis={0: 3}, rngs=r), jnp.stack([X, X + 1], 1)),
    "einsum": (lambda r: nnx.Einsum("bi,ioh->bho", (4, 2, 3), (2, 3), rngs=r), X),
    "experts": (Experts, X),
    "attention": (lambda r: nnx.MultiHeadAttention(2, 4, decode=False, rngs=r), X[None]),
    "scanned": (Stack, X),
    "scanned on axis 1": (lambda r: Stack(r, axis=1), X),
    "scanned by type": (lambda r: Stack(r, by_type=True), X),
    "conv 1d": (lambda r: nnx.Conv(4, 5, (3,), strides=2, rngs=r), X[None]),
    "conv causal": (lambda r: nnx.Conv(4, 5, (3,), padding="CAUSAL", rngs=r), X[None]),
    "conv 2d": (lambda r: nnx.Conv(4, 5, (3, 2), padding="CIRCULAR", rngs=r), jnp.stack([X, X + 1])[None]),
    "conv valid": (lambda r: nnx.Conv(4, 5, (2,), padding="VALID", use_bias=False, rngs=r), X[None]),
}


@pytest.mark.parametrize("name", MODELS)
def test_adapted_output_is_the_merged_models(name):
    make, x = MODELS[name]
    model = make(nnx.Rngs(0))
    adapters = random_adapters(model, lr.lora(rank=2))
    params = bridge.params(model)
    expected = with_weights(model, lr.merge(params, adapters))(x)
    assert_close(bridge.apply(model, params, adapters, x), expected)
    assert not jnp.allclose(model(x), expected)
    if name == "scanned by type":  # that model does not know the type of the factors
        with pytest.raises(ValueError, match="give lowrank_jax.nnx.Factor the axes of nnx.Param"):
            bridge.attach(model, adapters)(x)
    else:
        assert_close(bridge.attach(model, adapters)(x), expected)


@pytest.mark.parametrize("name", ["linear", "attention", "scanned", "scanned on axis 1", "conv 1d"])
def test_rows_have_their_own_adapters(name):
    make, x = MODELS[name]
    model = make(nnx.Rngs(0))
    x = jnp.stack([x[0], x[0] + 1, x[0] * 2])
    params = bridge.params(model)
    two = [random_adapters(model, lr.lora(rank=2), seed=seed) for seed in (1, 50)]
    for rows in ([1, -1, 0], [0, 0, 1]):  # eagerly, twice: no transform may reuse the first call's rows
        out = bridge.apply(model, params, lr.stack(two), x, rows=jnp.array(rows))
        for n, row in enumerate(rows):
            expected = model(x[n : n + 1]) if row < 0 else bridge.apply(model, params, two[row], x[n : n + 1])
            assert_close(out[n], expected[0])


def test_gradients_reach_exactly_the_trained_leaves():
    model = Stack(nnx.Rngs(0))
    params = bridge.params(model)
    train, frozen = lr.partition(random_adapters(model, lr.lamda(rank=2)))

    @jax.jit
    def loss(train, params):
        return jnp.sum(bridge.apply(model, params, lr.join(train, frozen), X) ** 2)

    @jax.jit
    def merged_loss(train, params):
        return jnp.sum(with_weights(model, lr.merge(params, lr.join(train, frozen)))(X) ** 2)

    gradient = jax.grad(loss)(train, params)
    assert {path: set(leaves) for path, leaves in gradient.items()} == {
        p: {"b", "m"} for p in ("layers/up/kernel", "layers/down/kernel")
    }
    expected = jax.grad(merged_loss)(train, params)
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-4, atol=1e-4), gradient, expected))


def test_equal_plans_do_not_compile_again():
    model, traces = nnx.Linear(4, 5, rngs=nnx.Rngs(0)), []

    @jax.jit
    def run(params, adapters):
        traces.append(1)
        return bridge.apply(model, params, adapters, X)

    for seed in (1, 2):
        run(bridge.params(model), random_adapters(model, lr.lora(rank=2), seed=seed))
    assert len(traces) == 1


def test_the_model_is_untouched_and_keeps_its_paths():
    model = Stack(nnx.Rngs(0))
    before, graph = nnx.to_pure_dict(nnx.state(model)), nnx.graphdef(model)
    adapters = random_adapters(model, lr.lora(rank=2))
    bridge.apply(model, bridge.params(model), adapters, X, rng=jax.random.key(0))
    adapted = bridge.attach(model, adapters)
    assert nnx.graphdef(model) == graph
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), nnx.to_pure_dict(nnx.state(model)), before))
    assert jax.tree.structure(bridge.params(adapted)) == jax.tree.structure(bridge.params(model))
    assert isinstance(adapted.layers.up, nnx.Linear)


def test_attach_shares_the_weights_and_refuses_a_second_adapter():
    model = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    adapters = random_adapters(model, lr.lora(rank=2))
    adapted = bridge.attach(model, adapters)
    assert adapted.kernel.get_value().unsafe_buffer_pointer() == model.kernel.get_value().unsafe_buffer_pointer()
    with pytest.raises(ValueError, match="already carries an adapter"):
        bridge.attach(adapted, adapters)
    with pytest.raises(lr.forms.UnsupportedError, match="rows"):
        bridge.attach(model, lr.stack([adapters]))


def test_dense_route_weights_are_laid_in():
    model = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    params = bridge.params(model)
    plan = lr.plan(params, {"kernel|bias": lr.full()}, sites=bridge.sites(model))
    adapters = jax.tree.map(lambda x: x + 1, lr.init(jax.random.key(0), params, plan))
    assert_close(bridge.apply(model, params, adapters, X), X @ (params["kernel"] + 1) + 1)
    assert_close(bridge.attach(model, adapters)(X), X @ (params["kernel"] + 1) + 1)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.block = nnx.Embed(6, 4, rngs=rngs), Block(rngs)
        self.again = self.block  # a module at two places

    def __call__(self, ids):
        return self.embed.attend(self.again(self.block(self.embed(ids))))


def test_a_weight_used_twice_has_one_adapter():
    model, ids = Tied(nnx.Rngs(0)), jnp.array([[0, 1], [4, 5], [2, 2]])
    assert {p for p in bridge.sites(model) if p.endswith(("kernel", "embedding"))} == {
        "again/up/kernel", "again/down/kernel", "embed/embedding",
    }  # fmt: skip
    assert jax.tree.structure(bridge.params(model)) == jax.tree.structure(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    two = [random_adapters(model, lr.lora(rank=2), seed=seed) for seed in (1, 50)]
    params = bridge.params(model)
    expected = with_weights(model, lr.merge(params, two[0]))(ids)
    assert_close(bridge.apply(model, params, two[0], ids), expected)
    assert_close(bridge.attach(model, two[0])(ids), expected)
    assert_close(bridge.apply(model, params, lr.stack(two), ids, rows=jnp.array([0, -1, 1]))[0], expected[0])


def test_own_module_in_three_lines():
    class Projection(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jax.random.normal(rngs(), (5, 4)))

        def project(self, scale, x):
            return scale * (x @ self.w[...].T)

    model = Projection(nnx.Rngs(0))
    params = bridge.params(model)
    assert bridge.sites(model)["w"].kind == "param"
    with pytest.raises(ValueError, match="lowrank_jax.nnx.sites"):
        lr.plan(params, {"w": lr.lora(rank=2)}, sites=bridge.sites(model))
    bridge.register(Projection, "w", lambda module, x, scale=1: "...i,oi->...o", methods=("project",), argument=1)
    site = bridge.sites(model)["w"]
    assert (site.kind, site.n_in, site.n_out, site.factored) == ("dense", 4, 5, True)
    adapters = random_adapters(model, lr.lora(rank=2))
    assert_close(
        bridge.apply(model, params, adapters, 1.0, X, method="project"),
        with_weights(model, lr.merge(params, adapters)).project(1.0, X),
    )
    assert_close(
        bridge.apply(model, params, adapters, X, method=lambda m, x: m.project(1.0, x)),
        bridge.attach(model, adapters).project(1.0, X),
    )


class Doubled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Raw(nnx.Linear):
    def __call__(self, x):
        return x @ self.kernel[...]


def test_a_subclass_is_adapted_where_its_base_multiplies():
    model = Doubled(4, 5, rngs=nnx.Rngs(0))
    adapters = random_adapters(model, lr.lora(rank=2))
    merged = with_weights(model, lr.merge(bridge.params(model), adapters))
    assert_close(bridge.apply(model, bridge.params(model), adapters, X), merged(X))


def test_an_adapter_that_is_not_applied_is_an_error():
    model = Raw(4, 5, rngs=nnx.Rngs(0))
    params, adapters = bridge.params(model), random_adapters(model, lr.lora(rank=2))
    with pytest.raises(ValueError, match="kernel was not applied"):
        bridge.apply(model, params, adapters, X)
    assert_close(bridge.apply(model, params, adapters, X, unused="ignore"), model(X))
    with pytest.raises(ValueError, match="expected 'error' or 'ignore'"):
        bridge.apply(model, params, adapters, X, unused="no")


def test_errors_name_the_weight():
    model = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    params, adapters = bridge.params(model), random_adapters(model, lr.lora(rank=2))
    with pytest.raises(ValueError, match="rows and a stack of adapters go together"):
        bridge.apply(model, params, adapters, X, rows=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="other is no weight of this Linear"):
        bridge.apply(model, {**params, "other": X}, adapters, X)
    with pytest.raises(ValueError, match="kernel has shape"):
        bridge.attach(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), adapters)
    with pytest.raises(TypeError, match="positional argument 0"):
        bridge.apply(model, params, adapters, inputs=X)


def test_grouped_convolutions_say_so():
    model = nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=nnx.Rngs(0))
    assert bridge.sites(model)["kernel"].factored is False


def test_an_equation_given_by_the_call_needs_a_trace():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.proj = nnx.Einsum("bi,io->bo", (4, 5), rngs=rngs)
            self.proj.einsum_str = None

        def __call__(self, x):
            return self.proj(x, "bi,io->bo")

    linear = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    assert bridge.sites(linear, X) == bridge.sites(linear)
    model = Model(nnx.Rngs(0))
    assert bridge.sites(model)["proj/kernel"].factored is False
    assert bridge.sites(model, X)["proj/kernel"].factored is True
    adapters = random_adapters(model, lr.lora(rank=2), args=(X,))
    merged = with_weights(model, lr.merge(bridge.params(model), adapters))
    assert_close(bridge.apply(model, bridge.params(model), adapters, X), merged(X))


def test_an_abstract_model_holds_no_weights():
    model = Stack(nnx.Rngs(0))
    abstract = nnx.eval_shape(lambda: Stack(nnx.Rngs(0)))
    adapters = random_adapters(model, lr.lora(rank=2))
    assert bridge.sites(abstract) == bridge.sites(model)
    assert_close(
        bridge.apply(abstract, bridge.params(model), adapters, X),
        bridge.apply(model, bridge.params(model), adapters, X),
    )


def test_dropout_follows_the_key_and_differs_between_layers():
    model = Stack(nnx.Rngs(0))
    params, adapters = bridge.params(model), random_adapters(model, lr.lora(rank=2, dropout=0.5))
    run = lambda key: bridge.apply(model, params, adapters, X, rng=key)  # noqa: E731
    assert_close(run(jax.random.key(0)), run(jax.random.key(0)))
    assert not jnp.allclose(run(jax.random.key(0)), run(jax.random.key(1)))
    assert_close(bridge.apply(model, params, adapters, X), bridge.attach(model, adapters)(X))
    keys = bridge._keys(jax.random.key(0), adapters.plan.entries[0].site)
    assert len({tuple(data.tolist()) for data in jax.random.key_data(keys)}) == 3


def test_rng_reseeds_the_models_own_streams():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.up, self.drop = nnx.Linear(4, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.up(x))

    model = Noisy(nnx.Rngs(0))
    params, adapters = bridge.params(model), random_adapters(model, lr.lora(rank=2))
    run = lambda key: bridge.apply(model, params, adapters, X, rng=key)  # noqa: E731
    assert_close(run(jax.random.key(0)), run(jax.random.key(0)))
    assert not jnp.allclose(run(jax.random.key(0)), run(jax.random.key(1)))
