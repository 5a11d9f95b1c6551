"""GaLore through adapters: the same training as the transform's, with subspaces found by adapters' gradients alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import kernel

import lowrank_jax as lr
from lowrank_jax.models import LlamaConfig, build
from lowrank_jax.optim import galore
from lowrank_jax.optim.subspace import leading
from lowrank_jax.sites import flatten, with_leaves

LINEAR = r".*/(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
TOKENS = jax.random.randint(jax.random.key(1), (4, 12), 0, 97)


def llama(scan):
    config = LlamaConfig.tiny(scan_layers=scan)
    model = build(config)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    return model, params, lr.linen.sites(model, params, TOKENS)


def loss_of(model):
    def loss(params, adapters, tokens):
        logits = lr.linen.apply(model, params, adapters, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    return loss


def dense_gradient(model, params, tokens):
    def loss(params):
        logits = model.apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    return jax.grad(loss)(params)


@pytest.mark.parametrize("side", ["smaller", "larger", "both"])
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_the_subspaces_are_the_dense_gradients(scan, side):
    """Of every weight at once, stacked ones layer by layer; the gradient itself is formed here only to compare."""
    model, params, sites = llama(scan)
    plan = lr.plan(params, {LINEAR: lr.subspace_update(rank=3, side=side)}, sites=sites)
    adapters = lr.init(jax.random.key(0), params, plan)
    found = jax.jit(lambda p, a, t: lr.dual_galore.subspaces(loss_of(model), p, a, t, jax.random.key(5)))(
        params, adapters, TOKENS
    )
    assert set(found) == set(plan.by_path)
    gradient = flatten(dense_gradient(model, params, TOKENS))
    for path, bases in found.items():
        g = sites[path].canonical(gradient[path])
        exact = leading(g, 3, side, jax.random.key(0), "exact")
        for ours, theirs in zip(jax.tree.leaves(bases), jax.tree.leaves(exact), strict=True):
            overlap = np.linalg.svd(np.einsum("...ir,...is->...rs", ours, theirs), compute_uv=False)
            assert overlap.min() > 0.995, path
            assert np.abs(np.einsum("...ir,...is->...rs", ours, ours) - np.eye(3)).max() < 1e-4


@pytest.mark.parametrize("on_a_mesh", [False, True], ids=["alone", "mesh"])
def test_it_trains_as_the_transform_does(on_a_mesh):
    """Two refreshes after the first, Adam inside, moments kept."""
    model, params, sites = llama(True)
    if on_a_mesh:
        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = jax.tree.map(
            lambda x: jax.device_put(x, rows if x.ndim == 3 and x.shape[1] % 8 == 0 else whole), params
        )
    loss, scale, rate = loss_of(model), 0.5, 0.1
    batches = [jax.random.randint(jax.random.key(n), (4, 12), 0, 97) for n in range(9)]

    transform = galore(
        optax.scale_by_adam(eps=1e-3),
        3,
        scale=scale,
        refresh_every=4,
        targets=[LINEAR],
        sites=sites,
        svd="exact",
        stagger=False,
    )
    tx = optax.chain(transform, optax.scale_by_learning_rate(rate))
    weights, state = params, tx.init(params)
    plan = lr.plan(params, {LINEAR: lr.subspace_update(rank=3)}, sites=sites)

    @jax.jit
    def plain_step(weights, state, tokens):
        updates, state = tx.update(dense_gradient(model, weights, tokens), state, weights)
        still = {path: jnp.zeros_like(u) for path, u in flatten(updates).items() if path not in plan.by_path}
        return optax.apply_updates(weights, with_leaves(updates, still)), state

    dual_tx = optax.chain(optax.scale_by_adam(eps=1e-3), optax.scale(scale), optax.scale_by_learning_rate(rate))
    adapters = lr.init(jax.random.key(0), params, plan)
    train, _ = lr.partition(adapters)
    dual_state = dual_tx.init(train)
    refresh = jax.jit(lr.dual_galore.refresher(loss, power_iterations=4))

    @jax.jit
    def dual_step(base, adapters, state, tokens):
        train, frozen = lr.partition(adapters)
        gradients = jax.grad(lambda train: loss(base, lr.join(train, frozen), tokens))(train)
        updates, state = dual_tx.update(gradients, state, train)
        return lr.join(optax.apply_updates(train, updates), frozen), state

    base = params
    for step, tokens in enumerate(batches):
        weights, state = plain_step(weights, state, tokens)
        if step % 4 == 0:
            base, adapters = refresh(base, adapters, tokens, jax.random.key(step))
        adapters, dual_state = dual_step(base, adapters, dual_state, tokens)
        merged = flatten(lr.merge(base, adapters))
        for path, x in flatten(weights).items():
            np.testing.assert_allclose(merged[path], x, atol=2e-4 * (1 + step), err_msg=f"{path} at {step}")
    moved = max(np.abs(merged[path] - x).max() for path, x in flatten(params).items())
    assert moved > 0.05


def test_absorbing_leaves_the_model_what_it_is():
    model, params, sites = llama(True)
    plan = lr.plan(params, {LINEAR: lr.on_layers(lr.subspace_update(rank=2), [1]), "norm": lr.full()}, sites=sites)
    adapters = lr.init(jax.random.key(0), params, plan)
    adapters = adapters.replace(sites=jax.tree.map(lambda x: x + 0.1 * kernel(*x.shape, seed=3), adapters.sites))
    expected = lr.linen.apply(model, params, adapters, TOKENS)
    moved, rest = jax.jit(lr.dual_galore.absorb)(params, adapters)
    np.testing.assert_allclose(lr.linen.apply(model, moved, rest, TOKENS), expected, atol=1e-4)
    assert np.abs(model.apply({"params": moved}, TOKENS) - model.apply({"params": params}, TOKENS)).max() > 0.01
    flat, before = flatten(moved), flatten(params)
    for path in plan.by_path:
        if "r" in rest.sites[path]:
            assert not rest.sites[path]["r"].any() and (flat[path][0] == before[path][0]).all()
        else:
            assert (flat[path] == before[path]).all()


def test_no_dense_gradient_is_formed():
    """Neither a step nor a refresh holds an array as large as the stack of weights, other than the weights themselves."""
    model, params, sites = llama(True)
    plan = lr.plan(params, {LINEAR: lr.subspace_update(rank=2)}, sites=sites)
    adapters = lr.init(jax.random.key(0), params, plan)
    jaxpr = jax.make_jaxpr(
        lambda p, a, t: lr.dual_galore.subspaces(loss_of(model), p, a, t, jax.random.key(0), oversample=2)
    )(params, adapters, TOKENS)
    given = {tuple(v.aval.shape) for v in jaxpr.jaxpr.invars if v.aval.ndim == 3 and v.aval.size >= 1024}
    made = [v for v in _made(jaxpr.jaxpr) if tuple(getattr(v.aval, "shape", ())) in given]
    assert given and not made, {v.aval.str_short() for v in made}


def _made(jaxpr):
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _made(inner)
