"""Parameters of experts: where each direction of each expert stands in the two matrices, and whose they are. Needs no torch."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_methods import PREFIX, normal, tensors_of, write

import lowrank_jax as lr
from lowrank_jax import peft
from lowrank_jax.sites import describe

EXPERTS, RANK, N_IN, N_OUT = 3, 2, 6, 4
PARAMS = {
    "up": {"kernel": jnp.asarray(normal(EXPERTS, N_IN, N_OUT))},
    "down": {"kernel": jnp.asarray(normal(EXPERTS, N_OUT, N_IN))},
}


def site(path: str, scanned: int = 0, params=PARAMS) -> lr.Site:
    leaf = params[path.split("/")[0]]["kernel"]
    axes = range(scanned, scanned + 3)
    return describe(
        path,
        leaf,
        "dense",
        batch=(*range(scanned), axes[0]),
        inputs=axes[1:2],
        outputs=axes[2:],
        scanned=range(scanned),
    )


SITES = {path: site(path) for path in ("up/kernel", "down/kernel")}


def names(flipped: bool = False) -> dict:
    return {
        "up": peft.Parameter("mlp.experts", "gate_up_proj", 0, flipped),
        "down": peft.Parameter("mlp.experts", "down_proj", 1, flipped),
    }


CONFIG = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 6,
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj"],
}
OUTER, INNER = PREFIX + "mlp.experts.", PREFIX + "mlp.experts.base_layer."


def updates(a: np.ndarray, b: np.ndarray, experts: int = EXPERTS) -> np.ndarray:
    """[experts, in, out] of PEFT's matrices: rows of A go expert by expert, columns of B direction by direction."""
    rank = len(a) // experts
    total = np.zeros((experts, a.shape[1], len(b)), np.float32)
    for e in range(experts):
        for k in range(rank):
            total[e] += np.outer(a[e * rank + k], b[:, k * experts + e])
    return total


def change(adapters: lr.Adapters, name: str, params=PARAMS) -> np.ndarray:
    return np.asarray(lr.merge(params, adapters)[name]["kernel"] - params[name]["kernel"])


@pytest.mark.parametrize("flipped", [False, True])
def test_one_parameter(flipped: bool, tmp_path: pathlib.Path) -> None:
    n_in, n_out = (N_OUT, N_IN) if flipped else (N_IN, N_OUT)
    a, b = normal(EXPERTS * RANK, n_in), normal(n_out, EXPERTS * RANK)
    write(tmp_path, CONFIG, {OUTER + "lora_A.weight": a, OUTER + "lora_B.weight": b})
    adapters = peft.load(tmp_path, PARAMS, name_map=names(flipped), sites=SITES)
    expected = 3 * updates(a, b)
    np.testing.assert_allclose(change(adapters, "up"), np.swapaxes(expected, 1, 2) if flipped else expected, atol=1e-5)
    out = peft.save(adapters, tmp_path / "again", name_map=names(flipped))
    for name, tensor in tensors_of(tmp_path).items():
        np.testing.assert_array_equal(tensors_of(out)[name], tensor)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj"] and config["target_modules"] == []


def two(tmp_path: pathlib.Path) -> dict[str, np.ndarray]:
    tensors = {INNER + "lora_A.weight": normal(EXPERTS * RANK, N_IN), INNER + "lora_B.weight": normal(N_OUT, EXPERTS * RANK),
               OUTER + "lora_A.weight": normal(EXPERTS, N_OUT), OUTER + "lora_B.weight": normal(N_IN, EXPERTS)}  # fmt: skip
    fields = {
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        "rank_pattern": {"experts.down_proj": 1},
    }
    write(tmp_path, CONFIG | fields, tensors)
    return tensors


