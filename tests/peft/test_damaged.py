"""Files of every peft_type that are damaged, make no sense, or hold what we do not know."""

import pathlib

import numpy as np
import pytest
from hand_written import FILES, load, write

from lowrank_jax import peft
from lowrank_jax.models.tensors import CorruptFileError


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_of_every_type(kind: str, tmp_path: pathlib.Path) -> None:
    config, make = FILES[kind]
    tensors = make()
    load(write(tmp_path, config, tensors))
    for name in tensors:
        write(tmp_path, config, {other: x for other, x in tensors.items() if other != name})
        with pytest.raises(peft.PeftFormatError, match="missing|expected|no tensors|save_projection"):
            load(tmp_path)
        write(tmp_path, config, tensors | {name: tensors[name][:-1]})
        with pytest.raises(peft.PeftFormatError, match=r"has shape .*; expected"):
            load(tmp_path)
        write(tmp_path, config, tensors | {name: tensors[name].astype(np.int32)})
        with pytest.raises(peft.PeftFormatError, match="type int32"):
            load(tmp_path)
    write(tmp_path, config, tensors)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CorruptFileError, match="adapter_model.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("LORA", {"trainable_token_indices": [9]}),
        ("LORA", {"trainable_token_indices": None}),
        ("LORA", {"trainable_token_indices": {"lm_head": [4]}}),
        ("DORA", {"use_rslora": "yes"}),
        ("ADALORA", {"init_r": 0}),
        ("ADALORA", {"lora_alpha": 0}),
        ("ADALORA", {"rank_pattern": {"layers.0.up.lora_E": [True]}}),
        ("ADALORA", {"rank_pattern": {"layers.0.up.lora_E": 2}}),
        ("ADALORA", {"use_dora": True}),
        ("ADALORA", {"target_parameters": ["x.y"]}),
        ("VERA", {"r": "4"}),
        ("VERA", {"vera_dropout": 2}),
        ("VERA", {"bias": "vera_only"}),
        ("RANDLORA", {"sparse": 1}),
        ("RANDLORA", {"randlora_alpha": None, "r": -1}),
        ("IA3", {"feedforward_modules": [3]}),
        ("IA3", {"feedforward_modules": None}),
        ("TRAINABLE_TOKENS", {"token_indices": [1, 1]}),
        ("TRAINABLE_TOKENS", {"token_indices": [1, 9]}),
    ],
    ids=str,
)
def test_values_that_make_no_sense(kind: str, fields: dict, tmp_path: pathlib.Path) -> None:
    config, make = FILES[kind]
    with pytest.raises(peft.PeftFormatError, match=f"{list(fields)[-1]}|row 9"):
        load(write(tmp_path, config | fields, make()))


@pytest.mark.parametrize("kind", FILES)
def test_unknown_fields_warn(kind: str, tmp_path: pathlib.Path) -> None:
    config, make = FILES[kind]
    with pytest.warns(UserWarning, match="foobar"):
        load(write(tmp_path, config | {"foobar": 1}, make()))
