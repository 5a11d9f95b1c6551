"""How many dimensions a task takes: the smallest that reaches a share of what full training does, and the curve on the way there."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lowrank_jax.text_table import as_text


@dataclass(frozen=True)
class D90:
    """Metrics by dimension, as `d90` found them. Printing it shows a table.

    Attributes:
      dimensions: what was trained, ascending. metrics: what each reached; NaN where a run diverged.
      baseline: the metric of full training. share, chance: what was asked for.
    """

    dimensions: tuple[int, ...]
    metrics: tuple[float, ...]
    baseline: float
    share: float = 0.9
    chance: float = 0.0

    @property
    def threshold(self) -> float:
        """The metric to reach: ``chance + share * (baseline - chance)``."""
        return self.chance + self.share * (self.baseline - self.chance)

    @property
    def reached(self) -> tuple[bool, ...]:
        """Which dimensions reach the threshold."""
        return tuple(math.isfinite(metric) and metric >= self.threshold for metric in self.metrics)

    @property
    def dimension(self) -> int | None:
        """The smallest dimension seen to reach it; None: none did."""
        return next((d for d, good in zip(self.dimensions, self.reached, strict=True) if good), None)

    @property
    def below(self) -> int | None:
        """The largest smaller dimension, which did not reach it; None: none was tried, so ``dimension`` is only an upper bound."""
        found = self.dimension
        return max((d for d in self.dimensions if found is None or d < found), default=None)

    @property
    def exceptions(self) -> tuple[int, ...]:
        """Dimensions above it that did not reach it: a sign of noise, which more seeds or learning rates a dimension lessen."""
        found = self.dimension
        missed = (d for d, good in zip(self.dimensions, self.reached, strict=True) if not good)
        return tuple(d for d in missed if found is not None and d > found)

    def __str__(self) -> str:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("dimension", justify="right")
        table.add_column("metric", justify="right")
        table.add_column("of full", justify="right")
        table.add_column("reached")
        for d, metric, good in zip(self.dimensions, self.metrics, self.reached, strict=True):
            part = (metric - self.chance) / (self.baseline - self.chance)
            table.add_row(f"{d:,}", f"{metric:.4f}", f"{part:.1%}", "yes" if good else "no")
        table.add_row("full", f"{self.baseline:.4f}", "100.0%", "")
        return f"{as_text(table, 120)}\n\n{self._verdict()}"

    def plot(self, path: str | pathlib.Path, title: str = "") -> pathlib.Path:
        """Writes the curve as a picture; the file's ending says of which kind."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(self.dimensions, self.metrics, "o-", color="tab:blue", label="subspace")
        axes.axhline(self.baseline, color="black", label="full training")
        axes.axhline(self.threshold, color="black", linestyle="--", label=f"{self.share:.0%} of it")
        if self.dimension is not None:
            axes.axvline(self.dimension, color="tab:red", label=f"d = {self.dimension:,}")
        axes.set_xscale("log")
        axes.set_xlabel("dimension")
        axes.set_ylabel("metric")
        axes.set_title(title)
        axes.legend()
        path = pathlib.Path(path)
        figure.savefig(path, dpi=144)
        return path

    def _verdict(self) -> str:
        name, target = f"d{100 * self.share:g}", f"to reach {self.threshold:.4f}"
        if self.dimension is None:
            return f"{name} is above {self.dimensions[-1]:,}: no dimension tried was enough {target}."
        if self.below is None:
            return f"{name} is at most {self.dimension:,}, the smallest tried, {target}."
        noise = "".join(f" {d:,} did not reach it." for d in self.exceptions)
        return f"{name} is {self.dimension:,}: the smallest tried {target}; {self.below:,} was not enough.{noise}"


