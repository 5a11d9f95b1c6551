"""Unmodified models of other projects, tiny and with random weights: google-tunix (NNX) and google-deepmind/gemma (Linen).

Each test runs where its package is installed; tests/parity/third_party.txt lists what that takes.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lowrank_jax as lr
from lowrank_jax import nnx as nnx_bridge

pytestmark = pytest.mark.parity
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def random_weights(params):
    """The models start matrices at 0 or nearly: every matrix is drawn instead."""
    leaves, structure = jax.tree.flatten(params)
    drawn = [0.3 * jax.random.normal(jax.random.key(n), x.shape) if x.ndim > 1 else x for n, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


def closest(actual, expected):
    return float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())


def check_training(params, plan, logits, plain):
    """Init is the base, a step moves the adapter and the loss, and merging gives the adapted model."""
    adapters = lr.init(jax.random.key(1), params, plan)
    # LaMDA's update is exactly zero here; what is left is how XLA fuses two programs, where a model compiles itself (gemma).
    assert closest(logits(params, adapters), plain(params)) < 1e-6

    train, frozen = lr.partition(adapters, 0, 100)
    optimizer = lr.optim.with_methods(optax.adam(1e-2), plan, 100)

    @jax.jit
    def step(train, state):
        def loss(train):
            scores = logits(params, lr.join(train, frozen))[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(scores, TOKENS[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(train)
        updates, state = optimizer.update(gradient, state, train)
        return optax.apply_updates(train, updates), state, value

    state, values = optimizer.init(train), []
    start = train
    for _ in range(4):
        train, state, value = step(train, state)
        values.append(float(value))
    assert values[-1] < values[0]
    for path, leaves in train.items():
        assert not jnp.array_equal(leaves["m"], start[path]["m"]), f"{path} did not move"

    trained = lr.join(train, frozen)
    assert closest(logits(params, trained), plain(params)) > 1e-3
    assert closest(logits(params, trained), plain(lr.merge(params, trained))) < 1e-5
    folded_params, folded = lr.fold(params, trained)
    assert closest(logits(folded_params, folded), logits(params, trained)) < 1e-4


@pytest.mark.parametrize("remat", ["NONE", "DECODER"])
def test_tunix_llama3(remat):
    llama3 = pytest.importorskip("tunix.models.llama3.model", reason="needs tests/parity/third_party.txt")
    config = llama3.ModelConfig(
        num_layers=2,
        vocab_size=32,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=4,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
        remat_config=llama3.RematConfig[remat],
    )
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    params = random_weights(nnx_bridge.params(model))
    nnx_bridge.register(llama3.Einsum, "w", lambda module, x: module.einsum_str)

    sites = nnx_bridge.sites(model)
    assert (sites["layers/1/attn/o_proj/w"].n_in, sites["layers/1/attn/o_proj/w"].n_out) == (16, 16)
    assert sites["layers/0/mlp/gate_proj/kernel"].factored and not sites["embedder/input_embedding"].factored
    with pytest.raises(ValueError, match="embedder/input_embedding"):  # a raw lookup inside the model's own module
        lr.plan(params, {"embedder": lr.lora(rank=2)}, sites=sites)
    plan = lr.plan(params, {r".*/(q|k|v|o|gate|up|down)_proj": lr.lamda(rank=2)}, sites=sites)
    assert len(plan.entries) == 2 * 7

    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (2, 6, 6))
    arguments = (TOKENS, positions, None, mask)

    def plain(params):
        copy = nnx.clone(model)
        nnx.update(copy, params)
        return copy(*arguments)[0]

    check_training(
        params, plan, lambda params, adapters: nnx_bridge.apply(model, params, adapters, *arguments)[0], plain
    )
    adapters = lr.init(jax.random.key(1), params, plan)
    copy = nnx.clone(model)
    nnx.update(copy, params)
    assert jnp.array_equal(nnx_bridge.attach(copy, adapters)(*arguments)[0], plain(params))


@pytest.mark.parametrize("transposed", [False, True])
def test_gemma(transposed):
    gemma = pytest.importorskip("gemma.gm.nn", reason="needs tests/parity/third_party.txt")
    config = gemma.config.TransformerConfig(
        num_embed=32,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=4,
        num_kv_heads=2,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL),
        sliding_window_size=4,
        transpose_gating_einsum=transposed,
        use_qk_norm=True,
    )
    model = gemma.Transformer(config=config, dtype=jnp.float32)
    params = random_weights(model.init(jax.random.key(0), TOKENS)["params"])
    lr.linen.register(gemma.Einsum, lambda module: module.weight_name, lambda module, x, equation: equation, argument=1)

    sites = lr.linen.sites(model, params, TOKENS)
    site = sites["layer_0/attn/kv_einsum/w"]
    assert (site.shape, site.n_in, site.n_out) == ((2, 2, 16, 4), 16, 16)
    assert sites["layer_1/mlp/gating_einsum"].n_in == 16 and sites["layer_1/mlp/linear"].n_in == 24
    assert not sites["embedder/input_embedding"].factored
    with pytest.raises(ValueError, match="embedder/input_embedding"):  # a raw lookup inside the model's own module
        lr.plan(params, {"embedder": lr.lora(rank=2)}, sites=sites)
    plan = lr.plan(params, {r".*/attn/.*_einsum|.*/mlp/(gating_einsum|linear)": lr.lamda(rank=2)}, sites=sites)
    assert len(plan.entries) == 2 * 5

    check_training(
        params,
        plan,
        lambda params, adapters: lr.linen.apply(model, params, adapters, TOKENS).logits,
        lambda params: model.apply({"params": params}, TOKENS).logits,
    )
