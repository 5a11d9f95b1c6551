"""Pre-training a small Llama with every method: validation loss and memory on equal tokens.

    python -m bench.pretrain --shakespeare=tinyshakespeare/input.txt        # about an hour on two cores

Four layers of width 128, 8 rows of 128 tokens an update, on BBC News (5 MB, an asset) and tinyshakespeare (1.1 MB, a file of yours).
A method's learning rate is the best of three on the articles, in runs of a quarter of the length (what is the same algorithm in another
number format, or by another route, takes the rate found for it); then every method runs in full on both corpora, one seed. Controls take
GaLore apart at its rate: see `CONTROLS`. Rows are appended to
bench/results/pretrain.jsonl as they come; cells that are there are not run again, so that the command can be stopped, or started twice with
different --only, and goes on.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import time
from typing import Any

from bench.common import RESULTS, machine, table, write_json
from configs.pretrain import RECIPES, get_config
from train.pretraining.config import method

STEPS, TUNING_STEPS = 400, 100
FACTORS = (0.5, 1.0, 2.0)
SAME_RATE = {"adamw_8bit": "adamw", "galore_8bit": "galore", "dual_galore": "galore", "relora": "lora"}
# {name: (method, its fields)}, at the rate found for GaLore.
CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw_scaled": ("adamw", {"scale": 0.25}),  # no subspaces
    # None either; a matrix's step is as long as GaLore's, which is sqrt(32 / 128) of Adam's by its rank.
    "adamw_short": ("adamw", {"scale": 0.125}),
    "frugal_scaled": ("frugal", {"scale": 0.25}),
    "galore_whole": (
        "galore",
        {"rank": 128},
    ),  # all directions, so that the coordinates are turned and nothing is left out
    # Random directions in place of singular ones; GaLore otherwise.
    "galore_random": ("frugal", {"scale": 0.25, "subspace": "random", "free_scale": 0.0, "on_refresh": "keep"}),
}
ROWS = RESULTS / "pretrain.jsonl"


def cell(corpus: str, recipe: str, factor: float, steps: int, file: str) -> dict[str, Any]:
    """One run."""
    import jax

    from train import metrics_log
    from train.pretraining import loop

    config = get_config("galore" if recipe in CONTROLS else recipe)
    if recipe in CONTROLS:
        name, fields = CONTROLS[recipe]
        every = {} if name == "adamw" else {"refresh_every": config.method.refresh_every}
        config.method = method(name, **fields, **every)
    config.learning_rate *= factor
    config.steps, config.checkpoint_every, config.eval_every, config.log_every = steps, 0, 50, 50
    if corpus == "shakespeare":
        config.data.name, config.data.directory, config.data.eval_limit = "text", file, 0
    with tempfile.TemporaryDirectory() as workdir:
        config.workdir = workdir
        result = loop.run(config)
        curve = [
            (row["step"], row["eval/loss"])
            for row in metrics_log.read(pathlib.Path(workdir) / "metrics.jsonl")
            if "eval/loss" in row
        ]
    jax.clear_caches()
    return {
        "corpus": corpus, "recipe": recipe, "factor": factor, "steps": steps, "rate": config.learning_rate, "loss": result.loss,
        "curve": curve, "tokens": result.tokens, "parameters": result.parameters, "trained": result.trained,
        "optimizer_bytes": result.optimizer_bytes, "stored_bytes": result.stored_bytes, "peak_bytes": result.peak_bytes,
        "refresh_peak_bytes": result.refresh_peak_bytes, "tokens_per_second": result.tokens_per_second, "seed": config.seed,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def known() -> dict[tuple[str, str, float, int], dict[str, Any]]:
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return {(r["corpus"], r["recipe"], r["factor"], r["steps"]): r for r in rows}


def needed(*key: Any, file: str) -> dict[str, Any]:
    """The row of a cell, run if it is not there."""
    rows = known()
    if key not in rows:
        print(f"== {key}", flush=True)
        row = cell(*key, file)
        with ROWS.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        return row
    return rows[key]


def best(recipe: str, file: str) -> float:
    """The factor of the recipe's rate with the lowest loss in the short runs."""
    recipe = "galore" if recipe in CONTROLS else SAME_RATE.get(recipe, recipe)
    rows = [needed("bbc", recipe, factor, TUNING_STEPS, file=file) for factor in FACTORS]
    return min(rows, key=lambda row: row["loss"] if row["loss"] == row["loss"] else float("inf"))["factor"]


def plot(rows: list[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["corpus"] for row in rows))
    figure = Figure(figsize=(7 * len(names), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, corpus in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for n, row in enumerate(sorted((r for r in rows if r["corpus"] == corpus), key=lambda r: r["loss"])):
            style = ("-", "--", ":")[n % 3]
            axes.plot(*zip(*row["curve"], strict=True), style, label=f"{row['recipe']} {row['loss']:.3f}")
        axes.set(title=corpus, xlabel="update (1,016 learned tokens each)", ylabel="validation loss, nats a token")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(RESULTS / "pretrain.png", dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shakespeare", default="", help="a text file; without it the articles alone")
    parser.add_argument("--only", default="", help="recipes, separated by commas")
    options = parser.parse_args()
    recipes = options.only.split(",") if options.only else [*RECIPES, *CONTROLS]
    corpora = ["bbc", "shakespeare"] if options.shakespeare else ["bbc"]
    rows = []
    for recipe in recipes:
        factor = best(recipe, options.shakespeare)
        rows += [needed(corpus, recipe, factor, STEPS, file=options.shakespeare) for corpus in corpora]
    rows.sort(key=lambda row: (corpora.index(row["corpus"]), row["loss"]))
    mib = lambda n: f"{n / 2**20:.1f}"  # noqa: E731
    shown = [
        (r["corpus"], r["recipe"], f"{r['rate']:.1e}", f"{r['loss']:.3f}", f"{r['trained']:,}", mib(r["optimizer_bytes"]),
         mib(r["stored_bytes"]), mib(r["peak_bytes"]))
        for r in rows
    ]  # fmt: skip
    columns = ("corpus", "method", "rate", "validation loss", "updated", "state MiB", "stored MiB", "peak MiB")
    table(columns, shown, f"{STEPS} updates of 8 x 128 tokens, one seed")
    if not options.only:
        write_json("pretrain", {"machine_of_rows": machine(), "rows": rows})
        plot(rows)


if __name__ == "__main__":
    main()
