"""Bytes of optimizer state for the models of the GaLore paper, by formula and as allocated.

    python -m bench.optimizer_state           # about a minute

Counted is everything that has to lie in memory beside weights and gradients: moments, subspaces, positions, scales, counters. Weights
are bfloat16, layers stacked; attention and MLP matrices are projected, embeddings, norms and the output projection are not. The formula
is written down from the shapes alone. `allocated` is what the optimizer's `init` makes, and at 60m it is made and the live bytes read.

The paper's claims are 65.5% less than AdamW in bfloat16, and 82.5% with 8-bit states. The second table has, for each way to run GaLore,
the highest rank that reaches its claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lowrank_jax as lr
from bench.common import table, write_json
from lowrank_jax import models
from lowrank_jax.memory import abstract_adapters
from lowrank_jax.models.llama_sizes import GALORE_RANKS, galore_paper
from lowrank_jax.optim.blockwise import BLOCK
from lowrank_jax.sites import Site, flatten

MATRICES = r".*/(attention|mlp)/.*"
COUNT = 4

# Bytes of an array of so many numbers.
Width = Callable[[int], int]
# Bytes of what a function makes of weights and more, given as shapes.
Make = Callable[..., int]


def bf16(numbers: int) -> int:
    return 2 * numbers


def fp32(numbers: int) -> int:
    return 4 * numbers


def eight_bits(numbers: int) -> int:
    """A byte a number in whole blocks, and a scale a block."""
    return -(-numbers // BLOCK) * (BLOCK + 4)


def moment_in_eight_bits(numbers: int) -> int:
    return eight_bits(numbers) if numbers >= 4096 else fp32(numbers)


class Model(NamedTuple):
    """Attributes: shapes: of the parameters. sites: of the projected matrices. others: the numbers in each other leaf."""

    shapes: Any
    sites: list[Site]
    every: dict[str, Site]
    others: dict[str, int]
    layers: int


def model_of(size: str, dtype: Any = jnp.bfloat16) -> Model:
    config = galore_paper(size, scan_layers=True, param_dtype=dtype, dtype=dtype)
    shapes = models.param_shapes(config)
    every = lr.linen.sites(models.build(config), shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    plan = lr.plan(shapes, {MATRICES: lr.full()}, sites=every)
    sites = [entry.site for entry in plan.entries]
    paths = {site.path for site in sites}
    others = {path: leaf.size for path, leaf in flatten(shapes).items() if path not in paths}
    return Model(shapes, sites, every, others, config.num_hidden_layers)


def adam(model: Model, moment: Width) -> int:
    leaves = [*model.others.values(), *(math.prod(site.shape) for site in model.sites)]
    return COUNT + sum(2 * moment(n) for n in leaves)


def galore(model: Model, rank: int, moment: Width, basis: Width = bf16, larger: bool = False) -> int:
    total = COUNT + COUNT + sum(2 * moment(n) for n in model.others.values())
    for site in model.sites:
        projected, whole = sorted((site.n_in, site.n_out), reverse=larger)
        total += COUNT + basis(model.layers * projected * rank) + 2 * moment(model.layers * whole * rank)
    return total


def frugal(model: Model, density: float) -> int:
    total = COUNT + COUNT + sum(2 * bf16(n) for n in model.others.values())
    for site in model.sites:
        rows = model.layers * int(density * site.n_in)
        total += COUNT + 4 * rows + 2 * bf16(rows * site.n_out)
    return total


def lisa(model: Model, active: int) -> int:
    inside = sum(n for path, n in model.others.items() if path.startswith("layers/"))
    inside += sum(math.prod(site.shape) for site in model.sites)
    outside = sum(model.others.values()) + sum(math.prod(site.shape) for site in model.sites) - inside
    counters = 2 * COUNT + 2 * COUNT * active  # of all and of what is outside; which layers, and one for each
    return counters + 2 * bf16(outside + active * inside // model.layers)


def dual(model: Model, rank: int, moment: Width) -> int:
    """GaLore's, and the trained coordinates."""
    return (
        galore(model, rank, moment)
        - COUNT * (1 + len(model.sites))  # one counter for all
        + sum(bf16(model.layers * max(site.n_in, site.n_out) * rank) for site in model.sites)
    )


def dual_state(model: Model, rank: int, tx: optax.GradientTransformation, make: Make) -> Any:
    """Subspaces and coordinates, and the optimizer's state of what is trained."""
    plan = lr.plan(model.shapes, {MATRICES: lr.subspace_update(rank=rank)}, sites=model.every)

    def start(params: Any, adapters: lr.Adapters) -> Any:
        others = {path: leaf for path, leaf in flatten(params).items() if path in model.others}
        return adapters.sites, tx.init((lr.partition(adapters)[0], others))

    return make(start, model.shapes, abstract_adapters(plan, dtype=jnp.bfloat16))


def size_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract(start: Callable[..., Any], *args: Any) -> int:
    """Bytes of what ``start`` makes; nothing is computed."""
    return size_of(jax.eval_shape(start, *args))


def live(start: Callable[..., Any], shapes: Any, *others: Any) -> int:
    """Bytes that are in memory beside the weights once ``start`` has run."""
    held = lambda: sum(x.nbytes for x in jax.live_arrays())  # noqa: E731
    before = held()
    args = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes, *others))
    state = jax.block_until_ready(start(*args))
    after = held()
    del args, state
    return after - before - size_of(shapes)


