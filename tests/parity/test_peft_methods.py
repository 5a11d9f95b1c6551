"""Every method that PEFT has too, exchanged with it: trained there and run here, written here and run there, same logits."""

import json
import pathlib
from typing import NamedTuple

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
)

import lowrank_jax as lr
from lowrank_jax import models, peft

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*(init_r|`r` is not used|save_projection|embedding).*"),
]


class Base(NamedTuple):
    """A model whose every weight is random: its directory, it loaded, and its logits."""

    name: str
    directory: pathlib.Path
    loaded: models.Loaded
    logits: np.ndarray

    def peft_runs(self, out: pathlib.Path, expected: np.ndarray) -> None:
        model = hf_peft.PeftModel.from_pretrained(torch_model(self.name, self.directory), out)
        assert_equal(theirs(model), expected, self.logits)

    def we_run(self, out: pathlib.Path, expected: np.ndarray) -> lr.Adapters:
        adapters = peft.load(out, self.loaded.params, architecture=self.loaded.config)
        assert_equal(ours(self.loaded, adapters), expected, self.logits)
        return adapters


@pytest.fixture(scope="module")
def base(request, tmp_path_factory) -> Base:
    directory = make_base(request.param, tmp_path_factory.mktemp(request.param))
    loaded = models.load(directory, scan_layers=SCANNED[request.param])
    return Base(request.param, directory, loaded, ours(loaded))


MATRICES = {"bert": ["query", "value", "intermediate.dense"], "llama": ["q_proj", "v_proj", "down_proj"]}
MLP = {"bert": "intermediate.dense", "llama": "down_proj"}
EMBEDDING = {"bert": "word_embeddings", "llama": "embed_tokens", "tied": "embed_tokens"}
HEAD = {"bert": ["classifier"], "llama": ["lm_head"]}


def adalora(name: str, total: int):
    return hf_peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=total, tfinal=2, target_modules=MATRICES[name]
    )


CONFIGS = {
    "dora": lambda name: hf_peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=MATRICES[name]),
    "dora-patterns": lambda name: hf_peft.LoraConfig(
        r=3, use_dora=True, use_rslora=True, rank_pattern={"1.*": 2}, alpha_pattern={"0.*": 5},
        target_modules=[*MATRICES[name], EMBEDDING[name]], modules_to_save=HEAD[name],
    ),
    "adalora": lambda name: adalora(name, 6),
    "adalora-untrained-budget": lambda name: adalora(name, 100),
    "vera": lambda name: hf_peft.VeraConfig(r=5, d_initial=0.3, target_modules=MATRICES[name]),
    "randlora": lambda name: hf_peft.RandLoraConfig(r=7, randlora_alpha=2, target_modules=MATRICES[name]),
    "randlora-sparse": lambda name: hf_peft.RandLoraConfig(
        r=8, randlora_alpha=2, sparse=True, target_modules=MATRICES[name], modules_to_save=HEAD[name]
    ),
    "ia3": lambda name: hf_peft.IA3Config(target_modules=MATRICES[name], feedforward_modules=[MLP[name]]),
    "ia3-outputs": lambda name: hf_peft.IA3Config(
        target_modules=MATRICES[name], feedforward_modules=[], modules_to_save=HEAD[name]
    ),
    "tokens": lambda name: hf_peft.TrainableTokensConfig(token_indices=sorted({5, *map(int, TOKENS[0, :3])})),
    "lora-tokens": lambda name: hf_peft.LoraConfig(
        r=2, target_modules=MATRICES[name], trainable_token_indices=[7, *map(int, np.unique(TOKENS[0, :3]))]
    ),
}  # fmt: skip
LOW_RANK = ("adalora", "vera", "randlora")  # LORA unless their own type is asked for


# The variants of one method go through one base each.
ONE = {"dora-patterns": "bert", "adalora-untrained-budget": "llama", "randlora-sparse": "bert", "ia3-outputs": "llama"}


def cases(table):
    """(base, case), the base first so that each is made once."""
    pairs = [(base, case) for base in ("bert", "llama") for case in table if ONE.get(case, base) == base]
    return pytest.mark.parametrize(("base", "case"), pairs, indirect=["base"], ids=list(map("-".join, pairs)))


