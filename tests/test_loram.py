"""LoRAM: what is cut, that the small model is the large one without it, and that an adapter finds its way back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import adapt, kernel, params_of

import lowrank_jax as lr
from lowrank_jax.forms import UnsupportedError
from lowrank_jax.models import BertConfig, LlamaConfig, build, param_shapes
from lowrank_jax.sites import flatten, with_leaves

TOKENS = jax.random.randint(jax.random.key(9), (2, 6), 0, 97)
ATTENTION, MLP, LINEAR = r".*/attention", r".*/mlp", r".*/(attention|mlp)/.*"
LLAMA = LlamaConfig.tiny(num_attention_heads=8, num_key_value_heads=4, head_dim=8, qkv_bias=True, architecture="qwen2")
BERT = BertConfig.tiny(task="classify", num_labels=3)
# Our BERT has no width of a head of its own, so only its features can go.
CUT = {
    "llama": (LLAMA, {ATTENTION: lr.loram.heads(4, 0.5), MLP: lr.loram.features(0.5)},
              {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": LLAMA.intermediate_size // 2}),
    "bert": (BERT, {MLP: lr.loram.features(0.25)}, {"intermediate_size": BERT.intermediate_size // 4}),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model, its small one, and what is kept."""

    model: object
    params: dict
    kept: dict
    small_model: object
    small: dict

    @classmethod
    def of(cls, name, scan=False, by="random"):
        config, rules, fields = CUT[name]
        config = dataclasses.replace(config, scan_layers=scan)
        model, small_model = build(config), build(dataclasses.replace(config, **fields))
        params = random_params(config)
        sites = lr.linen.sites(model, params, TOKENS)
        kept = lr.loram.choose(jax.random.key(0), params, rules, by, sites)
        return cls(model, params, kept, small_model, lr.loram.prune(params, kept))

    def lora(self, of_small=True, moved=True):
        """A LoRA on every linear weight of the blocks; ``moved``: with random factors."""
        model, params = (self.small_model, self.small) if of_small else (self.model, self.params)
        sites = lr.linen.sites(model, params, TOKENS)
        adapters = lr.init(jax.random.key(2), params, lr.plan(params, {LINEAR: lr.lora(rank=3, alpha=6)}, sites=sites))
        draw = lambda x: 0.3 * kernel(*x.shape, seed=x.size)  # noqa: E731
        return adapters.replace(sites=jax.tree.map(draw, adapters.sites)) if moved else adapters


def random_params(config):
    flat = flatten(param_shapes(config))
    draw = lambda n, path, s: (path.endswith("scale") + 0.3 * kernel(*s.shape, seed=n)).astype(jnp.float32)  # noqa: E731
    return with_leaves(param_shapes(config), {path: draw(n, path, s) for n, (path, s) in enumerate(flat.items())})


def without_what_is_cut(pair):
    """The large model in which nothing reads what is cut."""
    flat, new = flatten(pair.params), {}
    for path, one in pair.kept.items():
        if one.inputs is not None:
            keep = np.zeros((*one.inputs.shape[:-1], one.site.n_in), bool)
            np.put_along_axis(keep, one.inputs, True, -1)
            new[path] = flat[path] * keep[..., None]
    return with_leaves(pair.params, new)


@pytest.mark.parametrize("by", ["random", "magnitude"])
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", CUT)
def test_a_recovered_adapter_acts_on_the_large_model_as_the_trained_one_on_the_small(name, scan, by):
    pair = Pair.of(name, scan, by)
    assert any((np.diff(one.outputs) > 1).any() for one in pair.kept.values() if one.outputs is not None)
    cut = without_what_is_cut(pair)
    small = pair.small_model.apply({"params": pair.small}, TOKENS)
    np.testing.assert_allclose(small, pair.model.apply({"params": cut}, TOKENS), rtol=1e-3, atol=1e-4)
    adapters = pair.lora()
    expected = lr.linen.apply(pair.small_model, pair.small, adapters, TOKENS)
    got = lr.linen.apply(pair.model, cut, lr.loram.recover(adapters, pair.kept, pair.params), TOKENS)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected - small).max() > 0.1


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_the_update_is_the_small_one_where_something_is_kept_and_zero_elsewhere(scan):
    pair = Pair.of("llama", scan)
    adapters = pair.lora()
    recovered = lr.loram.recover(adapters, pair.kept, pair.params)
    forms, small_forms = lr.expand(recovered), lr.expand(adapters)
    assert set(forms) == set(pair.kept)
    for path, one in pair.kept.items():
        large, small = (np.asarray(f[path].delta(None)) for f in (forms, small_forms))
        assert large.shape[-2:] == (one.site.n_in, one.site.n_out)
        for n, (whole, part) in enumerate(zip(*(x.reshape(-1, *x.shape[-2:]) for x in (large, small)), strict=True)):
            rows, columns = (
                np.arange(size) if p is None else p.reshape(-1, p.shape[-1])[n]
                for p, size in zip((one.inputs, one.outputs), whole.shape, strict=True)
            )
            block = np.ix_(rows, columns)
            np.testing.assert_allclose(whole[block], part, atol=1e-6)
            assert np.count_nonzero(whole) == np.count_nonzero(part) == part.size


