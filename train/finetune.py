"""Fine-tunes an adapter: python -m train.finetune --config=configs/minilm_tweets_lamda.py [--config.field=value]"""

from __future__ import annotations

from ml_collections import config_flags

from train import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)


def main() -> None:
    """Runs the experiment that the flags name."""
    from train.loop import run

    run(cli.config(_CONFIG))


if __name__ == "__main__":
    cli.run(main, several=True)
