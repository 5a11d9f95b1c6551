"""What a run leaves to look at: a table on the terminal, result.json, and the curves as a picture."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowrank_jax.files import write_file
from lowrank_jax.plan_table import human_bytes
from train import metrics_log

if TYPE_CHECKING:
    from train.job import Job
    from train.loop import Result


def write(job: Job, result: Result) -> None:
    """Writes ``result.json`` and ``curves.png`` into the run's directory and prints the table."""
    plain = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in dataclasses.asdict(result).items()}
    write_file(result.workdir / "result.json", [(json.dumps(plain, indent=1, sort_keys=True) + "\n").encode()])
    picture = plot(metrics_log.read(result.workdir / "metrics.jsonl"), result.workdir / "curves.png", job.config.name)
    show(job.config.name, rows(job, result, picture))


def show(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Prints a run's table."""
    from rich.console import Console
    from rich.table import Table

    out = Table("", "value", title=title, title_justify="left", show_header=False)
    for row in rows:
        out.add_row(*row)
    Console().print(out)


def rows(job: Job, result: Result, picture: pathlib.Path) -> list[tuple[str, str]]:
    """The rows of the final table."""
    out = []
    for split, scores in (("", result.scores), ("test ", result.test)):
        for name, value in scores.items():
            out.append((f"{split}{name}", f"{value:.4f}"))
    share = result.trainable / max(job.plan.base_count, 1)
    return [
        *out,
        ("trained parameters at the start", f"{result.trainable:,} ({share:.2%} of {job.plan.base_count:,})"),
        ("trained parameters at the end", f"{result.trainable_end:,}"),
        ("peak memory of an update", human_bytes(result.peak_bytes) if result.peak_bytes else "no update was made"),
        ("time", f"{int(result.seconds) // 60} min {int(result.seconds) % 60} s"),
        ("kept", f"step {result.step} of {result.steps}"),
        ("adapter", f"{near(result.adapter)} ({human_bytes(result.adapter_bytes)})"),
        ("curves", str(near(picture))),
    ]


def plot(rows: list[dict[str, Any]], file: pathlib.Path, title: str) -> pathlib.Path:
    """Draws the training loss and every score of the evaluations by step, as PNG.

    Args:
      rows: of metrics.jsonl.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [
        n for n in dict.fromkeys(name for row in rows for name in row) if n.startswith("eval/") and n != "eval/loss"
    ]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, shown in ((left, ["train/loss", "eval/loss"]), (right, names)):
        for name in shown:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
    write_file(file, [image.getvalue()])
    return file


def near(path: pathlib.Path) -> pathlib.Path:
    """The path as seen from here, where it lies below."""
    return path.relative_to(pathlib.Path.cwd()) if path.is_relative_to(pathlib.Path.cwd()) else path
