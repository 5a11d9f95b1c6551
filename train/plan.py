"""Prints a run's plan; with a topology, what the TPU compiler says an update needs. No TPU is needed for either.

    python -m train.plan --config=configs/minilm_tweets_lamda.py [--topology=v5e:2x2 --config.mesh.fsdp=4 --length=512]
    python -m train.plan --config=configs/smollm2_gsm8k_lamda.py --config.model.source=llama2_7b --topology=v5e:2x4 --search

--search tries meshes and remat policies (a minute each for a large model) and says which to take.

The model may be one of the shapes in `lowrank_jax.models` by name, such as --config.model.source=llama2_7b: no weights are read.
"""

from __future__ import annotations

from typing import Any

from absl import flags
from ml_collections import config_flags

from train import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU topology such as v5e:2x2, v5p:2x2x1 or v6e:4x4; or cpu, gpu.")
_SEARCH = flags.DEFINE_bool("search", False, "Find a mesh and a remat policy that fit the topology.")
_LENGTH = flags.DEFINE_integer("length", 0, "Tokens in a row of the batch; 0: config.data.max_length.", lower_bound=0)
_LABELS = flags.DEFINE_integer("labels", 2, "Classes of a classifier.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 1000, "Length of the run where the configuration counts epochs.", lower_bound=1)


def main() -> None:
    """Prints the plan and, if asked, the needs of every phase, or what fits."""
    from train import config as configs
    from train import preview

    config = cli.config(_CONFIG)
    configs.check(config)
    topology, labels = _TOPOLOGY.value, _LABELS.value
    total, length = config.steps or _STEPS.value, _LENGTH.value or config.data.max_length
    if _SEARCH.value:
        if not topology:
            raise configs.ConfigError("--search: expected --topology beside it, such as --topology=v5e:2x4.")
        _search(config, topology, length, total, labels)
        return
    mesh = preview.mesh(config, topology) if topology else None
    model = preview.abstract_model(config, labels, mesh)
    plan = preview.make_plan(config, model)
    print(plan)
    if topology and mesh is not None:
        print(preview.table(config, model, plan, mesh, total, length, topology))


def _search(config: Any, topology: str, length: int, total: int, labels: int) -> None:
    from rich.console import Console

    from lowrank_jax.memory import DoesNotFitError
    from train import fit, preview

    console = Console(stderr=True)
    with console.status("") as status:
        choices = fit.search(
            config, topology, length, total, labels, on_try=lambda what: status.update(f"compiling for {what}")
        )
    tokens = config.batch_size * length
    print(
        fit.report(
            choices, f"{config.model.source} on {topology}, batch {config.batch_size} x {length}; a chip", tokens
        )
    )
    print(preview.NOTE)
    best = choices[0]
    if best.needs is None:
        raise DoesNotFitError(
            f"Nothing fits {topology}. The last try: {best.refused} More chips, a smaller batch or config.accumulate may help."
        )
    fields = [f"--config.mesh.{axis}={size}" for axis, size in best.sizes.items() if size != config.mesh[axis]]
    print("Take", *fields, f"--config.model.remat={best.remat}")


if __name__ == "__main__":
    cli.run(main)
