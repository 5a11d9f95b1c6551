"""Where a run's numbers go: the progress bar, a JSON-lines file, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lowrank_jax.files import json_object, storing, write_file
from lowrank_jax.hosts import leads
from train.tensorboard import EventFile


class MetricsLog:
    """Writes numbers by step to ``metrics.jsonl`` and ``tensorboard/`` in the run's directory. Of several processes the first writes.

    Args:
      directory: exists. step: the step a run goes on from: lines after it, of steps that will be made again, are removed.
    """

    def __init__(self, directory: pathlib.Path, step: int = 0):
        self._writes = leads()
        if not self._writes:
            return
        self._file = directory / "metrics.jsonl"
        kept = [row for row in read(self._file) if row["step"] <= step]
        write_file(self._file, [(json.dumps(row) + "\n").encode() for row in kept])
        with self._storing():
            self._stream = self._file.open("a")
            self._board = EventFile(directory / "tensorboard", step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line; names such as 'train/loss'.

        Raises:
          StorageError: the disk is full or failing.
        """
        if not self._writes:
            return
        with self._storing():
            self._stream.write(json.dumps({"step": step, **values}) + "\n")
            self._stream.flush()
            self._board.write(step, dict(values))

    def close(self) -> None:
        if self._writes:
            with self._storing():
                self._stream.close()
                self._board.close()

    def _storing(self) -> contextlib.AbstractContextManager[None]:
        return storing(self._file, "Make room; the same command goes on from the newest checkpoint.")


def read(file: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; what follows a line that a killed process or a full disk left unfinished is dropped."""
    if not file.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in file.read_bytes().splitlines():
        try:
            row = json_object(line)
        except ValueError:
            break
        if type(row.get("step")) is not int:
            break
        rows.append(row)
    return rows


class Bar:
    """A progress line on stderr: a live bar on a terminal, one line a report where the output is a file; by process 0 alone."""

    def __init__(self, total: int, step: int, unit: str):
        self.console = Console(stderr=True, quiet=not leads())
        self._unit, self._total = unit, total
        self._live = self.console.is_terminal
        columns = (TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"),
                   TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        self._progress = Progress(*columns, console=self.console, disable=not self._live)
        self._task = self._progress.add_task("train", total=total, completed=step, note="")
        self._began, self._first = time.perf_counter(), step

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to a step."""
        self._progress.update(self._task, completed=step)

    def report(self, step: int, loss: float, rate: float) -> None:
        """Shows the loss and the speed; ``rate`` is in units a second."""
        note = f"loss {loss:.4f}  {rate:,.0f} {self._unit}/s"
        self._progress.update(self._task, completed=step, note=note)
        if not self._live:
            left = (time.perf_counter() - self._began) / max(step - self._first, 1) * (self._total - step)
            self.console.print(
                f"step {step}/{self._total}  {note}  left {int(left) // 60}:{int(left) % 60:02d}", highlight=False
            )

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, highlight=False)

    def doing(self, text: str) -> None:
        """Names something slow on the bar itself, such as a compilation."""
        self._progress.update(self._task, note=text)