@cases(CONFIGS)
def test_we_run_their_trained_adapters_and_they_ours_again(base: Base, case: str, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(1)
    model = hf_peft.get_peft_model(torch_model(base.name, base.directory), CONFIGS[case](base.name))
    after = model.base_model.update_and_allocate if case.startswith("adalora") else lambda step: None
    train(model, lambda model: model(input_ids=torch.tensor(TOKENS)).logits, 5 if "adalora" in case else 2, after)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected = theirs(model)
    adapters = base.we_run(tmp_path / "theirs", expected)
    own = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert case != "adalora" or 0 < np.mean(list(own["rank_pattern"].values())) < 1
    for peft_type in {own["peft_type"], None} if case.startswith(LOW_RANK) else {None}:
        out = peft.save(adapters, tmp_path / f"ours-{peft_type}", architecture=base.loaded.config, peft_type=peft_type)
        written = json.loads((out / "adapter_config.json").read_text())
        assert written["peft_type"] == (peft_type or ("LORA" if case.startswith(LOW_RANK) else own["peft_type"]))
        base.peft_runs(out, expected)


ATTENTION = {"bert": r".*/attention/(query|value)", "llama": r".*/(q_proj|v_proj)"}
WIDE = {"bert": r".*/mlp/.*", "llama": r".*/(gate_proj|down_proj)"}
TABLE = {"bert": ".*/word_embeddings", "llama": "embed_tokens", "tied": "embed_tokens"}
RULES = {
    "dora": (None, lambda n: {ATTENTION[n]: lr.dora(rank=4, alpha=12), WIDE[n]: lr.on_layers(lr.dora(rank=2), [0, 2])}),
    "adalora": ("ADALORA", lambda n: {ATTENTION[n]: lr.adalora(4, 3, alpha=6), WIDE[n]: lr.adalora(3, 3, alpha=7)}),
    "vera": ("VERA", lambda n: {ATTENTION[n]: lr.vera(rank=6, store=True), WIDE[n]: lr.vera(rank=6, store=True)}),
    "vera-seed": ("VERA", lambda n: {"|".join((ATTENTION[n], WIDE[n])): lr.vera(rank=6)}),
    "vera-lora": (None, lambda n: {"|".join((ATTENTION[n], WIDE[n])): lr.vera(rank=40)}),
    "randlora": ("RANDLORA", lambda n: {"|".join((ATTENTION[n], WIDE[n])): lr.randlora(7, alpha=2, store=True)}),
    "randlora-lora": (None, lambda n: {ATTENTION[n]: lr.randlora(7, alpha=2)}),
    "ia3": (None, lambda n: {ATTENTION[n]: lr.ia3(), WIDE[n]: lr.ia3(side="input")}),
    "tokens": (None, lambda n: {TABLE[n]: lr.trainable_tokens(tuple(map(int, np.unique(TOKENS))))}),
}


@cases(RULES)
def test_peft_runs_our_adapters(base: Base, case: str, tmp_path: pathlib.Path) -> None:
    peft_type, rules = RULES[case]
    adapters = shaken(base.loaded, rules(base.name))
    if case == "adalora":
        sites = {path: x | {"e": x["e"].at[..., ::2].set(0.0)} for path, x in adapters.sites.items()}
        adapters = adapters.replace(sites=sites)
    out = peft.save(adapters, tmp_path / "out", architecture=base.loaded.config, peft_type=peft_type)
    expected = ours(base.loaded, adapters)
    base.peft_runs(out, expected)
    base.we_run(out, expected)


@pytest.mark.parametrize("base", ["tied"], indirect=True)
@pytest.mark.parametrize("beside", [{}, {r".*/q_proj": lr.lora(rank=2)}], ids=["alone", "lora"])
def test_trained_rows_of_a_tied_embedding_are_attended_to(base: Base, beside, tmp_path: pathlib.Path) -> None:
    rules = {TABLE[base.name]: lr.trainable_tokens((3, 60, int(TOKENS[0, 0]))), **beside}
    adapters = shaken(base.loaded, rules)
    out = peft.save(adapters, tmp_path / "out", architecture=base.loaded.config)
    expected = ours(base.loaded, adapters)
    assert np.abs(expected - base.logits)[..., 3].max() > 0.05
    base.peft_runs(out, expected)
    base.we_run(out, expected)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("kind", ["vera", "randlora"])
def test_projections_that_were_not_saved_are_refused(base: Base, kind: str, tmp_path: pathlib.Path) -> None:
    config = CONFIGS[kind](base.name)
    config.save_projection = False
    model = hf_peft.get_peft_model(torch_model(base.name, base.directory), config)
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(peft.PeftFormatError, match=f"no {kind}_A.*save_projection=True"):
        peft.load(tmp_path / "theirs", base.loaded.params, architecture=base.loaded.config)
