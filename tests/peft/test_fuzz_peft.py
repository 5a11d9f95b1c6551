"""PEFT directories with every kind of damage: loaded, or refused by the loader's own error, and nothing read outside of them."""

import pathlib
import warnings

import numpy as np
import pytest
from fuzzing import JUNK, damaged, damaged_json, watched
from hand_written import FILES, load, write
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.models.tensors import CorruptFileError
from lowrank_jax.peft import PeftFormatError

KINDS = sorted(FILES)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """One directory of each type; loaded once, so that everything is imported and compiled."""
    root = tmp_path_factory.mktemp("peft")
    made = {kind: write(root / kind, FILES[kind][0], FILES[kind][1]()) for kind in KINDS}
    for directory in made.values():
        load(directory)
    return made


def _load(directory: pathlib.Path) -> None:
    size = sum(file.stat().st_size for file in directory.iterdir())
    with warnings.catch_warnings(), watched(directory, size):
        warnings.simplefilter("ignore")  # of unknown fields, and of scales that are infinite in float32
        try:
            load(directory)
        except (PeftFormatError, CorruptFileError):
            return


@given(kind=st.sampled_from(KINDS), data=st.data())
def test_damaged_configurations(good, kind, data):
    config = good[kind] / "adapter_config.json"
    full = FILES[kind][0] | {
        "exclude_modules": ["no"],
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {"up": 3},
    }
    full |= {"layers_to_transform": [0], "layers_pattern": "layers", "lora_dropout": 0.0, "bias": "none"}
    try:
        config.write_text(data.draw(damaged_json(full)))
        _load(good[kind])
    finally:
        write(good[kind], FILES[kind][0], FILES[kind][1]())


@given(kind=st.sampled_from(KINDS), data=st.data())
def test_damaged_weights(good, kind, data):
    file = good[kind] / "adapter_model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(data.draw(damaged(whole)))
        _load(good[kind])
    finally:
        file.write_bytes(whole)


NAMES = st.sampled_from(
    [str(junk) for junk in JUNK if junk != "\ud800"] + ["layers." + "9" * 5000 + ".up", "base_model.model.."]
)


@given(kind=st.sampled_from(KINDS), prefix=NAMES, other=NAMES, which=st.integers(0, 5))
def test_forged_names(good, kind, prefix, other, which):
    tensors = FILES[kind][1]()
    name = sorted(tensors)[which % len(tensors)]
    try:
        for forged in (prefix + name, name + prefix, f"{prefix}.{name.rpartition('.')[2]}", name.replace("up", other)):
            write(good[kind], FILES[kind][0], {n: x for n, x in tensors.items() if n != name} | {forged: tensors[name]})
            _load(good[kind])
            write(good[kind], FILES[kind][0], tensors | {forged: np.ones((3, 2), np.float16)})
            _load(good[kind])
    finally:
        write(good[kind], FILES[kind][0], FILES[kind][1]())


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, '{"peft_type": "LORA", "peft_type": "IA3"}', "nul", '"x"', "\udcff"]
)
def test_configurations_that_are_no_object(good, text):
    config = good["LORA"] / "adapter_config.json"
    config.write_bytes(text.encode("utf-8", "surrogateescape"))
    try:
        with pytest.raises(PeftFormatError, match="adapter_config.json is .*fetch it again"):
            load(good["LORA"])
    finally:
        write(good["LORA"], FILES["LORA"][0], FILES["LORA"][1]())


@pytest.mark.parametrize(
    ("field", "value"),
    [("target_modules", "("), ("exclude_modules", "a{99999999999}"), ("modules_to_save", ["x)(y"]), ("alpha_pattern", {"(": 1}),
     ("layers_pattern", "(layers)"), ("layers_to_transform", 1.5), ("lora_alpha", 10**300), ("feedforward_modules", "[")],
    ids=lambda part: str(part)[:20],
)  # fmt: skip
def test_expressions_and_numbers_that_cannot_be_used_are_named(tmp_path, field, value):
    kind = "IA3" if field == "feedforward_modules" else "LORA"
    with pytest.raises(PeftFormatError, match=f"{field} = "):
        load(write(tmp_path, FILES[kind][0] | {field: value}, FILES[kind][1]()))
