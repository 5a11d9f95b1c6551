"""Checkpoints in the Hugging Face layout: round trips, sharding, fresh heads, and everything that is refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_params

from lowrank_jax import models
from lowrank_jax.models import BertConfig, CheckpointError, LlamaConfig
from lowrank_jax.models.tensors import open_safetensors, save_safetensors

TOKENS = jnp.ones((1, 2), jnp.int32)
ROUND_TRIPS = [
    BertConfig.tiny(),
    BertConfig.tiny(task="classify", num_labels=5),
    BertConfig.tiny(task="classify", classifier_pooling="mean"),
    BertConfig.tiny(task="mlm", architecture="roberta"),
    BertConfig.tiny(task="classify", architecture="roberta"),
    LlamaConfig.tiny(),
    LlamaConfig.tiny(architecture="qwen3", qk_norm=True, tie_word_embeddings=True, head_dim=16),
]


def assert_equal_trees(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rewrite(directory: pathlib.Path, change) -> None:
    """Applies `change` to the dict of the tensors of a checkpoint."""
    tensors = {name: np.array(t.read()) for name, t in open_safetensors(directory).items()}
    change(tensors)
    save_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("config", ROUND_TRIPS, ids=lambda c: f"{c.architecture}-{c.task}")
def test_round_trip_through_either_layout(config, scan: bool, tmp_path: pathlib.Path) -> None:
    config = models.from_hf(config.to_hf(), scan_layers=scan)
    params = random_params(config)
    models.save(params, config, tmp_path / "a")
    loaded = models.load(tmp_path / "a", scan_layers=scan)
    assert loaded.fresh == () and loaded.ignored == ()
    assert loaded.config == config and loaded.architecture == config.architecture
    assert_equal_trees(loaded.params, params)
    other = models.load(tmp_path / "a", scan_layers=not scan)
    assert_equal_trees(other.params, (models.unstack_layers if scan else models.stack_layers)(params))


def test_shards_and_index(tmp_path: pathlib.Path) -> None:
    config = LlamaConfig.tiny(scan_layers=True)
    params = random_params(config)
    models.save(params, config, tmp_path / "a", max_shard_size=40_000)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "model.safetensors.index.json" in names and "model.safetensors" not in names
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert set(index["weight_map"].values()) == {name for name in names if name.endswith(".safetensors")}
    assert_equal_trees(models.load(tmp_path / "a", scan_layers=True).params, params)


def test_parameters_arrive_in_their_sharding(tmp_path: pathlib.Path) -> None:
    config = LlamaConfig.tiny(scan_layers=True)
    params = random_params(config)
    models.save(params, config, tmp_path / "a")
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = {}

    def sharding(path: str, shape: tuple[int, ...]):
        seen[path] = shape
        spec = jax.P(*([None] * (len(shape) - 1)), "x") if path.endswith("kernel") and "mlp" in path else jax.P()
        return jax.sharding.NamedSharding(mesh, spec) if path != "norm/scale" else None

    loaded = models.load(tmp_path / "a", scan_layers=True, sharding=sharding)
    assert_equal_trees(loaded.params, params)
    kernel = loaded.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, None, "x")
    assert kernel.addressable_shards[0].data.shape == (2, 64, 96 // len(jax.devices()))
    assert seen["layers/mlp/up_proj/kernel"] == (2, 64, 96)


def test_types_on_the_way_in_and_out(tmp_path: pathlib.Path) -> None:
    config = LlamaConfig.tiny()
    models.save(random_params(config), config, tmp_path / "a", dtype=jnp.bfloat16)
    assert {t.dtype for t in open_safetensors(tmp_path / "a").values()} == {np.dtype(jnp.bfloat16)}
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = models.load(tmp_path / "a", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    assert loaded.model.apply({"params": loaded.params}, TOKENS).dtype == jnp.bfloat16


def test_a_new_head_is_made_and_named(tmp_path: pathlib.Path) -> None:
    config = BertConfig.tiny(use_pooler=False)
    params = random_params(config)
    models.save(params, config, tmp_path / "a")
    assert models.load(tmp_path / "a").config == config, "an encoder without a pooler stays one"
    loaded = models.load(tmp_path / "a", task="classify", num_labels=3)
    assert loaded.fresh == ("classifier/bias", "classifier/kernel", "pooler/bias", "pooler/kernel")
    assert_equal_trees(loaded.params["encoder"], params["encoder"])
    kernel = loaded.params["classifier"]["kernel"]
    assert kernel.shape == (64, 3) and 0.005 < kernel.std() < 0.05
    other = models.load(tmp_path / "a", task="classify", num_labels=3, seed=1)
    assert (other.params["classifier"]["kernel"] != kernel).any()


def test_another_number_of_classes_replaces_the_last_layer_only(tmp_path: pathlib.Path) -> None:
    config = BertConfig.tiny(task="classify", architecture="roberta", num_labels=3)
    params = random_params(config)
    models.save(params, config, tmp_path / "a")
    loaded = models.load(tmp_path / "a", num_labels=5)
    assert loaded.fresh == ("classifier/out_proj/bias", "classifier/out_proj/kernel")
    assert_equal_trees(loaded.params["classifier"]["dense"], params["classifier"]["dense"])
    assert models.load(tmp_path / "a", num_labels=3).fresh == ()


def test_buffers_old_names_and_tied_copies_are_known(tmp_path: pathlib.Path) -> None:
    config = BertConfig.tiny(task="mlm")
    params = random_params(config)
    models.save(params, config, tmp_path / "a")

    def age(tensors) -> None:
        norm = "bert.embeddings.LayerNorm."
        tensors[norm + "gamma"], tensors[norm + "beta"] = tensors.pop(norm + "weight"), tensors.pop(norm + "bias")
        tensors["bert.embeddings.position_ids"] = np.arange(40)[None]
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.seq_relationship.weight"] = np.ones((2, 64), np.float32)

    rewrite(tmp_path / "a", age)
    loaded = models.load(tmp_path / "a")
    assert_equal_trees(loaded.params, params)
    assert loaded.ignored == (
        "cls.predictions.decoder.weight",
        "cls.seq_relationship.weight",
        "embeddings.position_ids",
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight.*missing"),
        (lambda t: t.update({"model.extra.weight": np.ones(2, np.float32)}), "extra.weight"),
        (lambda t: t.update({"model.norm.weight": np.ones(63, np.float32)}), r"norm.weight.*\(63,\).*\(64,\)"),
        (lambda t: t.update({"model.norm.weight": np.ones(64, np.int32)}), "norm.weight.*int32"),
        (lambda t: t.update({"score.weight": np.ones((2, 64), np.float32)}), "score.weight"),
    ],
)
def test_wrong_tensors_are_refused_by_name(change, words: str, tmp_path: pathlib.Path) -> None:
    config = LlamaConfig.tiny()
    models.save(random_params(config), config, tmp_path / "a")
    rewrite(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=words):
        models.load(tmp_path / "a")


def test_wrong_requests_are_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig.tiny()
    params = random_params(config)
    where = models.save(params, config, tmp_path / "a")
    with pytest.raises(CheckpointError, match="causal_lm"):
        models.load(where, task="classify")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        models.save(params, config, where)
    with pytest.raises(ValueError, match="lm_head/kernel.*missing"):
        models.save({k: v for k, v in params.items() if k != "lm_head"}, config, tmp_path / "b")
    with pytest.raises(ValueError, match="adapter.*no parameter.*merged"):
        models.save(params | {"adapter": jnp.ones(1)}, config, tmp_path / "b")
    with pytest.raises(ValueError, match="norm/scale.*shape"):
        models.save(params | {"norm": {"scale": jnp.ones(3)}}, config, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="config.json"):
        models.load(tmp_path / "empty")
    (where / "model.safetensors").rename(where / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled.*safetensors"):
        models.load(where)
    (where / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="config.json"):
        models.load(where)


def test_a_name_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConnectionError, match="someone/model.*pass their directory"):
        models.load("someone/model")


def test_a_path_that_does_not_exist_is_no_name() -> None:
    with pytest.raises(FileNotFoundError, match="neither a directory nor a name"):
        models.load("/there/is/no/such/model")


def test_a_failed_save_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_jax.models import hf_save

    config = LlamaConfig.tiny()
    params = random_params(config)
    where = models.save(params, config, tmp_path / "a")

    def fail(*args) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(hf_save, "save_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        models.save(random_params(config, 1), config, where, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert_equal_trees(models.load(where).params, params)


def test_overwriting_and_tokenizer_files(tmp_path: pathlib.Path) -> None:
    config = LlamaConfig.tiny()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    where = models.save(random_params(config), config, tmp_path / "a")
    assert models.load(where).tokenizer_file is None
    new = random_params(config, 1)
    models.save(new, config, where, overwrite=True, tokenizer_from=tmp_path / "source")
    loaded = models.load(where)
    assert loaded.tokenizer_file == where / "tokenizer.json"
    assert_equal_trees(loaded.params, new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "source"]
