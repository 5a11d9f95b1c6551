"""adapter_config.json: what is written, and which of PEFT's many fields can be honoured when one is read."""

from __future__ import annotations

import json
import math
import pathlib
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from lowrank_jax.peft.targets import write_patterns, write_targets

FILE = "adapter_config.json"

# Fields that change what the saved tensors mean, and what to do about it.
_UNSUPPORTED = {
    "use_dora": "DoRA scales whole columns of the weight: merge it with PEFT and load the merged model.",
    "use_qalora": "QALoRA pools the input: merge it with PEFT and load the merged model.",
    "lora_bias": "the update has a bias: merge it with PEFT and load the merged model.",
    "layer_replication": "the model has other layers than its base: merge it with PEFT and load the merged model.",
    "trainable_token_indices": "rows of the embedding were trained: merge it with PEFT and load the merged model.",
    "target_parameters": "raw parameters are adapted: merge it with PEFT and load the merged model.",
    "alora_invocation_tokens": "the adapter is active on part of the sequence only, which has no equal here.",
    "use_bdlora": "the factors are block-diagonal: merge it with PEFT and load the merged model.",
    "arrow_config": "the adapter routes between others, which has no equal here.",
    "kasa_config": "the base is truncated: merge it with PEFT and load the merged model.",
    "monteclora_config": "the factors are random variables: merge it with PEFT and load the merged model.",
}
_HONOURED = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "use_rslora",
             "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights"}  # fmt: skip
# Fields that say how the adapter was made or is run in torch and leave the meaning of its tensors alone.
_WITHOUT_EFFECT = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "fan_in_fan_out",
                   "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
                   "qalora_group_size", "runtime_config", "ensure_weight_tying"}  # fmt: skip
# Initialisations that edit the base: the saved factors are then relative to weights that nobody published.
_EDITS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PeftFormatError(ValueError):
    """An adapter directory that contradicts itself or the model, or that uses what cannot be expressed here."""


def alpha_for(scale: float, rank: int) -> float | int:
    """The alpha whose ``alpha / rank`` is the scale, to the last bit where a short decimal gives it.

    Example:
      >>> alpha_for(2.0, 8), alpha_for(16 / 3, 3)
      (16, 16)
    """
    alpha = scale * rank
    short = next((c for c in (round(alpha), round(alpha, 9)) if c / rank == scale), alpha)
    return int(short) if math.isfinite(short) and short == int(short) else short


def make_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    dropout: float,
    known: Collection[str] | None,
    modules_to_save: list[str],
    task_type: str | None,
    base_model_name_or_path: str | None,
) -> dict[str, Any]:
    """The adapter_config of LoRAs of the given ranks and alphas, ``{module: value}``; ``known`` as in `targets.write_targets`."""
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "alpha_pattern": write_patterns(alphas, alpha),
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": modules_to_save or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": write_patterns(ranks, rank),
        "target_modules": write_targets(ranks, known),
        "task_type": task_type,
        "use_rslora": False,
    }


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """Reads and checks adapter_config.json.

    Raises:
      FileNotFoundError: no such file. PeftFormatError: not valid, or a field that cannot be honoured (named).
    """
    file = directory / FILE
    if not file.is_file():
        below = sorted(found.parent.name for found in directory.glob(f"*/{FILE}"))
        hint = f" There are adapters below: {', '.join(below)}." if below else ""
        raise FileNotFoundError(
            f"{file}: no such file; expected what PEFT's save_pretrained or lowrank_jax.peft.save wrote.{hint}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PeftFormatError(f"{file}: not valid JSON ({error}); fetch it again.") from error
    if not isinstance(config, dict):
        raise PeftFormatError(f"{file}: expected a JSON object, got {type(config).__name__}.")
    if config.get("peft_type") != "LORA":
        raise PeftFormatError(
            f"{file}: peft_type is {config.get('peft_type')!r}; only 'LORA' can be read. Convert it to LoRA with PEFT."
        )
    for name, why in _UNSUPPORTED.items():
        if config.get(name):
            raise PeftFormatError(f"{file}: {name} = {config[name]!r} is not supported: {why}")
    if config.get("bias", "none") != "none":
        raise PeftFormatError(
            f"{file}: bias = {config['bias']!r} is not supported, expected 'none'; merge it with PEFT."
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_EDITS_BASE):
        raise PeftFormatError(
            f"{file}: init_lora_weights = {init!r} edits the base, and these factors are relative to the edited one. Save the adapter "
            "again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    _check_values(file, config)
    unknown = sorted(set(config) - _HONOURED - _WITHOUT_EFFECT - set(_UNSUPPORTED))
    if unknown:
        warnings.warn(f"{file}: unknown fields {unknown} are ignored.", stacklevel=3)
    return config


def _check_values(file: pathlib.Path, config: dict[str, Any]) -> None:
    def expect(name: str, default: Any, good: bool, what: str) -> None:
        if not good:
            raise PeftFormatError(f"{file}: {name} = {config.get(name, default)!r}; expected {what}.")

    defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}
    for name, default in defaults.items():
        if config.get(name) is None:
            config[name] = default
    expect("r", 8, type(config["r"]) is int and config["r"] > 0, "a positive integer")
    expect("lora_alpha", 8, _finite(config["lora_alpha"]), "a number")
    expect(
        "lora_dropout",
        0.0,
        _finite(config["lora_dropout"]) and 0 <= config["lora_dropout"] < 1,
        "a probability in [0, 1)",
    )
    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    positive = isinstance(ranks, dict) and all(type(rank) is int and rank > 0 for rank in ranks.values())
    expect("rank_pattern", {}, positive, "positive integers by module")
    expect(
        "alpha_pattern", {}, isinstance(alphas, dict) and all(_finite(v) for v in alphas.values()), "numbers by module"
    )
    targets, saved = config.get("target_modules"), config.get("modules_to_save")
    readable = targets is None or isinstance(targets, str) or _names(targets)
    expect("target_modules", None, readable, "a list of names or a regular expression")
    expect("modules_to_save", None, saved is None or _names(saved), "a list of names")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _commonest(values: Mapping[str, Any]) -> Any:
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], value))
