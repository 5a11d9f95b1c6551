"""Files of each peft_type as PEFT lays them out, made by hand, and the parameters that they are for."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np

import lowrank_jax as lr
from lowrank_jax import peft
from lowrank_jax.models.tensors import open_safetensors, save_safetensors
from lowrank_jax.sites import describe

PREFIX = "base_model.model."

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


PARAMS = {
    "up": {"kernel": jnp.asarray(normal(6, 8)), "bias": jnp.asarray(normal(8))},
    "down": {"kernel": jnp.asarray(normal(8, 5)), "bias": jnp.asarray(normal(5))},
    "conv": {"kernel": jnp.asarray(normal(3, 2, 4, 5))},
    "table": {"embedding": jnp.asarray(normal(9, 6))},
    "rows": {"kernel": jnp.asarray(normal(3, 4, 5))},
}

SITES = lr.sites(PARAMS) | {
    "conv/kernel": describe("conv/kernel", PARAMS["conv"]["kernel"], "conv", inputs=(0, 1, 2), outputs=(3,)),
    "rows/kernel": describe("rows/kernel", PARAMS["rows"]["kernel"], "conv", inputs=(0, 1), outputs=(2,)),
}

NAMES = {"up": "layers.0.up", "down": "layers.0.down", "conv": "conv", "table": "embed_tokens", "rows": "conv1d"}


def write(directory: pathlib.Path, config: dict, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_safetensors(directory / "adapter_model.safetensors", tensors, {"format": "pt"})
    return directory


def tensors_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: np.array(t.read()) for name, t in open_safetensors(directory / "adapter_model.safetensors").items()}


def config_of(directory: pathlib.Path) -> dict:
    return json.loads((directory / "adapter_config.json").read_text())


def load(directory: pathlib.Path, **changes) -> lr.Adapters:
    return peft.load(directory, PARAMS, **({"name_map": NAMES, "sites": SITES} | changes))


def assert_written_back(adapters: lr.Adapters, directory: pathlib.Path, peft_type: str | None = None) -> dict:
    """Saves and compares every tensor with the file the adapters came from; gives the new configuration."""
    out = peft.save(adapters, directory / "again", name_map=NAMES, peft_type=peft_type)
    was, now = tensors_of(directory), tensors_of(out)
    assert was.keys() == now.keys()
    for name, tensor in was.items():
        np.testing.assert_array_equal(now[name], tensor, err_msg=name)
    return config_of(out)


def changes(adapters: lr.Adapters) -> dict[str, np.ndarray]:
    """What merging adds, by path."""
    before, after = lr.sites(PARAMS), lr.merge(PARAMS, adapters)
    leaf = lambda tree, path: np.asarray(tree[path.split("/")[0]][path.split("/")[1]])  # noqa: E731
    return {path: leaf(after, path) - leaf(PARAMS, path) for path in before}


UP, DOWN, CONV, TABLE = (PREFIX + name for name in ("layers.0.up.", "layers.0.down.", "conv.", "embed_tokens."))

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}

ADALORA = {
    "peft_type": "ADALORA",
    "init_r": 3,
    "target_r": 2,
    "lora_alpha": 6,
    "total_step": 10,
    "target_modules": ["up", "conv"],
}

VERA = {"peft_type": "VERA", "r": 4, "target_modules": ["up", "down"], "d_initial": 0.1}


def vera_tensors() -> dict[str, np.ndarray]:
    return {UP + "vera_lambda_b": normal(8), UP + "vera_lambda_d": normal(4), DOWN + "vera_lambda_b": normal(5),
            DOWN + "vera_lambda_d": normal(4), "base_model.vera_A": normal(4, 8), "base_model.vera_B": normal(8, 4)}  # fmt: skip


RANDLORA = {"peft_type": "RANDLORA", "r": 2, "randlora_alpha": 6, "target_modules": ["up", "down"]}


def randlora_tensors() -> dict[str, np.ndarray]:
    return {UP + "randlora_lambda": normal(2, 3), UP + "randlora_gamma": normal(3, 6), DOWN + "randlora_lambda": normal(2, 3),
            DOWN + "randlora_gamma": normal(3, 5), "base_model.randlora_A": normal(2, 1, 8),
            "base_model.randlora_B": normal(8, 4, 2)}  # fmt: skip


IA3 = {"peft_type": "IA3", "target_modules": ["up", "down", "conv"], "feedforward_modules": ["down", "conv"]}


def ia3_tensors() -> dict[str, np.ndarray]:
    return {UP + "ia3_l": normal(8, 1), DOWN + "ia3_l": normal(1, 8), CONV + "ia3_l": normal(1, 4, 1, 1)}


TOKENS = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [4, 1], "target_modules": ["embed_tokens"]}

STACK = {"heads": [f"layers.{i}.up" for i in range(3)]}

STACKED = {"heads": {"kernel": jnp.asarray(normal(3, 6, 8)), "bias": jnp.asarray(normal(3, 8))}}

# One good file of each type, for the refusals that all have in common.
FILES = {
    "LORA": (LORA | {"target_modules": ["up"], "trainable_token_indices": [4]},
             lambda: {UP + "lora_A.weight": normal(2, 6), UP + "lora_B.weight": normal(8, 2),
                      TABLE + "token_adapter.trainable_tokens_delta": normal(1, 6)}),
    "DORA": (LORA | {"target_modules": ["up"], "use_dora": True},
             lambda: {UP + "lora_A.weight": normal(2, 6), UP + "lora_B.weight": normal(8, 2), UP + "lora_magnitude_vector": normal(8)}),
    "ADALORA": (ADALORA | {"target_modules": ["up"]},
                lambda: {UP + "lora_A": normal(3, 6), UP + "lora_B": normal(8, 3), UP + "lora_E": normal(3, 1)}),
    "VERA": (VERA, vera_tensors),
    "RANDLORA": (RANDLORA, randlora_tensors),
    "IA3": (IA3, ia3_tensors),
    "TRAINABLE_TOKENS": (TOKENS, lambda: {TABLE + "trainable_tokens_delta": normal(2, 6)}),
}  # fmt: skip
