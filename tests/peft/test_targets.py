"""Module selectors: what PEFT would select, checked by PEFT's own rules on every module of the model."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.peft.targets import pattern_value, saves, selects, write_patterns, write_targets

MODULES = [
    "a",
    *(f"a.{i}.{part}" for i in (0, 1, 10) for part in ("q", "out.dense", "mlp.dense", "mlp.out.dense")),
    "q",
    "b.a.0.q",
]
PARENTS = sorted({name.rsplit(".", n)[0] for name in MODULES for n in range(4)})


@given(st.sets(st.sampled_from(MODULES), min_size=1))
def test_targets_select_exactly_the_chosen_modules(chosen: set[str]) -> None:
    known = {*MODULES, *PARENTS}
    targets = write_targets(chosen, known)
    assert {name for name in known if selects({"target_modules": targets}, name)} == chosen


@given(st.dictionaries(st.sampled_from(MODULES), st.integers(1, 4), min_size=1))
def test_patterns_give_every_module_its_value(values: dict[str, int]) -> None:
    default = next(iter(values.values()))
    patterns = write_patterns(values, default)
    assert {name: pattern_value(patterns, name, default) for name in values} == values
    assert default not in patterns.values()


def test_full_names_are_written_where_the_model_is_unknown() -> None:
    assert write_targets(["x.1.q", "x.0.q"], None) == ["x.0.q", "x.1.q"]


def test_a_regular_expression_where_a_full_name_is_an_ending() -> None:
    targets = write_targets(["a.q"], ["a", "a.q", "b", "b.a", "b.a.q"])
    assert isinstance(targets, str) and re.fullmatch(targets, "a.q") and not re.fullmatch(targets, "b.a.q")


@pytest.mark.parametrize(
    ("fields", "module", "expected"),
    [
        ({"target_modules": ["q"]}, "x.0.q", True),
        ({"target_modules": ["q"]}, "x.0.aq", False),
        ({"target_modules": r".*\.(q|v)"}, "x.0.v", True),
        ({"target_modules": r"q"}, "x.0.q", False),
        ({"target_modules": "all-linear"}, "x.0.q", None),
        ({"target_modules": ["q"], "exclude_modules": ["0.q"]}, "x.0.q", False),
        ({"target_modules": ["q"], "exclude_modules": r"x\.0\..*"}, "x.0.q", False),
        ({"target_modules": ["q"], "modules_to_save": ["head"]}, "head.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "x.layers.0.q", False),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "x.layers.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "blocks"}, "x.layers.1.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["h", "blocks"]}, "blocks.1.q", True),
    ],
)
def test_selects_as_peft_does(fields: dict, module: str, expected: bool | None) -> None:
    assert selects(fields, module) is expected


def test_saved_modules_include_their_parts() -> None:
    assert saves({"modules_to_save": ["classifier"]}, "model.classifier.dense")
    assert not saves({"modules_to_save": ["classifier"]}, "model.query") and not saves({}, "classifier")
