"""Which weight got how much rank: a map by kind of module and layer, for the terminal and as a picture."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

import jax
import numpy as np

from lowrank_jax.adapters import Adapters
from lowrank_jax.methods.base import Method
from lowrank_jax.plan import Entry, Plan
from lowrank_jax.sites import LAYER_NUMBER
from lowrank_jax.text_table import as_text

_SHADES = " ░▒▓█"
_NUMBERS_UP_TO = 24  # layers; more are shown as shades alone


@dataclass(frozen=True)
class RankMap:
    """Ranks by kind of module and layer. Printing it shows a table shaded by rank.

    Attributes:
      modules: paths of modules, the number of the layer replaced by ``*``.
      layers: their numbers; None stands for weights outside the layers.
      ranks: ``[modules, layers]`` float64, NaN where nothing is adapted. A stack within a layer (experts) counts by its mean.
    """

    modules: tuple[str, ...]
    layers: tuple[int | None, ...]
    ranks: np.ndarray

    def __str__(self) -> str:
        from rich import box
        from rich.table import Table

        top, numbers = max(np.nanmax(self.ranks), 1), len(self.layers) <= _NUMBERS_UP_TO

        def cell(rank: float) -> str:
            if np.isnan(rank):
                return "·"
            return _SHADES[int(np.ceil(rank / top * 4))] + (f"{rank:g}" if numbers else "")

        heads = [_head(layer) for layer in self.layers]
        if not numbers:
            heads = [f"{heads[0]}..{heads[-1]}" if self.layers[0] is not None else f"- {heads[1]}..{heads[-1]}"]
        table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
        table.add_column("rank", "mean")
        for n, head in enumerate(heads):
            table.add_column(head, f"{np.nanmean(self.ranks[:, n]):.1f}" if numbers else "", justify="right")
        table.add_column("mean", f"{np.nanmean(self.ranks):.1f}", justify="right")
        for module, row in zip(self.modules, self.ranks, strict=True):
            cells = [cell(rank) for rank in row]
            table.add_row(module, *(cells if numbers else ["".join(cells)]), f"{np.nanmean(row):.1f}")
        return as_text(table, 400)

    def plot(self, path: str | pathlib.Path, title: str = "") -> pathlib.Path:
        """Writes the map as a picture; the file's ending says of which kind."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        rows, columns = self.ranks.shape
        figure = Figure(figsize=(3.2 + 0.42 * columns, 1.2 + 0.36 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        image = axes.imshow(self.ranks, cmap="viridis", vmin=0, vmax=max(np.nanmax(self.ranks), 1), aspect="auto")
        axes.set_yticks(range(rows), self.modules)
        shown = range(0, columns, -(-columns // 32))
        axes.set_xticks(shown, [_head(self.layers[n]) for n in shown])
        axes.set_xlabel("layer")
        axes.set_title(title)
        for row, column in np.argwhere(~np.isnan(self.ranks)) if columns <= 32 else ():
            rank = self.ranks[row, column]
            dark = rank < 0.6 * image.get_clim()[1]
            axes.text(column, row, f"{rank:.3g}", ha="center", va="center", color="white" if dark else "black")
        figure.colorbar(image, label="rank", ticks=MaxNLocator(integer=True))
        path = pathlib.Path(path)
        figure.savefig(path, dpi=144)
        return path


def rank_map(of: Adapters | Plan) -> RankMap:
    """The rank of every adapted weight.

    Of a plan: the ranks it asks for (LaMDA++ has one for each layer). Of adapters: where a method can be made smaller (`compact`), what
    is left then, so the directions that AdaLoRA or IncreLoRA kept and the gates that SoRA left open; before training nothing has
    moved and they have rank 0. Weights whose method has no rank are left out.

    Raises:
      ValueError: no adapted weight has a rank, or a stack of adapters.

    Example:
      >>> import jax.numpy as jnp, lowrank_jax as lr
      >>> params = {f"layers_{n}": {"query": {"kernel": jnp.ones((8, 8))}} for n in range(3)}
      >>> found = rank_map(lr.plan(params, {".*": lr.lora(4), "layers_1/.*": lr.lora(2)}))
      >>> found.modules, found.layers, found.ranks.tolist()
      (('layers_*/query',), (0, 1, 2), [[4.0, 2.0, 4.0]])
    """
    if isinstance(of, Adapters) and of.stacked is not None:
        raise ValueError("rank_map: the adapters are a stack; take one of it.")
    found: dict[str, dict[int | None, float]] = {}
    for entry in (of if isinstance(of, Plan) else of.plan).entries:
        ranks = _asked(entry, entry.method) if isinstance(of, Plan) else _left(entry, of)
        if ranks is not None:
            name, layers = _place(entry)
            found.setdefault(name, {}).update(zip(layers, ranks.reshape(len(layers), -1).mean(-1), strict=True))
    if not found:
        raise ValueError("rank_map: no adapted weight has a rank.")
    layers = sorted({layer for row in found.values() for layer in row}, key=lambda n: -1 if n is None else n)
    table = np.array([[row.get(layer, np.nan) for layer in layers] for row in found.values()])
    return RankMap(tuple(found), tuple(layers), table)


def _left(entry: Entry, adapters: Adapters) -> np.ndarray | None:
    """The rank of every element of an entry's stack after compaction, ``[*batch]``; None: its method has none."""
    method = entry.method
    if method.compact is not None:
        own, shared = jax.tree.map(np.asarray, (adapters.sites[entry.site.path], adapters.shared.get(str(method), {})))
        method, own = method.compact(entry.local, own, shared)
        if method.name == "lora":  # a layer without any direction left is kept as one of zeros
            return ((own["a"] != 0).any(-2) & (own["b"] != 0).any(-1)).sum(-1)
    return _asked(entry, method)


def _asked(entry: Entry, method: Method) -> np.ndarray | None:
    rank = dict(method.config).get("rank")
    if not isinstance(rank, int | tuple):
        return None
    return (
        np.full(entry.local.batch_shape, rank) if isinstance(rank, int) else np.reshape(rank, entry.local.batch_shape)
    )


def _place(entry: Entry) -> tuple[str, list[int | None]]:
    """An entry's row, and the layers that the first axis of its scanned stack, or its path, stands for."""
    module, number = entry.site.module or entry.site.path, LAYER_NUMBER.search(entry.site.path)
    if number is not None and not entry.site.scanned:
        return LAYER_NUMBER.sub("*", module, count=1), [int(number.group())]
    if not entry.site.batch:
        return module, [None]
    return module, list(entry.layers or range(entry.local.batch_shape[0]))


def _head(layer: int | None) -> str:
    return "-" if layer is None else str(layer)
