"""What is refused, before anything is written or built, in one error that names the culprit."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax import models, peft
from lowrank_jax.forms import UnsupportedError
from lowrank_jax.models.tensors import CorruptFileError, open_safetensors, save_safetensors
from lowrank_jax.peft.config import read_config
from lowrank_jax.sites import describe

PREFIX = "base_model.model."
NAMES = {"query": "layers.0.query", "head": "head", "table": "table"}
PARAMS = {
    "query": {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)},
    "head": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)},
    "table": {"embedding": jnp.ones((5, 6))},
}


def make(rules) -> lr.Adapters:
    return lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, rules))


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    return peft.save(make({"query/kernel": lr.lora(rank=2), "head": lr.full()}), tmp_path / "out", name_map=NAMES)


def edit_config(directory: pathlib.Path, **fields) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(directory: pathlib.Path, change) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = {name: np.array(t.read()) for name, t in open_safetensors(file).items()}
    change(tensors)
    save_safetensors(file, tensors, {"format": "pt"})


def load(directory: pathlib.Path, params=PARAMS, **changes) -> lr.Adapters:
    return peft.load(directory, params, **({"name_map": NAMES} | changes))


def test_the_untouched_directory_loads(saved: pathlib.Path) -> None:
    assert set(load(saved).sites) == {"query/kernel", "head/kernel", "head/bias"}


@pytest.mark.parametrize(
    "fields",
    [
        {"use_qalora": True},
        {"lora_bias": True},
        {"layer_replication": [[0, 1]]},
        {"trainable_token_indices": [1]},
        {"trainable_token_indices": {"table": [1, 1]}},
        {"use_dora": 1},
        {"target_parameters": "experts.up"},
        {"alora_invocation_tokens": [3]},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 2}},
        {"kasa_config": {"x": 1}},
        {"monteclora_config": {"x": 1}},
        {"peft_type": "POLY"},
        {"bias": "all"},
        {"init_lora_weights": "pissa_niter_4"},
        {"r": 0},
        {"r": True},
        {"lora_alpha": "16"},
        {"lora_alpha": float("nan")},
        {"lora_dropout": 1.0},
        {"rank_pattern": {"query": 0}},
        {"alpha_pattern": ["query"]},
        {"target_modules": [1]},
        {"modules_to_save": "head"},
    ],
    ids=str,
)
def test_fields_that_cannot_be_honoured_are_named(fields: dict, saved: pathlib.Path) -> None:
    edit_config(saved, **fields)
    with pytest.raises(peft.PeftFormatError, match=next(iter(fields))):
        load(saved)


def test_fields_without_effect_are_silent_and_unknown_ones_warn(saved: pathlib.Path, recwarn) -> None:
    edit_config(
        saved, peft_version="0.21.2", eva_config=None, use_dora=False, runtime_config={}, init_lora_weights="gaussian"
    )
    load(saved)
    assert not recwarn.list
    edit_config(saved, foobar=1)
    with pytest.warns(UserWarning, match="foobar"):
        load(saved)


def test_a_minimal_config_takes_the_defaults_of_the_format(tmp_path: pathlib.Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["query"]}')
    codec, config = read_config(tmp_path)
    assert codec.peft_type == "LORA"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 8, 0.0)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_object_is_refused(text: str, saved: pathlib.Path) -> None:
    (saved / "adapter_config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(peft.PeftFormatError, match="adapter_config.json"):
        load(saved)


A, B = PREFIX + "layers.0.query.lora_A.weight", PREFIX + "layers.0.query.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(A), "lora_A.*lora_B|lora_B"),
        (lambda t: (t.pop(A), t.pop(B)), "layers.0.query.*missing"),
        (lambda t: t.pop(PREFIX + "head.bias"), "head.*missing"),
        (lambda t: t.update({A: np.ones((2, 5), np.float32)}), r"\(2, 5\); expected \(2, 6\)"),
        (lambda t: t.update({A: np.ones((3, 6), np.float32)}), r"\(3, 6\); expected \(2, 6\).*rank 2"),
        (lambda t: t.update({A: np.ones((2, 6), np.int32)}), "int32"),
        (lambda t: t.update({PREFIX + "head.weight": np.ones((4, 3), np.float32)}), r"expected \(3, 4\)"),
        (lambda t: t.update({PREFIX + "other.lora_A.weight": np.ones((2, 5), np.float32)}), "'other'"),
        (lambda t: t.update({PREFIX + "other.weight": np.ones((2, 5), np.float32)}), "other.weight.*modules_to_save"),
        (
            lambda t: t.update({PREFIX + "layers.0.query.lora_magnitude_vector": np.ones(4, np.float32)}),
            "lora_magnitude_vector",
        ),
        (lambda t: t.update({PREFIX + "layers.0.query.lora_B.bias": np.ones(4, np.float32)}), "lora_B.bias"),
        (lambda t: t.update({A.replace("lora_A", "lora_A.two"): t[A]}), "twice"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, words: str, saved: pathlib.Path) -> None:
    edit_tensors(saved, change)
    with pytest.raises(peft.PeftFormatError, match=words):
        load(saved)


def test_a_copy_of_the_base_is_left_unread_with_a_warning(saved: pathlib.Path) -> None:
    edit_tensors(saved, lambda t: t.update({PREFIX + "layers.0.query.base_layer.weight": np.ones((4, 6), np.float32)}))
    with pytest.warns(UserWarning, match="base_layer"):
        load(saved)


def test_damaged_and_missing_files(saved: pathlib.Path) -> None:
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CorruptFileError, match="adapter_model.safetensors"):
        load(saved)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        load(saved)
    (saved / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickled"):
        load(saved)
    (saved / "mine").mkdir()
    (saved / "adapter_config.json").rename(saved / "mine" / "adapter_config.json")
    with pytest.raises(FileNotFoundError, match="adapter_config.json.*below: mine"):
        load(saved)


def test_another_model_is_refused(saved: pathlib.Path) -> None:
    params = PARAMS | {"query": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
    with pytest.raises(peft.PeftFormatError, match=r"query/kernel"):
        load(saved, params)
    with pytest.raises(peft.PeftFormatError, match=r"layers.0.query.*no weight of this model"):
        load(saved, name_map={"head": "head"})
    with pytest.raises(ValueError, match=r"query/kernel of shape \(8, 4\)"):
        load(saved, sites=lr.sites(params))


def test_a_stack_that_is_not_known_as_one_asks_for_sites(saved: pathlib.Path) -> None:
    params = PARAMS | {"query": {"kernel": jnp.ones((1, 6, 4))}}
    with pytest.raises(peft.PeftFormatError, match=r"linen.sites"):
        load(saved, params)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"query/kernel": lr.lora(rank=2), "head/bias": lr.full()}, "head.*bias.*whole modules"),
        ({"head/kernel": lr.lora(rank=2), "query": lr.full()}, "query/(kernel|bias).*[Mm]erge"),
        ({"head": lr.full()}, "no low-rank update"),
    ],
)
def test_full_updates_that_are_no_head_are_refused(rules, words: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UnsupportedError, match=words):
        peft.save(make(rules), tmp_path / "out", name_map=NAMES)
    assert not list(tmp_path.iterdir())


def test_adapters_in_another_state_are_refused(tmp_path: pathlib.Path) -> None:
    adapters = make({"query/kernel": lr.pissa(rank=2)})
    with pytest.raises(ValueError, match="unfold"):
        peft.save(lr.fold(PARAMS, adapters)[1], tmp_path / "out", name_map=NAMES)
    with pytest.raises(ValueError, match="take"):
        peft.save(lr.stack([adapters, adapters]), tmp_path / "out", name_map=NAMES)
    broken = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), adapters)
    with pytest.raises(ValueError, match="layers.0.query.*not finite"):
        peft.save(broken, tmp_path / "out", name_map=NAMES)
    with pytest.raises(ValueError, match="not finite in float16"):
        peft.save(jax.tree.map(lambda x: x + 1e6, adapters), tmp_path / "out", name_map=NAMES, dtype=jnp.float16)
    assert not list(tmp_path.iterdir())


def test_names_are_checked(tmp_path: pathlib.Path) -> None:
    adapters = make({"query/kernel": lr.lora(rank=2), "head/kernel": lr.lora(rank=2)})
    for name_map, words in [
        ({"query": "q"}, "head/kernel has no module name"),
        ({"query": "q", "head": ["a", "b"]}, "expected 1 module name"),
        ({"query": "q", "head": "q"}, "'q' has an adapter already"),
    ]:
        with pytest.raises(ValueError, match=words):
            peft.save(adapters, tmp_path / "out", name_map=name_map)
    with pytest.raises(TypeError, match="either architecture= .* or name_map="):
        peft.save(adapters, tmp_path / "out")
    with pytest.raises(TypeError, match="BertConfig or LlamaConfig"):
        peft.save(adapters, tmp_path / "out", architecture="llama")
    with pytest.raises(ValueError, match="both"):
        peft.load(peft.save(adapters, tmp_path / "ok", name_map=NAMES), PARAMS, name_map=lambda path, layer: "same")


def test_tied_embeddings_are_refused_both_ways(tmp_path: pathlib.Path) -> None:
    config = models.LlamaConfig.tiny(tie_word_embeddings=True)
    params = models.build(config).init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"embed_tokens": lr.lora(rank=2)}))
    with pytest.raises(UnsupportedError, match="embed_tokens.*output head"):
        peft.save(adapters, tmp_path / "out", architecture=config)
    peft.save(adapters, tmp_path / "out", name_map={"embed_tokens": "model.embed_tokens"})
    with pytest.raises(peft.PeftFormatError, match="embed_tokens.*output head"):
        peft.load(tmp_path / "out", params, architecture=config)


def test_layers_of_a_stack_cannot_come_from_modules_to_save(tmp_path: pathlib.Path) -> None:
    names = {"stack": ["layers.0.up", "layers.1.up"], "query": "query"}
    params = {"stack": {"kernel": jnp.ones((2, 3, 3))}, "query": {"kernel": jnp.ones((3, 3))}}
    stack = describe(
        "stack/kernel", params["stack"]["kernel"], "dense", batch=(0,), inputs=(1,), outputs=(2,), scanned=(0,)
    )
    sites = lr.sites(params) | {"stack/kernel": stack}
    config = {"peft_type": "LORA", "r": 1, "target_modules": ["query"], "modules_to_save": ["layers.0.up"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    one = np.ones((3, 3), np.float32)
    tensors = {"query.lora_A.weight": one[:1], "query.lora_B.weight": one[:, :1], "layers.0.up.weight": one}
    save_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(peft.PeftFormatError, match="not scanned"):
        peft.load(tmp_path, params, name_map=names, sites=sites)


def test_only_an_adapter_is_ever_replaced(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    adapters = make({"query/kernel": lr.lora(rank=1)})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        peft.save(adapters, saved, name_map=NAMES)
    peft.save(adapters, saved, name_map=NAMES, overwrite=True)
    assert json.loads((saved / "adapter_config.json").read_text())["r"] == 1
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(FileExistsError, match="tokenizer.json"):
        peft.save(adapters, saved, name_map=NAMES, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="thesis.tex"):
        peft.save(adapters, tmp_path / "other", name_map=NAMES, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        peft.save(adapters, saved / "tokenizer.json", name_map=NAMES, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"], "temporary directories are left behind"


def test_a_failure_while_writing_leaves_the_old_adapter(
    saved: pathlib.Path, tmp_path: pathlib.Path, monkeypatch
) -> None:
    before = (saved / "adapter_model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("lowrank_jax.peft.exporting.save_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        peft.save(make({"query/kernel": lr.lora(rank=1)}), saved, name_map=NAMES, overwrite=True)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