class Case(NamedTuple):
    """Attributes: formula: bytes, of a model and a rank. made: bytes, by `abstract` or `live`. goal: the paper's claim."""

    formula: Callable[[Model, int], int]
    made: Callable[[Model, int, Make], int]
    goal: float | None = None
    dtype: Any = jnp.bfloat16


def case(formula: Any, tx: Callable[[Model, int], optax.GradientTransformation], **more: Any) -> Case:
    return Case(formula, lambda model, rank, make: make(tx(model, rank).init, model.shapes), **more)


def run_galore(inner: optax.GradientTransformation, **options: Any) -> Any:
    return lambda model, rank: lr.optim.galore(inner, rank, targets=[MATRICES], sites=model.every, **options)


ADAM, ADAM_8BIT = optax.scale_by_adam(), lr.optim.scale_by_adam_8bit()
CASES = {
    "AdamW, float32": case(lambda m, r: adam(m, fp32), lambda m, r: ADAM, dtype=jnp.float32),
    "AdamW": case(lambda m, r: adam(m, bf16), lambda m, r: ADAM),
    "8-bit AdamW": case(lambda m, r: adam(m, moment_in_eight_bits), lambda m, r: ADAM_8BIT),
    "GaLore": case(lambda m, r: galore(m, r, bf16), run_galore(ADAM), goal=0.655),
    "GaLore, 8-bit subspace": case(
        lambda m, r: galore(m, r, bf16, eight_bits), run_galore(ADAM, quantise_subspace=True), goal=0.655
    ),
    "GaLore, longer side": case(
        lambda m, r: galore(m, r, bf16, larger=True), run_galore(ADAM, side="larger"), goal=0.655
    ),
    "8-bit GaLore": case(lambda m, r: galore(m, r, moment_in_eight_bits), run_galore(ADAM_8BIT), goal=0.825),
    "8-bit GaLore, 8-bit subspace": case(
        lambda m, r: galore(m, r, moment_in_eight_bits, eight_bits),
        run_galore(ADAM_8BIT, quantise_subspace=True),
        goal=0.825,
    ),
    "8-bit GaLore, 8-bit subspace, longer side": case(
        lambda m, r: galore(m, r, moment_in_eight_bits, eight_bits, larger=True),
        run_galore(ADAM_8BIT, quantise_subspace=True, side="larger"),
        goal=0.825,
    ),
    "FRUGAL, density 0.25": case(
        lambda m, r: frugal(m, 0.25), lambda m, r: lr.optim.frugal(ADAM, 0.25, targets=[MATRICES], sites=m.every)
    ),
    "LISA, 2 layers": case(lambda m, r: lisa(m, 2), lambda m, r: lr.optim.lisa(ADAM, 2, sites=m.every)),
    "dual GaLore": Case(lambda m, r: dual(m, r, bf16), lambda m, r, make: dual_state(m, r, ADAM, make)),
    "8-bit dual GaLore": Case(
        lambda m, r: dual(m, r, moment_in_eight_bits), lambda m, r, make: dual_state(m, r, ADAM_8BIT, make)
    ),
}


def highest_rank(case: Case, model: Model, most: float) -> int:
    """The highest multiple of 8 whose state has at most so many bytes; 0: none."""
    ranks = range(8, min(min(site.n_in, site.n_out) for site in model.sites) + 1, 8)
    return max((rank for rank in ranks if case.formula(model, rank) <= most), default=0)


def main() -> None:
    rows, reached = [], []
    for size, rank in GALORE_RANKS.items():
        model = model_of(size)
        baseline = adam(model, bf16)
        for name, case in CASES.items():
            of = model_of(size, case.dtype)
            formula, allocated = case.formula(of, rank), case.made(of, rank, abstract)
            rows.append({
                "model": size, "rank": rank, "case": name, "formula": formula, "allocated": allocated,
                "live": case.made(of, rank, live) if size == "60m" else None, "saved": 1 - allocated / baseline,
            })  # fmt: skip
            if case.goal is not None:
                reached.append({
                    "model": size, "case": name, "goal": case.goal, "paper_rank": rank, "saved": rows[-1]["saved"],
                    "highest_rank": highest_rank(case, model, (1 - case.goal) * baseline),
                })  # fmt: skip
        print(f"{size} counted", flush=True)
    write_json("optimizer_state", {"rows": rows, "goals": reached})
    wrong = [row for row in rows if row["formula"] != row["allocated"] or row["live"] not in (None, row["allocated"])]
    shown = [
        (r["model"], r["rank"], r["case"], f"{r['formula'] / 2**30:.3f}", f"{r['allocated'] / 2**30:.3f}",
         f"{r['live'] / 2**30:.3f}" if r["live"] else "", f"{100 * r['saved']:.1f}%")
        for r in rows
    ]  # fmt: skip
    columns = ("model", "rank", "optimizer", "formula GiB", "allocated GiB", "live GiB", "less than AdamW in bfloat16")
    table(columns, shown, "Optimizer state, bfloat16 weights")
    goals = [
        (g["model"], g["case"], f"{100 * g['goal']:.1f}%", f"{100 * g['saved']:.1f}% at {g['paper_rank']}",
         "yes" if g["saved"] >= g["goal"] else "no", g["highest_rank"] or "none")
        for g in reached
    ]  # fmt: skip
    columns = ("model", "optimizer", "claim", "saved at the paper's rank", "reached", "highest rank that reaches it")
    table(columns, goals, "The paper's claims")
    print(f"{len(wrong)} of {len(rows)} rows where formula, allocated and live bytes differ", *wrong, sep="\n")


if __name__ == "__main__":
    main()
