"""The model card that lies beside an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence


def model_card(
    base_model: str | None,
    task_type: str | None,
    peft_type: str,
    methods: Iterable[str],
    modules: int,
    whole: Sequence[str] = (),
) -> str:
    """README.md with the metadata that model hubs read.

    Args:
      methods: how it was trained. modules: number of modules that are adapted. whole: modules that are stored in full.

    Example:
      >>> print(model_card("roberta-base", None, "LORA", ["lora(rank=8)"], 24).splitlines()[1])
      base_model: "roberta-base"
    """
    tags = [*([f"base_model:adapter:{base_model}"] if base_model else []), peft_type.lower()]
    lines = ["---"]
    if base_model:
        lines.append(f"base_model: {json.dumps(base_model)}")
    lines.append("library_name: peft")
    if task_type == "CAUSAL_LM":
        lines.append("pipeline_tag: text-generation")
    elif task_type == "SEQ_CLS":
        lines.append("pipeline_tag: text-classification")
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", ""]
    lines += [
        f"# Adapter{f' of {base_model}' if base_model else ''}",
        "",
        f"Written by lowrank_jax: {peft_type} on {modules} modules, relative to the published weights of the base. Trained with:",
        "",
        *(f"- `{method}`" for method in sorted(set(methods))),
        "",
    ]
    if whole:
        lines += [f"Stored in full: {', '.join(f'`{name}`' for name in whole)}.", ""]
    return "\n".join(lines)