def d90(
    run: Callable[[int], float],
    baseline: float,
    low: int,
    high: int,
    *,
    points: int = 7,
    resolution: float = 1.1,
    share: float = 0.9,
    chance: float = 0.0,
) -> D90:
    """Measures how many dimensions a task takes: the smallest d with which training in a random subspace reaches 90% of full training.

    Measuring the Intrinsic Dimension of Objective Landscapes (arXiv 1804.08838); for fine-tuning, Intrinsic Dimensionality Explains the
    Effectiveness of Language Model Fine-Tuning (arXiv 2012.13255). A grid of equal ratios from ``low`` to ``high`` is trained, all of
    it, for the curve; then the gap below the smallest dimension that was enough is halved, in ratio, until it is at most ``resolution``.

    Args:
      run: ``dimension -> metric``, larger is better: trains with `lowrank_jax.intrinsic` and returns the best validation metric. The
        papers tune the learning rate for each d, so this is best over several, and a mean over seeds. Called once for each dimension.
      baseline: the same metric of full training, tuned as well.
      low, high: the first and last dimension of the grid. points: of the grid.
      resolution: how close the bisection gets: the ratio of the result to a dimension that was not enough.
      share: of the baseline. chance: what guessing scores; the papers count from 0.

    Returns:
      A `D90`: print it, or ``.plot("curve.png")``. A metric that is not finite counts as not reached. The bisection is a reconstruction:
      it takes the metric to grow with d, where the papers read the first crossing off a grid; `D90.exceptions` says where it did not.

    Raises:
      ValueError: a baseline not above ``chance``, a share outside (0, 1], a grid or resolution that makes no sense, or a metric that
        is no number (by dimension).

    Example:
      >>> found = d90(lambda dimension: min(1.0, dimension / 1000), baseline=1.0, low=10, high=10_000, points=4)
      >>> 900 <= found.dimension < 990
      True
      >>> print(d90(lambda dimension: min(1.0, dimension / 8), baseline=1.0, low=4, high=16, points=3))
       dimension   metric   of full   reached
       ──────────────────────────────────────
               4   0.5000     50.0%   no
               6   0.7500     75.0%   no
               7   0.8750     87.5%   no
               8   1.0000    100.0%   yes
              16   1.0000    100.0%   yes
            full   1.0000    100.0%
      <BLANKLINE>
      d90 is 8: the smallest tried to reach 0.9000; 7 was not enough.
    """
    _check(baseline, low, high, points, resolution, share, chance)
    seen: dict[int, float] = {}

    def result() -> D90:
        dimensions = tuple(sorted(seen))
        return D90(dimensions, tuple(seen[d] for d in dimensions), float(baseline), float(share), float(chance))

    for d in sorted({round(d) for d in np.geomspace(low, high, points)}):
        seen[d] = _metric(run, d)
    while (gap := _next(result(), resolution)) is not None:
        seen[gap] = _metric(run, gap)
    return result()


def _next(found: D90, resolution: float) -> int | None:
    """The dimension half-way, in ratio, between the smallest that was enough and the one below; None: they are close enough."""
    above, below = found.dimension, found.below
    if above is None or below is None or above - below < 2 or above <= resolution * below:
        return None
    return min(max(round(math.sqrt(above * below)), below + 1), above - 1)


def _metric(run: Callable[[int], float], dimension: int) -> float:
    value = run(dimension)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"d90: run({dimension}) returned {value!r}: expected one number, larger is better.") from error


def _check(baseline: float, low: int, high: int, points: int, resolution: float, share: float, chance: float) -> None:
    if not (math.isfinite(baseline) and baseline > chance):
        raise ValueError(
            f"d90(baseline={baseline}): expected a number above chance={chance}. For a metric that is smaller when better, or negative, "
            "return its negative from run and pass what guessing scores as chance."
        )
    if not 0 < share <= 1:
        raise ValueError(f"d90(share={share}): expected a share of the baseline in (0, 1].")
    if not (isinstance(low, int) and isinstance(high, int) and 1 <= low < high):
        raise ValueError(f"d90(low={low}, high={high}): expected whole numbers, 1 <= low < high.")
    if points < 2:
        raise ValueError(f"d90(points={points}): expected at least 2, low and high.")
    if not resolution > 1:
        raise ValueError(f"d90(resolution={resolution}): expected a ratio above 1, such as 1.1.")
