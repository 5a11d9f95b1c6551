"""adapter_config.json: what is written, and which of PEFT's many fields can be honoured when one is read."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from lowrank_jax.files import json_object
from lowrank_jax.peft.codecs import CODECS
from lowrank_jax.peft.codecs.base import Codec
from lowrank_jax.peft.directory import FILE
from lowrank_jax.peft.fields import SELECTORS, WITHOUT_EFFECT, PeftFormatError, check_fields


def make_config(
    codec: Codec,
    fields: Mapping[str, Any],
    *,
    modules_to_save: list[str],
    task_type: str | None,
    base_model_name_or_path: str | None,
) -> dict[str, Any]:
    """The adapter_config of the fields that a codec wrote."""
    saved = {"modules_to_save": modules_to_save or None} if codec.saves_modules else {}
    return {
        **fields,
        **saved,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "peft_type": codec.peft_type,
        "task_type": task_type,
    }


def read_config(directory: pathlib.Path) -> tuple[Codec, dict[str, Any]]:
    """Reads and checks adapter_config.json.

    Returns:
      The codec of its ``peft_type``, and the configuration with its defaults filled in.

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
        config = json_object(file.read_bytes())
    except ValueError as error:
        raise PeftFormatError(f"{file} {error}; fetch it again.") from error
    codec = CODECS.get(str(config.get("peft_type")))
    if codec is None:
        raise PeftFormatError(
            f"{file}: peft_type is {config.get('peft_type')!r}; {', '.join(sorted(CODECS))} can be read. Convert it to LoRA with PEFT."
        )
    for name, why in codec.refused.items():
        if config.get(name):
            raise PeftFormatError(f"{file}: {name} = {config[name]!r} is not supported: {why}")
    if config.get("bias", "none") != "none":
        raise PeftFormatError(
            f"{file}: bias = {config['bias']!r} is not supported, expected 'none'; merge it with PEFT."
        )
    fields = {**SELECTORS, **codec.fields}
    check_fields(file, config, fields)
    codec.check(file, config)
    unknown = sorted(config.keys() - fields.keys() - WITHOUT_EFFECT - codec.silent - codec.refused.keys())
    if unknown:
        warnings.warn(f"{file}: unknown fields {unknown} are ignored.", stacklevel=3)
    return codec, config
