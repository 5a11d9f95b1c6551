"""Prints a run's plan; with a topology, what the TPU compiler says an update needs. No TPU is needed for either.

    python -m train.plan --config=configs/minilm_tweets_lamda.py [--topology=v5e:2x2 --config.mesh.fsdp=4 --length=512]

The model may be one of the shapes in `lowrank_jax.models` by name, such as --config.model.source=llama2_7b: no weights are read.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from train import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU topology such as v5e:2x2, v5p:2x2x1 or v6e:4x4.")
_LENGTH = flags.DEFINE_integer("length", 0, "Tokens in a row of the batch; 0: config.data.max_length.", lower_bound=0)
_LABELS = flags.DEFINE_integer("labels", 2, "Classes of a classifier.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 1000, "Length of the run where the configuration counts epochs.", lower_bound=1)


def main() -> None:
    """Prints the plan and, if asked, the needs of every phase."""
    from train import config as configs
    from train import preview

    config = cli.config(_CONFIG)
    configs.check(config)
    topology = _TOPOLOGY.value
    mesh = preview.mesh(config, topology) if topology else None
    model = preview.abstract_model(config, _LABELS.value, mesh)
    plan = preview.make_plan(config, model)
    print(plan)
    if topology and mesh is not None:
        total, length = config.steps or _STEPS.value, _LENGTH.value or config.data.max_length
        print(preview.table(config, model, plan, mesh, total, length, topology))


if __name__ == "__main__":
    cli.run(main)
