"""The notebooks run from the first cell to the last, with toy weights and data, and are what their scripts say."""

from __future__ import annotations

import csv
import os
import pathlib
import random
import subprocess
import sys

import jupytext
import pytest

from lowrank_jax import assets

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "colab").glob("*.py"))
TWEETS = 6_200  # 6,000 of them are held back


def _folder(cache: pathlib.Path, name: str) -> pathlib.Path:
    folder = cache / "lowrank_jax" / "assets" / f"{name}-{assets.ASSETS[name].sha256[:12]}"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A cache in which the assets are toys, so that nothing is fetched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests" / "train"))
        import tiny
    cache, dice = tmp_path_factory.mktemp("cache"), random.Random(0)
    tiny.bert(_folder(cache, "minilm"))
    with (_folder(cache, "tweets") / assets.ASSETS["tweets"].result).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("sentiment", "text"))
        for i in range(TWEETS):
            label = ("negative", "neutral", "positive")[i % 3]
            writer.writerow((label, " ".join(dice.choices(tiny.WORDS[i % 3 :: 3], k=8))))
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_runs(script: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path) -> None:
    environment = os.environ | {
        "LOWRANK_JAX_TINY": "1", "LOWRANK_JAX_OFFLINE": "1", "XDG_CACHE_HOME": str(cache), "MPLBACKEND": "Agg",
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {file.name for file in (tmp_path / "tweets-lamda").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_notebook_and_script_agree(script: pathlib.Path) -> None:
    # Bring them together again with: jupytext --sync colab/*.py
    ours, theirs = jupytext.read(script), jupytext.read(script.with_suffix(".ipynb"))
    assert [(cell.cell_type, cell.source) for cell in theirs.cells] == [
        (cell.cell_type, cell.source) for cell in ours.cells
    ]
    code = [cell for cell in theirs.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_prose_stands_before_every_code_cell(script: pathlib.Path) -> None:
    kinds = [cell.cell_type for cell in jupytext.read(script).cells]
    assert all(before == "markdown" for before, kind in zip(["code", *kinds], kinds, strict=False) if kind == "code")


def test_there_is_a_notebook() -> None:
    assert SCRIPTS
