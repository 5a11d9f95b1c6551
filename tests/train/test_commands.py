"""The commands as a user runs them."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny

from train import loop
from train.config import base, rule

ROOT = pathlib.Path(__file__).parents[2]


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> loop.Result:
    """A language model trained for four updates on packed rows."""
    root = tmp_path_factory.mktemp("language")
    config = base()
    config.name, config.task, config.workdir = "language", "causal_lm", str(root / "run")
    config.model.source = str(tiny.llama(root / "llama"))
    config.data.name, config.data.directory = "e2e", str(tiny.restaurants(root / "data"))
    config.data.max_length, config.data.pack = 32, True
    config.adapter = rule("lora", "layers/.*_proj", rank=2)
    config.steps, config.batch_size, config.eval_batch_size, config.generate, config.max_new_tokens = 4, 2, 4, 3, 5
    return loop.run(config)


def test_a_language_model_is_scored_by_loss_perplexity_and_generation(language):
    assert set(language.scores) == {"loss", "perplexity", "exact_match"}
    assert 0 <= language.scores["exact_match"] <= 1


def test_evaluate_prints_the_scores_of_a_split(language):
    done = _command("train.evaluate", f"--adapter={language.adapter}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"] == pytest.approx(language.scores["loss"], rel=1e-5)


def test_generate_continues_a_prompt(language):
    done = _command("train.generate", f"--adapter={language.adapter}", "--prompt=w1 w2", "--max_new_tokens=4")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_generate_continues_a_prompt_with_a_plain_model(tmp_path):
    done = _command(
        "train.generate", f"--model={tiny.llama(tmp_path / 'llama')}", "--prompt=w1 w2", "--max_new_tokens=4"
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    done = _command("train.generate", "--model=x", "--adapter=y", "--prompt=w1")
    assert done.returncode == 2 and "expected one of them" in done.stderr


def test_merge_writes_what_our_loader_and_orbax_read(language, tmp_path):
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    from lowrank_jax import models

    done = _command(
        "train.merge",
        f"--adapter={language.adapter}",
        f"--hf={tmp_path / 'hf'}",
        f"--flax={tmp_path / 'flax'}",
        f"--peft={tmp_path / 'peft'}",
    )
    assert done.returncode == 0, done.stderr
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in (tmp_path / "peft").iterdir()}
    ours, plain = models.load(tmp_path / "hf", scan_layers=True).params, ocp.load(tmp_path / "flax")
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True))
    again = _command("train.merge", f"--adapter={language.adapter}", f"--hf={tmp_path / 'hf'}")
    assert again.returncode == 2 and "not empty" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.finetune"], "--config is missing"),
        (["train.finetune", "--config=configs/minilm_tweets_lora.py", "--config.stepps=3"], "stepps"),
        (
            ["train.finetune", "--config=configs/minilm_tweets_lora.py", "--config.adapter.method=lorra"],
            "Unknown method 'lorra'",
        ),
        (["train.finetune", "--config=configs/nothere.py"], "configs/nothere.py"),
        (
            ["train.plan", "--config=configs/minilm_tweets_lora.py", "--config.model.source=nosuch"],
            "config.model.source='nosuch'",
        ),
        (["train.evaluate", "--adapter=/nowhere"], "/nowhere/adapter.json: no such file"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message):
    done = _command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr and "Traceback" not in done.stderr
