"""Merges an adapter into its base, or exports it: python -m train.merge --adapter=runs/x/adapter --hf=out/ (--flax=, --peft=)"""

from __future__ import annotations

import pathlib

from absl import flags

from train import cli

_ADAPTER = flags.DEFINE_string("adapter", None, "The directory of an adapter that train.finetune wrote.")
_HF = flags.DEFINE_string("hf", None, "Write a Hugging Face directory here, which transformers loads.")
_FLAX = flags.DEFINE_string(
    "flax", None, "Write the parameters here as an Orbax checkpoint, which any Flax code loads."
)
_PEFT = flags.DEFINE_string("peft", None, "Write the adapter here, not merged, in PEFT's format.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what stands there.")
_TARGETS = {"hf": _HF, "flax": _FLAX, "peft": _PEFT}


def main() -> None:
    """Writes the merged model, or the adapter for PEFT."""
    import lowrank_jax as lr
    from lowrank_jax import checkpoint, models
    from train import base, saved

    targets = {name: pathlib.Path(flag.value).absolute() for name, flag in _TARGETS.items() if flag.value}
    if not targets:
        raise ValueError("give --hf=DIRECTORY, --flax=DIRECTORY or --peft=DIRECTORY, or several of them.")
    for target in targets.values():
        if target.exists() and any(target.iterdir()) and not _OVERWRITE.value:
            raise FileExistsError(f"{target} exists and is not empty; choose another directory or add --overwrite.")
    job, adapters = saved.load(_ADAPTER.value, saved.config(_ADAPTER.value))
    if "peft" in targets:
        name = job.config.model.source
        lr.peft.save(
            adapters,
            targets["peft"],
            architecture=job.model_config,
            base_model_name_or_path=name,
            overwrite=_OVERWRITE.value,
        )
    if targets.keys() - {"peft"}:
        merged = lr.merge(*base.under(job.config, job.params, adapters))
        if "hf" in targets:
            models.save(merged, job.model_config, targets["hf"], overwrite=_OVERWRITE.value)
            job.tokenizer.save(targets["hf"])
        if "flax" in targets:
            checkpoint.save_params(targets["flax"], merged)
    for target in targets.values():
        print(target)


if __name__ == "__main__":
    cli.run(main)
