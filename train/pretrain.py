"""Pre-trains a Llama from scratch: python -m train.pretrain --config=configs/pretrain.py:galore [--config.field=value]"""

from __future__ import annotations

from ml_collections import config_flags

from train import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)


def main() -> None:
    """Runs the experiment that the flags name."""
    from train.pretraining.loop import run

    run(cli.config(_CONFIG))


if __name__ == "__main__":
    cli.run(main, several=True)
