"""Adapters exchanged with PEFT: the same base weights and the same directory give the same logits on either side."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from peft_models import (
    SCANNED,
    TOKENS,
    assert_equal,
    hf_peft,
    make_base,
    ours,
    shaken,
    theirs,
    torch,
    torch_model,
    train,
    transformers,
)

import lowrank_jax as lr
from lowrank_jax import models, peft

pytestmark = pytest.mark.parity

ATTENTION = {
    "bert": r".*/attention/(query|value)",
    "roberta": r".*/attention/(query|value)",
    "llama": r".*/(q_proj|v_proj)",
}
MLP = {"bert": r".*/mlp/.*", "roberta": r".*/mlp/.*", "llama": r".*/(gate_proj|down_proj)"}
EACH = pytest.mark.parametrize("base", ["bert", "roberta", "llama"], indirect=True)
TWO = pytest.mark.parametrize("base", ["bert", "llama"], indirect=True)


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    """(name, directory of a model whose every weight is random)."""
    return request.param, make_base(request.param, tmp_path_factory.mktemp(request.param))


METHODS = {
    "lora": lambda: lr.lora(rank=4, alpha=12),
    "rslora": lambda: lr.lora(rank=6, alpha=5, rank_stabilised=True),
    "lamda-residual": lambda: lr.lamda(rank=4, alpha=6),
    "lamda-zero": lambda: lr.lamda(rank=4, init="svd_zero"),
    "lamda-code": lambda: lr.lamda(rank=4, alpha=8, init="official_code"),
    "lamda-balanced": lambda: lr.lamda(rank=4, core="balanced"),
    "pissa": lambda: lr.pissa(rank=4, alpha=6),
    "lora_xs": lambda: lr.lora_xs(rank=4),
}


@TWO
@pytest.mark.parametrize("method", METHODS)
def test_peft_runs_our_adapters(base, method: str, tmp_path: pathlib.Path) -> None:
    name, directory = base
    loaded = models.load(directory, scan_layers=SCANNED[name])
    adapters = shaken(loaded, {ATTENTION[name]: METHODS[method](), MLP[name]: lr.lora(rank=3, alpha=2)})
    peft.save(adapters, tmp_path / "out", architecture=loaded.config, base_model_name_or_path="base")
    model = hf_peft.PeftModel.from_pretrained(torch_model(name, directory), tmp_path / "out")
    expected = ours(loaded, adapters)
    assert_equal(theirs(model), expected, ours(loaded))
    back = peft.load(tmp_path / "out", loaded.params, architecture=loaded.config)
    assert_equal(ours(loaded, back), expected, ours(loaded))


@TWO
def test_peft_runs_layers_and_ranks_of_a_stack(base, tmp_path: pathlib.Path) -> None:
    name, directory = base
    loaded = models.load(directory, scan_layers=True)
    rules = {ATTENTION[name]: lr.lamda(rank=(2, 5, 3)), MLP[name]: lr.on_layers(lr.lora(rank=2, alpha=5), [0, 2])}
    adapters = shaken_ranks(shaken(loaded, rules), ATTENTION[name], (2, 5, 3))
    peft.save(adapters, tmp_path / "out", architecture=loaded.config)
    assert set(json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"].values()) <= {2, 3, 5}
    model = hf_peft.PeftModel.from_pretrained(torch_model(name, directory), tmp_path / "out")
    assert_equal(theirs(model), ours(loaded, adapters), ours(loaded))


def shaken_ranks(adapters: lr.Adapters, pattern: str, ranks: tuple[int, ...]) -> lr.Adapters:
    """Takes the random motion back from padded directions, which training leaves at zero."""
    from lowrank_jax.sites import matches

    sites = dict(adapters.sites)
    for path, leaves in sites.items():
        if matches(pattern, path):
            used = jnp.asarray(np.arange(max(ranks)) < np.asarray(ranks)[:, None], jnp.float32)
            sites[path] = leaves | {
                "m": leaves["m"] * used[:, :, None] * used[:, None, :],
                "b": leaves["b"] * used[:, :, None],
            }
    return adapters.replace(sites=sites)


HEADS = {"bert": "classifier", "roberta": r"classifier/.*", "llama": "lm_head"}


@EACH
def test_peft_runs_our_head(base, tmp_path: pathlib.Path) -> None:
    name, directory = base
    loaded = models.load(directory, scan_layers=True)
    adapters = shaken(loaded, {ATTENTION[name]: lr.lora(rank=2), HEADS[name]: lr.full()})
    peft.save(adapters, tmp_path / "out", architecture=loaded.config)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head" if name == "llama" else "classifier"]
    assert config["task_type"] == ("CAUSAL_LM" if name == "llama" else "SEQ_CLS")
    model = hf_peft.PeftModel.from_pretrained(torch_model(name, directory), tmp_path / "out")
    expected = ours(loaded, adapters)
    assert_equal(theirs(model), expected, ours(loaded))
    back = peft.load(tmp_path / "out", loaded.params, architecture=loaded.config)
    assert_equal(ours(loaded, back), expected, ours(loaded))


@TWO
def test_peft_runs_our_embedding_adapter(base, tmp_path: pathlib.Path) -> None:
    name, directory = base
    loaded = models.load(directory, scan_layers=SCANNED[name])
    table = "embed_tokens" if name == "llama" else ".*/word_embeddings"
    adapters = shaken(loaded, {table: lr.lora(rank=3, alpha=7), ATTENTION[name]: lr.lora(rank=2)})
    peft.save(adapters, tmp_path / "out", architecture=loaded.config)
    model = hf_peft.PeftModel.from_pretrained(torch_model(name, directory), tmp_path / "out")
    assert_equal(theirs(model), ours(loaded, adapters), ours(loaded))


SELECTORS = [
    {"target_modules": ["q_proj", "0.mlp"]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": ["q_proj"], "exclude_modules": ["1.q_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 10], "layers_pattern": ["layers", "blocks"]},
    {"target_modules": ["q_proj", "head"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "head"]},
]


@pytest.mark.parametrize("fields", SELECTORS, ids=str)
def test_selectors_are_read_as_peft_reads_them(fields: dict) -> None:
    from lowrank_jax.peft.targets import selects

    config = hf_peft.LoraConfig(**fields)
    modules = [f"{root}{stem}.{i}.{part}" for root in ("", "model.") for stem in ("layers", "blocks", "h") for i in (0, 1, 10)
               for part in ("q_proj", "v_proj", "mlp", "mlp.q_proj", "experts.1.q_proj", "xq_proj")]  # fmt: skip
    modules += ["q_proj", "head", "model.head", "model.head.q_proj", "overhead"]
    chosen = {}
    for module in modules:
        found = hf_peft.tuners.tuners_utils.check_target_module_exists(config, module)
        chosen[module] = bool(found) and type(found).__name__ != "_ExcludedModule"
    assert {module: bool(selects(fields, module)) for module in modules} == chosen
    assert 0 < sum(chosen.values()) < len(modules)


@pytest.mark.parametrize("key", ["q", "1.q", r"^a\.1\.q", "a.1.q", r".*\.q", "q|v"])
def test_patterns_are_read_as_peft_reads_them(key: str) -> None:
    from peft.utils.other import get_pattern_key

    from lowrank_jax.peft.targets import pattern_value

    patterns = {key: 4, "1.v": 5}
    for module in ("q", "a.q", "a.1.q", "b.a.1.q", "a.11.q", "a.1.v", "a.1.xq"):
        assert pattern_value(patterns, module, 8) == patterns.get(get_pattern_key(patterns.keys(), module), 8)


TARGETS = {
    "bert": ["query", "output.dense"],
    "roberta": ["key", "intermediate.dense"],
    "llama": ["q_proj", "down_proj"],
}
THEIRS = {
    "plain": {"r": 4, "lora_alpha": 10},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"1.*": 2}, "alpha_pattern": {"2.*": 20, "0.*": 3}},
    "some-layers": {"r": 2, "lora_alpha": 8, "layers_to_transform": [0, 2]},
    "head": {"r": 4, "lora_alpha": 10, "task_type": True},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
    "embedding": {"r": 3, "lora_alpha": 6, "embedding": True},
}


@TWO
@pytest.mark.parametrize("case", THEIRS)
def test_we_run_their_trained_adapters_and_they_ours_again(base, case: str, tmp_path: pathlib.Path) -> None:
    name, directory = base
    fields = dict(THEIRS[case])
    if fields.pop("task_type", False):
        fields["task_type"] = "CAUSAL_LM" if name == "llama" else "SEQ_CLS"
        fields["modules_to_save"] = ["lm_head"] if name == "llama" else ["classifier"]
    targets = TARGETS[name] + (
        ["embed_tokens" if name == "llama" else "word_embeddings"] if fields.pop("embedding", False) else []
    )
    torch.manual_seed(1)
    model = hf_peft.get_peft_model(torch_model(name, directory), hf_peft.LoraConfig(target_modules=targets, **fields))
    train(model, lambda model: model(input_ids=torch.tensor(TOKENS)).logits)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected = theirs(model)

    loaded = models.load(directory, scan_layers=SCANNED[name])
    adapters = peft.load(tmp_path / "theirs", loaded.params, architecture=loaded.config)
    assert_equal(ours(loaded, adapters), expected, ours(loaded))

    peft.save(adapters, tmp_path / "ours", architecture=loaded.config)
    again = hf_peft.PeftModel.from_pretrained(torch_model(name, directory), tmp_path / "ours")
    assert_equal(theirs(again), expected, ours(loaded))


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_a_mean_pooled_head_travels_beside_an_encoder(base, tmp_path: pathlib.Path) -> None:
    """transformers has no such model: PEFT runs the encoder's adapter, and the head comes back to us."""
    name, directory = base
    loaded = models.load(directory, task="classify", num_labels=4, classifier_pooling="mean")
    adapters = shaken(loaded, {ATTENTION[name]: lr.lora(rank=2), "classifier": lr.full()})
    peft.save(adapters, tmp_path / "out", architecture=loaded.config)
    encoder = transformers.BertModel.from_pretrained(directory).eval()
    model = hf_peft.PeftModel.from_pretrained(encoder, tmp_path / "out")
    with torch.no_grad():
        hidden = model(torch.tensor(TOKENS)).last_hidden_state.mean(1).numpy()
    head = adapters.sites
    logits = hidden @ np.asarray(head["classifier/kernel"]["weight"]) + np.asarray(head["classifier/bias"]["weight"])
    assert_equal(ours(loaded, adapters), logits, ours(loaded))
    back = peft.load(tmp_path / "out", loaded.params, architecture=loaded.config)
    np.testing.assert_allclose(ours(loaded, back), ours(loaded, adapters), atol=1e-6)