def test_a_head_trained_in_full_stays_as_it_is():
    pair = Pair.of("bert")
    sites = lr.linen.sites(pair.small_model, pair.small, TOKENS)
    plan = lr.plan(pair.small, {r".*/mlp/.*": lr.lora(2), "classifier": lr.full()}, sites=sites)
    adapters = lr.init(jax.random.key(0), pair.small, plan)
    adapters = adapters.replace(sites=jax.tree.map(lambda x: x + 1, adapters.sites))
    recovered = lr.loram.recover(adapters, pair.kept, pair.params)
    np.testing.assert_array_equal(*jax.tree.leaves([a.sites["classifier/kernel"] for a in (recovered, adapters)]))
    assert recovered.sites["encoder/layers_0/mlp/output/kernel"]["a"].shape[0] == BERT.intermediate_size


def test_query_heads_go_with_their_key_value_head():
    pair = Pair.of("llama")
    flat = {path.split("/")[-2]: one for path, one in pair.kept.items() if path.startswith("layers_0/attention")}
    key_heads, query_heads = np.unique(flat["k_proj"].outputs // 8), np.unique(flat["q_proj"].outputs // 8)
    assert len(key_heads) == 2 and query_heads.tolist() == [h for k in key_heads for h in (2 * k, 2 * k + 1)]
    assert flat["o_proj"].inputs.tolist() == flat["q_proj"].outputs.tolist()
    assert flat["v_proj"].outputs.tolist() == flat["k_proj"].outputs.tolist()
    layers = [one.outputs.tolist() for path, one in pair.kept.items() if path.endswith("up_proj/kernel")]
    assert layers[0] != layers[1]


def test_magnitude_keeps_the_largest_units():
    weight = {"up_proj": kernel(5, 6), "down_proj": kernel(6, 4, seed=1)}
    params = {"mlp": {name: {"kernel": w} for name, w in weight.items()}}
    kept = lr.loram.choose(jax.random.key(0), params, {"mlp": lr.loram.features(0.5)}, by="magnitude")
    score = (np.asarray(weight["up_proj"]) ** 2).sum(0) + (np.asarray(weight["down_proj"]) ** 2).sum(1)
    assert kept["mlp/up_proj/kernel"].outputs.tolist() == sorted(np.argsort(-score)[:3])


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_cutting_a_recovered_adapter_gives_it_back(scan):
    pair = Pair.of("llama", scan)
    adapters = pair.lora()
    back = lr.loram.shrink(lr.loram.recover(adapters, pair.kept, pair.params), pair.kept, pair.small)
    assert back.plan == adapters.plan
    for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(adapters), strict=True):
        assert one.dtype == two.dtype and (one == two).all()


@pytest.mark.parametrize("fill", ["zero", "normal"])
def test_an_untrained_adapter_leaves_the_large_model_alone(fill):
    pair = Pair.of("llama")
    key = {"key": jax.random.key(4)} if fill == "normal" else {}
    recovered = lr.loram.recover(pair.lora(moved=False), pair.kept, pair.params, fill, **key)
    a = np.asarray(recovered.sites["layers_0/mlp/down_proj/kernel"]["a"])
    cut = np.setdiff1d(np.arange(len(a)), pair.kept["layers_0/mlp/down_proj/kernel"].inputs)
    if fill == "normal":
        np.testing.assert_allclose(a[cut].std(), 1 / 3, rtol=0.15)
    else:
        assert not a[cut].any()
    base = pair.model.apply({"params": pair.params}, TOKENS)
    assert (lr.linen.apply(pair.model, pair.params, recovered, TOKENS) == base).all()