def test_the_last_of_two_parameters_is_the_outermost(tmp_path: pathlib.Path) -> None:
    t = two(tmp_path)
    adapters = peft.load(tmp_path, PARAMS, name_map=names(), sites=SITES)
    for name, where, scale in (("up", INNER, 3), ("down", OUTER, 6)):
        expected = scale * updates(t[where + "lora_A.weight"], t[where + "lora_B.weight"])
        np.testing.assert_allclose(change(adapters, name), expected, atol=1e-5)
    out = peft.save(adapters, tmp_path / "again", name_map=names())
    for name, tensor in t.items():
        np.testing.assert_array_equal(tensors_of(out)[name], tensor)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rank_pattern"] | {"r": config["r"]} in (
        {"mlp.experts.down_proj": 1, "r": 2}, {"mlp.experts.gate_up_proj": 2, "r": 1})  # fmt: skip


def test_scanned_layers_of_experts(tmp_path: pathlib.Path) -> None:
    params = {"up": {"kernel": jnp.asarray(normal(2, EXPERTS, N_IN, N_OUT))}}
    sites = {"up/kernel": site("up/kernel", 1, params)}
    layers = {"up": [peft.Parameter(f"layers.{n}.experts", "up") for n in range(2)]}
    adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"up": lr.lora(rank=2, alpha=6)}, sites=sites))
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), adapters)
    out = peft.save(adapters, tmp_path / "out", name_map=layers)
    t = tensors_of(out)
    second = (t[PREFIX + "layers.1.experts.lora_A.weight"], t[PREFIX + "layers.1.experts.lora_B.weight"])
    np.testing.assert_allclose(change(adapters, "up", params)[1], 3 * updates(*second), atol=1e-5)
    by_function = lambda path, n: layers["up"][n // EXPERTS]  # noqa: E731
    for name_map in (layers, by_function):
        loaded = peft.load(out, params, name_map=name_map, sites=sites)
        assert loaded.plan == adapters.plan
        jax.tree.map(np.testing.assert_array_equal, loaded.sites, adapters.sites)


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (lambda t: t.pop(INNER + "lora_B.weight"), r"gate_up_proj: the adapter holds \['lora_A'\]"),
        (lambda t: (t.pop(INNER + "lora_A.weight"), t.pop(INNER + "lora_B.weight")), "names 2 parameter.*tensors of 1"),
        (
            lambda t: t.update({OUTER + "lora_A.weight": normal(EXPERTS, 5)}),
            r"down_proj.lora_A has shape \(3, 5\); expected \(3, 4\)",
        ),
        (lambda t: t.update({INNER + "lora_B.weight": normal(N_OUT, 7)}), r"expected \(4, 6\) for up/kernel at rank 2"),
    ],
)
def test_tensors_that_do_not_fit(alter, words: str, tmp_path: pathlib.Path) -> None:
    tensors = two(tmp_path)
    alter(tensors)
    write(tmp_path, json.loads((tmp_path / "adapter_config.json").read_text()), tensors)
    with pytest.raises(peft.PeftFormatError, match=words):
        peft.load(tmp_path, PARAMS, name_map=names(), sites=SITES)


def test_names_that_do_not_fit(tmp_path: pathlib.Path) -> None:
    two(tmp_path)
    with pytest.raises(peft.PeftFormatError, match="names 1 parameter.*tensors of 2.*Parameter for each"):
        peft.load(tmp_path, PARAMS, name_map={"up": names()["up"]}, sites=SITES)
    same = {"up": names()["up"], "down": peft.Parameter("mlp.experts", "down_proj")}
    with pytest.raises(ValueError, match="experts: .*_proj and .*_proj both have position=0"):
        peft.load(tmp_path, PARAMS, name_map=same, sites=SITES)
    with pytest.raises(ValueError, match="is a stack of 3, but 2 module names"):
        peft.load(tmp_path, PARAMS, name_map={"up": [names()["up"], names()["down"]]}, sites=SITES)
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, {"up": lr.ia3()}, sites=SITES))
    with pytest.raises(lr.forms.UnsupportedError, match="gate_up_proj is a parameter, which PEFT adapts by LoRA only"):
        peft.save(adapters, tmp_path / "out", name_map=names())
