"""Adapters written in the PEFT layout and read again: the same update, whatever the weight's kind and layout. Needs no torch."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax import models, peft
from lowrank_jax.models.tensors import open_safetensors
from lowrank_jax.sites import describe

PREFIX = "base_model.model."


def params_of(**shapes: tuple[int, ...]) -> dict:
    rng = np.random.default_rng(0)
    return {
        module: {"embedding" if module == "table" else "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for module, shape in shapes.items()
    }


def shaken(params, rules, sites=None, dtype=jnp.float32) -> lr.Adapters:
    """Adapters with every trained leaf moved, as after training."""
    adapters = lr.init(jax.random.key(0), params, lr.plan(params, rules, sites=sites), dtype)
    train, frozen = lr.partition(adapters)
    leaves, tree = jax.tree.flatten(train)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return lr.join(tree.unflatten(moved), frozen)


def tensors_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: np.array(t.read()) for name, t in open_safetensors(directory / "adapter_model.safetensors").items()}


def config_of(directory: pathlib.Path) -> dict:
    return json.loads((directory / "adapter_config.json").read_text())


def assert_same_update(a: lr.Adapters, b: lr.Adapters, params) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), lr.merge(params, a), lr.merge(params, b)
    )


def test_factors_are_written_in_torch_layout(tmp_path: pathlib.Path) -> None:
    params = params_of(query=(6, 4))
    adapters = shaken(params, {"query": lr.lora(rank=2, alpha=3)})
    peft.save(adapters, tmp_path / "out", name_map={"query": "layer.query"}, base_model_name_or_path="some/base")
    tensors, leaves = tensors_of(tmp_path / "out"), adapters.sites["query/kernel"]
    assert set(tensors) == {PREFIX + "layer.query.lora_A.weight", PREFIX + "layer.query.lora_B.weight"}
    np.testing.assert_array_equal(tensors[PREFIX + "layer.query.lora_A.weight"], leaves["a"].T)
    np.testing.assert_array_equal(tensors[PREFIX + "layer.query.lora_B.weight"], leaves["b"].T)
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 3, ["layer.query"])
    assert config["base_model_name_or_path"] == "some/base" and config["peft_type"] == "LORA"
    header = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert b'"__metadata__":{"format":"pt"}' in header
    assert 'base_model: "some/base"' in (tmp_path / "out" / "README.md").read_text()


def test_plain_lora_returns_bit_for_bit_and_in_the_same_bytes(tmp_path: pathlib.Path) -> None:
    params = params_of(query=(6, 4), value=(6, 5))
    names = {"query": "layer.query", "value": "layer.value"}
    adapters = shaken(params, {"query": lr.lora(rank=3, alpha=16), "value": lr.lora(rank=2, alpha=0.7, dropout=0.1)})
    peft.save(adapters, tmp_path / "a", name_map=names)
    loaded = peft.load(tmp_path / "a", params, name_map=names)
    jax.tree.map(np.testing.assert_array_equal, loaded.sites, adapters.sites)
    assert [dict(e.method.config)["alpha"] for e in loaded.plan.entries] == [16, 0.7]
    peft.save(loaded, tmp_path / "b", name_map=names)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


METHODS = {
    "lora": lr.lora(rank=3, alpha=7),
    "rslora": lr.lora(rank=3, alpha=7, rank_stabilised=True),
    "lamda": lr.lamda(rank=3, alpha=5),
    "lamda-sigma": lr.lamda(rank=3, core="sigma"),
    "lamda-zero": lr.lamda(rank=3, init="svd_zero"),
    "lamda-code": lr.lamda(rank=3, init="official_code"),
    "pissa": lr.pissa(rank=2, alpha=3),
    "pissa-beyond-the-dimension": lr.pissa(rank=5),
    "lora_xs": lr.lora_xs(rank=3),
}


@pytest.mark.parametrize("shape", [(7, 9), (9, 7)], ids=["wide", "tall"])
@pytest.mark.parametrize("method", METHODS)
def test_every_low_rank_method_is_an_exact_lora(method: str, shape: tuple[int, int], tmp_path: pathlib.Path) -> None:
    params = params_of(query=shape)
    adapters = shaken(params, {"query": METHODS[method]})
    peft.save(adapters, tmp_path / "out", name_map={"query": "query"})
    loaded = peft.load(tmp_path / "out", params, name_map={"query": "query"})
    assert loaded.plan.entries[0].method.name == "lora"
    assert_same_update(adapters, loaded, params)


def test_pissa_leaves_at_twice_its_rank_and_lamda_at_its_own(tmp_path: pathlib.Path) -> None:
    params = params_of(query=(8, 8), value=(8, 8))
    adapters = shaken(params, {"query": lr.pissa(rank=2), "value": lr.lamda(rank=3)})
    peft.save(adapters, tmp_path / "out", name_map=lambda path, layer: path.split("/")[0])
    tensors = tensors_of(tmp_path / "out")
    assert tensors[PREFIX + "query.lora_A.weight"].shape == (4, 8)
    assert tensors[PREFIX + "value.lora_A.weight"].shape == (3, 8)


def stacked(params, path: str, batch: int = 1):
    leaf = params[path.split("/")[0]]["kernel"]
    axes = tuple(range(batch))
    return {path: describe(path, leaf, "dense", batch=axes, inputs=(batch,), outputs=(batch + 1,), scanned=axes)}


STACK = {"layers": [f"model.layers.{i}.query" for i in range(4)]}


def test_a_stack_is_split_into_layers_and_stacked_again(tmp_path: pathlib.Path) -> None:
    params = params_of(layers=(4, 6, 5))
    sites = stacked(params, "layers/kernel")
    adapters = shaken(params, {"layers": lr.lora(rank=2, alpha=6)}, sites)
    peft.save(adapters, tmp_path / "out", name_map=STACK)
    tensors = tensors_of(tmp_path / "out")
    assert len(tensors) == 8
    np.testing.assert_array_equal(
        tensors[PREFIX + "model.layers.2.query.lora_A.weight"], adapters.sites["layers/kernel"]["a"][2].T
    )
    loaded = peft.load(tmp_path / "out", params, name_map=STACK, sites=sites)
    jax.tree.map(np.testing.assert_array_equal, loaded.sites, adapters.sites)
    assert loaded.plan == adapters.plan


def test_layers_without_an_adapter_are_left_out(tmp_path: pathlib.Path) -> None:
    params = params_of(layers=(4, 6, 5))
    sites = stacked(params, "layers/kernel")
    adapters = shaken(params, {"layers": lr.on_layers(lr.lora(rank=2, alpha=2), [1, 3])}, sites)
    peft.save(adapters, tmp_path / "out", name_map=STACK)
    assert config_of(tmp_path / "out")["target_modules"] == ["model.layers.1.query", "model.layers.3.query"]
    loaded = peft.load(tmp_path / "out", params, name_map=STACK, sites=sites)
    assert loaded.plan == adapters.plan
    jax.tree.map(np.testing.assert_array_equal, loaded.sites, adapters.sites)


def test_padded_ranks_of_a_stack_become_a_rank_pattern(tmp_path: pathlib.Path) -> None:
    params = params_of(layers=(4, 6, 5))
    sites = stacked(params, "layers/kernel")
    plan = lr.plan(params, {"layers": lr.lamda(rank=(2, 3, 3, 1), alpha=6)}, sites=sites)
    adapters = lr.init(jax.random.key(0), params, plan)
    leaves = adapters.sites["layers/kernel"]
    adapters = adapters.replace(
        sites={"layers/kernel": leaves | {"m": 2 * leaves["m"]}}
    )  # padding stays zero, as in training
    peft.save(adapters, tmp_path / "out", name_map=STACK)
    config = config_of(tmp_path / "out")
    assert config["r"] == 3 and config["rank_pattern"] == {"model.layers.0.query": 2, "model.layers.3.query": 1}
    assert config["lora_alpha"] == 6 and config["alpha_pattern"] == {
        "model.layers.0.query": 4,
        "model.layers.3.query": 2,
    }
    loaded = peft.load(tmp_path / "out", params, name_map=STACK, sites=sites)
    assert loaded.sites["layers/kernel"]["a"].shape == (4, 6, 3)
    assert_same_update(adapters, loaded, params)


def test_scales_that_differ_between_layers_are_multiplied_in(tmp_path: pathlib.Path) -> None:
    params = params_of(layers=(4, 6, 5))
    sites = stacked(params, "layers/kernel")
    adapters = shaken(params, {"layers": lr.lora(rank=2, alpha=2)}, sites)
    peft.save(adapters, tmp_path / "out", name_map=STACK)
    config = config_of(tmp_path / "out") | {"alpha_pattern": {"1.query": 3, "layers.2.*": 10}}
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    loaded = peft.load(tmp_path / "out", params, name_map=STACK, sites=sites)
    got, was = (lr.merge(params, x)["layers"]["kernel"] - params["layers"]["kernel"] for x in (loaded, adapters))
    np.testing.assert_allclose(got, was * jnp.asarray([1, 1.5, 5, 1])[:, None, None], atol=1e-5)


def test_two_batch_axes_count_row_by_row(tmp_path: pathlib.Path) -> None:
    params = params_of(moe=(2, 3, 6, 5))
    sites = stacked(params, "moe/kernel", batch=2)
    names = {"moe": [f"layers.{i}.experts.{j}.up" for i in range(2) for j in range(3)]}
    adapters = shaken(params, {"moe": lr.on_layers(lr.lora(rank=2), [1])}, sites)
    peft.save(adapters, tmp_path / "out", name_map=names)
    tensor = tensors_of(tmp_path / "out")[PREFIX + "layers.1.experts.2.up.lora_B.weight"]
    np.testing.assert_array_equal(tensor, adapters.sites["moe/kernel"]["b"][0, 2].T)
    loaded = peft.load(tmp_path / "out", params, name_map=names, sites=sites)
    assert_same_update(adapters, loaded, params)


def test_kernels_with_several_axes_are_flattened(tmp_path: pathlib.Path) -> None:
    params = params_of(query=(6, 2, 3))
    sites = {"query/kernel": describe("query/kernel", params["query"]["kernel"], "dense", inputs=(0,), outputs=(1, 2))}
    adapters = shaken(params, {"query": lr.lora(rank=2)}, sites)
    peft.save(adapters, tmp_path / "out", name_map={"query": "query"})
    assert tensors_of(tmp_path / "out")[PREFIX + "query.lora_B.weight"].shape == (6, 2)
    assert_same_update(adapters, peft.load(tmp_path / "out", params, name_map={"query": "query"}, sites=sites), params)


def test_convolutions_have_their_window_on_a(tmp_path: pathlib.Path) -> None:
    params = params_of(conv=(3, 2, 5, 4))
    sites = {"conv/kernel": describe("conv/kernel", params["conv"]["kernel"], "conv", inputs=(0, 1, 2), outputs=(3,))}
    adapters = shaken(params, {"conv": lr.lora(rank=2)}, sites)
    peft.save(adapters, tmp_path / "out", name_map={"conv": "conv"})
    tensors = tensors_of(tmp_path / "out")
    a, b = tensors[PREFIX + "conv.lora_A.weight"], tensors[PREFIX + "conv.lora_B.weight"]
    assert a.shape == (2, 5, 3, 2) and b.shape == (4, 2, 1, 1)
    # torch's weight is (out, in, kh, kw), ours (kh, kw, in, out).
    update = np.einsum("or,rikl->klio", b[..., 0, 0], a)
    merged = lr.merge(params, adapters)["conv"]["kernel"]
    np.testing.assert_allclose(merged - params["conv"]["kernel"], update, atol=1e-5)
    assert_same_update(adapters, peft.load(tmp_path / "out", params, name_map={"conv": "conv"}, sites=sites), params)


def test_embeddings_have_names_of_their_own(tmp_path: pathlib.Path) -> None:
    params = params_of(table=(11, 4), query=(4, 4))
    adapters = shaken(params, {"table": lr.lora(rank=2), "query": lr.lora(rank=2)})
    names = {"table": "embed_tokens", "query": "query"}
    peft.save(adapters, tmp_path / "out", name_map=names)
    tensors = tensors_of(tmp_path / "out")
    assert tensors[PREFIX + "embed_tokens.lora_embedding_A"].shape == (2, 11)
    assert tensors[PREFIX + "embed_tokens.lora_embedding_B"].shape == (4, 2)
    assert_same_update(adapters, peft.load(tmp_path / "out", params, name_map=names), params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_storage_dtypes_are_kept_or_changed_on_request(dtype, tmp_path: pathlib.Path) -> None:
    params = params_of(query=(6, 4))
    adapters = shaken(params, {"query": lr.lora(rank=2)}, dtype=dtype)
    peft.save(adapters, tmp_path / "kept", name_map={"query": "query"})
    loaded = peft.load(tmp_path / "kept", params, name_map={"query": "query"})
    assert loaded.sites["query/kernel"]["a"].dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, loaded.sites, adapters.sites)
    peft.save(adapters, tmp_path / "wide", name_map={"query": "query"}, dtype=jnp.float32)
    assert {x.dtype for x in tensors_of(tmp_path / "wide").values()} == {np.dtype(np.float32)}
    widened = peft.load(tmp_path / "kept", params, name_map={"query": "query"}, dtype=jnp.float32)
    assert widened.sites["query/kernel"]["b"].dtype == jnp.float32


def test_factors_lie_beside_a_sharded_weight(tmp_path: pathlib.Path) -> None:
    n = len(jax.devices())
    params = params_of(query=(4 * n, 6))
    adapters = shaken(params, {"query": lr.lora(rank=2)})
    peft.save(adapters, tmp_path / "out", name_map={"query": "query"})
    mesh = jax.make_mesh((n,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(params, jax.NamedSharding(mesh, jax.P("x")))
    leaves = peft.load(tmp_path / "out", spread, name_map={"query": "query"}).sites["query/kernel"]
    assert leaves["a"].sharding.spec[0] == "x" and leaves["b"].sharding.is_fully_replicated


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        models.BertConfig.tiny(task="classify", num_labels=3),
        models.BertConfig.tiny(task="classify", architecture="roberta"),
        models.LlamaConfig.tiny(tie_word_embeddings=False),
    ],
    ids=lambda c: c.architecture,
)
def test_reference_models_need_no_names(config, scan: bool, tmp_path: pathlib.Path) -> None:
    config = models.from_hf(config.to_hf(), scan_layers=scan)
    params = models.build(config).init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    llama = isinstance(config, models.LlamaConfig)
    declare = {r".*/layers/.*/kernel": "bio"} if scan and not llama else {r"layers/.*/kernel": "bio"} if scan else None
    rules = {r".*/attention/.*": lr.lora(rank=2, alpha=3), "lm_head" if llama else r"classifier(/.*)?": lr.full()}
    adapters = shaken(params, rules, lr.sites(params, declare))
    peft.save(adapters, tmp_path / "out", architecture=config)
    written = config_of(tmp_path / "out")
    if llama:
        assert written["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"] and written["modules_to_save"] == [
            "lm_head"
        ]
    else:
        assert written["target_modules"] == ["attention.output.dense", "key", "query", "value"]
        assert written["modules_to_save"] == ["classifier"] and written["task_type"] == "SEQ_CLS"
    assert_same_update(adapters, peft.load(tmp_path / "out", params, architecture=config), params)


@pytest.mark.parametrize("spelling", ["no-prefix", "adapter-name", "base-prefix"])
def test_other_spellings_of_the_names_are_read(spelling: str, tmp_path: pathlib.Path) -> None:
    from lowrank_jax.models.tensors import save_safetensors

    config = models.BertConfig.tiny(task="classify", num_labels=3)
    params = models.build(config).init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    adapters = shaken(
        params, {r".*/query": lr.lora(rank=2), "classifier": lr.full(), r".*word_embeddings": lr.lora(rank=2)}
    )
    peft.save(adapters, tmp_path, architecture=config)
    change = {
        "no-prefix": lambda name: name.removeprefix(PREFIX),
        "adapter-name": lambda name: (
            name.replace("lora_A.", "lora_A.mine.")
            .replace("lora_B.", "lora_B.mine.")
            .replace("classifier.", "classifier.modules_to_save.mine.")
            .replace("embedding_A", "embedding_A.mine")
        ),
        "base-prefix": lambda name: name.replace(".bert.", "."),
    }[spelling]
    renamed = {change(name): tensor for name, tensor in tensors_of(tmp_path).items()}
    assert set(renamed) != set(tensors_of(tmp_path))
    save_safetensors(tmp_path / "adapter_model.safetensors", renamed, {"format": "pt"})
    loaded = peft.load(tmp_path, params, architecture=config)
    assert_same_update(adapters, loaded, params)