def test_trained_small_used_large():
    """What a LoRA learns on the small model also lowers the loss of the whole one."""
    pair = Pair.of("llama", scan=True)
    train, frozen = lr.partition(pair.lora(moved=False))
    adapters = lr.join(train, frozen)
    assert adapters.plan.trainable == sum(
        2 * 3 * (one.small.n_in + one.small.n_out) for one in pair.kept.values()
    )  # fmt: skip

    def loss(train, frozen, model, params):
        logits = lr.linen.apply(model, params, lr.join(train, frozen), TOKENS[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    tx = optax.adam(1e-2)
    state = tx.init(train)
    step = jax.jit(jax.grad(lambda train: loss(train, frozen, pair.small_model, pair.small)))
    for _ in range(30):
        updates, state = tx.update(step(train), state)
        train = optax.apply_updates(train, updates)
    recovered = lr.loram.recover(lr.join(train, frozen), pair.kept, pair.params)
    assert recovered.plan.trainable == sum(2 * 3 * (o.site.n_in + o.site.n_out) for o in pair.kept.values())
    before, after = (
        loss(*lr.partition(a), pair.model, pair.params)
        for a in (lr.loram.recover(adapters, pair.kept, pair.params), recovered)
    )
    assert after < 0.9 * before
    merged = lr.merge(pair.params, recovered)
    logits = pair.model.apply({"params": merged}, TOKENS)
    np.testing.assert_allclose(logits, lr.linen.apply(pair.model, pair.params, recovered, TOKENS), rtol=1e-3, atol=1e-3)


def test_layers_of_a_stack_are_recovered_by_number():
    pair = Pair.of("llama", scan=True)
    sites = lr.linen.sites(pair.small_model, pair.small, TOKENS)
    plan = lr.plan(pair.small, {LINEAR: lr.on_layers(lr.lora(rank=3), [1])}, sites=sites)
    adapters = lr.init(jax.random.key(0), pair.small, plan)
    adapters = adapters.replace(sites=jax.tree.map(jnp.ones_like, adapters.sites))
    recovered = lr.loram.recover(adapters, pair.kept, pair.params)
    one = pair.kept["layers/mlp/down_proj/kernel"]
    a = np.asarray(recovered.sites["layers/mlp/down_proj/kernel"]["a"])
    assert a.shape[0] == 1 and np.flatnonzero(a[0, :, 0]).tolist() == one.inputs[1].tolist() != one.inputs[0].tolist()


def test_sparsify_keeps_the_largest_entries():
    weight = kernel(2, 8, 6)
    half = np.asarray(lr.loram.sparsify(params_of(weight), {"layer/kernel": 0.25})["layer"]["kernel"])
    for w, s in zip(np.asarray(weight), half, strict=True):
        limit = np.sort(np.abs(w).reshape(-1))[-12]
        assert (s == np.where(np.abs(w) >= limit, w, 0)).all()
    pairs = np.asarray(lr.loram.sparsify(params_of(weight), {"layer": (2, 4)})["layer"]["kernel"])
    groups = pairs.reshape(2, 2, 4, 6)
    assert ((groups != 0).sum(2) == 2).all() and ((pairs == weight) | (pairs == 0)).all()
    assert (
        np.abs(groups).sum(2) == np.sort(np.abs(np.asarray(weight)).reshape(2, 2, 4, 6), axis=2)[:, :, 2:].sum(2)
    ).all()


def test_an_adapter_of_the_sparse_model_serves_the_dense_one():
    weight = kernel(8, 6)
    sparse = lr.loram.sparsify(params_of(weight), {"layer": (2, 4)})
    adapters = adapt(sparse["layer"]["kernel"], lr.lora(rank=2))
    adapters = adapters.replace(sites=jax.tree.map(lambda x: x + 1, adapters.sites))
    merged = lr.merge(params_of(weight), adapters)["layer"]["kernel"]
    np.testing.assert_allclose(
        merged - weight, lr.merge(sparse, adapters)["layer"]["kernel"] - sparse["layer"]["kernel"], atol=1e-5
    )


def test_refusals_name_what_is_wrong():
    pair = Pair.of("llama")
    key, adapters = jax.random.key(0), pair.lora()
    choose = lambda rules, **how: lr.loram.choose(key, pair.params, rules, **how)  # noqa: E731
    with pytest.raises(ValueError, match="Nearest paths: .*mlp"):
        choose({".*/mlpp": lr.loram.features(0.5)})
    with pytest.raises(ValueError, match="k_proj/kernel has shape .*: axis 1 is not 5 equal units"):
        choose({ATTENTION: lr.loram.heads(5, 0.5)})
    with pytest.raises(ValueError, match="keep=0"):
        choose({MLP: lr.loram.features(0)})
    with pytest.raises(ValueError, match=r"choose\(by='size'\)"):
        choose({MLP: lr.loram.features(0.5)}, by="size")
    with pytest.raises(ValueError, match=r"recover\(fill='normal'\): expected 'zero', or 'normal' with a key"):
        lr.loram.recover(adapters, pair.kept, pair.params, fill="normal")
    with pytest.raises(ValueError, match="layers_0/attention/k_proj/kernel: the adapter is for a weight of shape"):
        lr.loram.recover(pair.lora(of_small=False), pair.kept, pair.params)
    path = next(iter(pair.kept))
    plan = lr.plan(pair.small, {path: lr.pissa(rank=2)}, sites=lr.linen.sites(pair.small_model, pair.small, TOKENS))
    with pytest.raises(UnsupportedError, match=f"{path}: LoRAM is for lora, not for pissa"):
        lr.loram.recover(lr.init(jax.random.key(0), pair.small, plan), pair.kept, pair.params)
    with pytest.raises(ValueError, match="layer/kernel has 8 x 6 entries: cannot keep"):
        lr.loram.sparsify(params_of(kernel(8, 6)), {"layer": (2, 3)})
    with pytest.raises(ValueError, match="cannot keep 0.0 of them"):
        lr.loram.sparsify(params_of(kernel(8, 6)), {"layer": 0.0})
