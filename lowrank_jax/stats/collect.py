"""One pass over a few batches that gathers every statistic that a plan's methods need, of all weights at once."""

from __future__ import annotations

import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.adapters import Adapters
from lowrank_jax.forms import Leaf
from lowrank_jax.forms.probe import Probe
from lowrank_jax.methods.base import STATISTICS, Context, Given, Leaves, Method
from lowrank_jax.plan import Entry, Plan
from lowrank_jax.quantized import dense
from lowrank_jax.sites import Site, flatten, with_leaves
from lowrank_jax.stats import sums as running
from lowrank_jax.stats.statistics import Statistics
from lowrank_jax.stats.sums import Sums, Wanted

Loss = Callable[[Any, Adapters, Any], jax.Array]


def collect(
    loss: Loss,
    params: Any,
    where: Plan | Mapping[str, Site],
    batches: Iterable[Any],
    *,
    what: Sequence[str] | None = None,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Statistics:
    """Means of statistics over batches, for initialisations that read data (LoRA-GA, LoRA-SB, CorDA).

    ``gradient`` is the mean of the batches' gradients, ``covariance`` the mean of ``x x^T`` over all inputs of a weight, padding included.
    Batches are streamed: one float32 sum is kept for each weight and kind. On a mesh a gradient's sum lies like its weight; the rows of
    a covariance are divided as the weight's inputs are, or over another axis that fits.

    Args:
      loss: ``(params, adapters, batch) -> scalar``; it has to use both, as ``lowrank_jax.linen.apply(model, params, adapters, ...)`` does.
      where: a plan, whose methods say what they need at each weight; or sites, and then ``what`` names the kinds.
      batches: any iterable of batches. what: kinds to collect at every site, ``gradient`` and ``covariance``; None: what the plan needs.
      directory: keeps the sums: written as it goes on, for at most a tenth of the time, and when it is stopped (on several hosts at the
        end only, to storage that they share). A second call with the same batches takes up from there; those before are not run again, nor
        read if ``batches`` has a length and takes indices. None: nothing is kept.
      progress: whether to show a bar.

    Raises:
      ValueError: no batches, nothing to collect, an unknown kind, a kind that a site cannot have, a weight that no batch reaches,
        statistics that are not finite, a directory with the sums of another model or plan.

    Example:
      >>> import flax.linen as nn, lowrank_jax as lr
      >>> model, x = nn.Dense(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss = lambda params, adapters, x: jnp.sum(lr.linen.apply(model, params, adapters, x) ** 2)
      >>> stats = collect(loss, params, {"kernel": lr.sites(params)["kernel"]}, [x], what=["covariance"], progress=False)
      >>> stats.values["covariance"]["kernel"]
      Array([[ 5.,  7.],
             [ 7., 10.]], dtype=float32)
    """
    wanted, flat = _wanted(where, what), flatten(params)
    places = running.layout(wanted, flat)
    file = None if directory is None else pathlib.Path(directory) / "sums.safetensors"
    if file is not None and file.exists():
        sums, done = running.load(file, wanted, flat, places)
    else:
        sums, done = running.start(wanted, places), 0
    rest, total = _after(batches, done)
    add = jax.jit(_adder(loss, wanted), donate_argnums=0, out_shardings=places)
    saved, due, alone = done, 0.0, jax.process_count() == 1
    try:
        for batch in shown(rest, total, done) if progress else rest:
            sums, done = add(sums, params, batch), done + 1
            if file is not None and alone and time.monotonic() >= due:
                began = time.monotonic()
                running.save(jax.block_until_ready(sums), done, flat, file)
                saved, due = done, time.monotonic() + 9 * (time.monotonic() - began)
    except BaseException:
        # The sums that a failed step was given are gone.
        if file is not None and alone and done > saved and not any(x.is_deleted() for x in jax.tree.leaves(sums)):
            running.save(sums, done, flat, file)
        raise
    if file is not None and done > saved:
        running.save(sums, done, flat, file)
    if not done:
        raise ValueError("collect: there are no batches; pass at least one.")
    return running.means(sums, done, flat)


def _wanted(where: Plan | Mapping[str, Site], what: Sequence[str] | None) -> Wanted:
    """``{kind: {path: site}}``, whole stacks."""
    if isinstance(where, Plan):
        asked = [(e.site, set(e.method.needs - {"kernel"}) if what is None else set(what)) for e in where.entries]
    else:
        asked = [(site, set(what or ())) for site in where.values()]
    wanted: dict[str, dict[str, Site]] = {}
    for site, kinds in asked:
        for kind in sorted(kinds):
            if kind not in ("gradient", "covariance"):
                hint = "use lowrank_jax.contributions" if kind in STATISTICS else "expected gradient or covariance"
                raise ValueError(f"collect: {kind!r} is not collected here; {hint}.")
            if kind == "covariance" and site.kind != "dense" or site.kind == "param":
                raise ValueError(
                    f"{site.path}: the {'input ' * (kind == 'covariance')}{kind} exists for "
                    f"{'dense weights' if kind == 'covariance' else 'weights that act on inputs'} only, this is a {site.kind} weight."
                )
            if kind == "covariance" and not site.factored:
                raise ValueError(
                    f"{site.path}: the inputs of a weight that no registered module holds cannot be seen. Register its module "
                    "(lowrank_jax.linen.register, lowrank_jax.nnx.register), or leave it out."
                )
            wanted.setdefault(kind, {})[site.path] = site
    if not wanted:
        raise ValueError(
            "collect: nothing to collect; no method of the plan needs statistics. Pass what=['gradient'] to collect anyway."
        )
    return wanted


def _after(batches: Iterable[Any], done: int) -> tuple[Iterator[Any], int | None]:
    """The batches behind the first ``done``, and how many there are in all where that is known."""
    length = len(batches) if isinstance(batches, Sized) else None
    rest: Iterator[Any]
    if length is not None and hasattr(batches, "__getitem__"):
        rest, skipped = (batches[n] for n in range(done, length)), min(done, length)
    else:
        rest = iter(batches)
        skipped = sum(1 for _ in itertools.islice(rest, done))
    if skipped < done:
        raise ValueError(
            f"collect: the directory holds the sums of {done} batches, more than the {skipped} passed. Pass another directory, or delete "
            "this one."
        )
    return rest, length


def shown(batches: Iterable[Any], total: int | None = None, done: int = 0) -> Iterable[Any]:
    """The batches, with a bar in the terminal while they are read."""
    from rich.console import Console
    from rich.progress import track

    return track(batches, "statistics", total, done, console=Console(stderr=True), transient=True)


def _adder(loss: Loss, wanted: Wanted) -> Callable[[Sums, Any, Any], Sums]:
    probed, differentiated = wanted.get("covariance", {}), wanted.get("gradient", {})
    plan = Plan(tuple(Entry(site, _PROBE) for site in probed.values()))

    def add(sums: Sums, params: Any, batch: Any) -> Sums:
        def of(weights: dict[str, jax.Array], probes: dict[str, Leaves]) -> jax.Array:
            return loss(with_leaves(params, weights), Adapters(probes, {}, plan), batch)

        flat = flatten(params)
        # Made here and not outside: as constants of the program they would cost their size once more.
        probes = {path: _PROBE.init(jax.random.key(0), site, Given()) for path, site in probed.items()}
        slopes, observed = jax.grad(of, argnums=(0, 1))({path: dense(flat[path]) for path in differentiated}, probes)
        found = {kind: {path: leaves[kind] for path, leaves in observed.items()} for kind in sums if kind != "gradient"}
        if differentiated:
            found["gradient"] = {path: site.canonical(slopes[path]) for path, site in differentiated.items()}
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, found)

    return add


def _probe() -> Method:
    def leaves(site: Site) -> dict[str, Leaf]:
        return {"covariance": Leaf((site.n_in, site.n_in), ("in", "")), "count": Leaf((), ())}

    def start(key: jax.Array, site: Site, given: Given) -> Leaves:
        return {name: jnp.zeros((*site.batch_shape, *leaf.shape)) for name, leaf in leaves(site).items()}

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Probe:
        return Probe(leaves["covariance"], leaves["count"])

    return Method(Probe, leaves, start, expand, name="probe")


_PROBE = _probe()
