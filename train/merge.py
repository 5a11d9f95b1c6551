"""Merges an adapter into its base: python -m train.merge --adapter=runs/x/adapter --hf=out/ (or --flax=out/)"""

from __future__ import annotations

import pathlib

from absl import flags

from train import cli

_ADAPTER = flags.DEFINE_string("adapter", None, "The directory of an adapter that train.finetune wrote.")
_HF = flags.DEFINE_string("hf", None, "Write a Hugging Face directory here, which transformers loads.")
_FLAX = flags.DEFINE_string(
    "flax", None, "Write the parameters here as an Orbax checkpoint, which any Flax code loads."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what stands there.")


def main() -> None:
    """Writes the merged model."""
    import lowrank_jax as lr
    from lowrank_jax import checkpoint, models
    from train import saved

    targets = [pathlib.Path(value).absolute() for value in (_HF.value, _FLAX.value) if value]
    if not targets:
        raise ValueError("give --hf=DIRECTORY or --flax=DIRECTORY, or both.")
    for target in targets:
        if target.exists() and any(target.iterdir()) and not _OVERWRITE.value:
            raise FileExistsError(f"{target} exists and is not empty; choose another directory or add --overwrite.")
    job, adapters = saved.load(_ADAPTER.value, saved.config(_ADAPTER.value))
    merged = lr.merge(job.params, adapters)
    if _HF.value:
        models.save(merged, job.model_config, targets[0], overwrite=_OVERWRITE.value)
        job.tokenizer.save(targets[0])
    if _FLAX.value:
        checkpoint.save_params(targets[-1], merged)
    for target in targets:
        print(target)


if __name__ == "__main__":
    cli.run(main)
