"""One pass over a few batches that gathers every statistic that a plan's methods need, of all weights at once."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import statistics
from lowrank_jax.adapters import Adapters, init
from lowrank_jax.forms import Leaf
from lowrank_jax.forms.probe import Probe
from lowrank_jax.methods.base import STATISTICS, Context, Given, Leaves, Method
from lowrank_jax.plan import Entry, Plan
from lowrank_jax.sites import Site, flatten, with_leaves
from lowrank_jax.statistics import Statistics, fingerprint

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

    Batches are streamed: one sum is kept for each weight and kind, laid out on a mesh like the weight. With a ``directory`` the sums are
    saved as it goes on, and a second call with the same batches takes up where the first was stopped.

    Args:
      loss: ``(params, adapters, batch) -> scalar``; it has to use both, as ``lowrank_jax.linen.apply(model, params, adapters, ...)`` does.
      where: a plan, whose methods say what they need at each weight; or sites, and then ``what`` names the kinds.
      batches: any iterable of batches. what: kinds to collect at every site, ``gradient`` and ``covariance``; None: what the plan needs.
      directory: where the state is kept; None: nowhere. progress: whether to show a bar.

    Raises:
      ValueError: no batches, nothing to collect, an unknown kind, a kind that a site cannot have, statistics that are not finite.

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
    wanted = _wanted(where, what)
    flat = flatten(params)
    file = None if directory is None else pathlib.Path(directory) / "statistics.safetensors"
    sums = _start(flat, wanted)
    done = 0
    if file is not None and file.exists():
        saved = statistics.load(file)
        done = saved.batches
        sums = {kind: {p: saved.of(kind, p, flat[p]) * done for p in of} for kind, of in sums.items()}
    add = _adder(loss, params, wanted)
    seen = 0
    for batch in _shown(batches, progress):
        seen += 1
        if seen > done:
            sums = add(sums, params, batch)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                _finish(sums, flat, seen).save(file)
    if not seen:
        raise ValueError("collect: there are no batches; pass at least one.")
    found = _finish(sums, flat, seen)
    for kind, of in found.values.items():
        for path, value in of.items():
            if not bool(jnp.isfinite(value).all()):
                raise ValueError(
                    f"collect: the {kind} of {path} is not finite. Lower the loss's scale or check the batches."
                )
    return found


def contributions(
    loss: Loss,
    params: Any,
    tuned: Any,
    where: Plan | Mapping[str, Site],
    batches: Iterable[Any],
    *,
    steps: int = 8,
    progress: bool = True,
) -> Statistics:
    """How much each weight contributes to the change from a base to a tuned model, by integrated gradients.

    ``|sum over the path of (tuned - base) * dL/dw|`` at the midpoints of ``steps`` pieces of the straight line from the base to the
    tuned parameters, summed over the entries of a weight and averaged over batches (CoLoRA: arXiv 2408.01099; the path follows the
    filter attribution it cites, a reconstruction). Signed sums over all weights add up to the change of the loss, to ``O(1/steps^2)``.

    Args:
      loss, batches, progress: as for `collect`. params: the base. tuned: the same model after full fine-tuning on the task.
      where: the weights to attribute to.

    Returns:
      Statistics of kind ``contribution``, ``[*batch]`` for each weight, normalised to mean 1 over all elements.
    """
    sites = {e.site.path: e.local for e in where.entries} if isinstance(where, Plan) else dict(where)
    flat, goal = flatten(params), flatten(tuned)
    none = Adapters({}, {}, Plan(()))

    @jax.jit
    def attribute(fraction: jax.Array, batch: Any) -> dict[str, jax.Array]:
        point = {p: w + fraction * (goal[p] - w) for p, w in flat.items() if jnp.issubdtype(w.dtype, jnp.floating)}
        of = lambda ours: loss(with_leaves(params, {**point, **ours}), none, batch)  # noqa: E731
        gradient = jax.grad(of)({path: point[path] for path in sites})
        product = {p: site.canonical((goal[p] - flat[p]) * gradient[p]) for p, site in sites.items()}
        return {p: x.astype(jnp.float32).sum((-2, -1)) / steps for p, x in product.items()}

    totals: dict[str, jax.Array] = {}
    count = 0
    for batch in _shown(batches, progress):
        parts = [attribute(jnp.float32((n + 0.5) / steps), batch) for n in range(steps)]
        along = {path: jnp.abs(sum(part[path] for part in parts)) for path in sites}
        totals = {path: totals.get(path, 0) + value for path, value in along.items()}
        count += 1
    if not count:
        raise ValueError("contributions: there are no batches; pass at least one.")
    mean = jnp.concatenate([value.reshape(-1) for value in totals.values()]).mean()
    values = {path: value / jnp.maximum(mean, 1e-30) for path, value in totals.items()}
    return Statistics({"contribution": values}, {path: fingerprint(flat[path]) for path in values}, count)


def _wanted(where: Plan | Mapping[str, Site], what: Sequence[str] | None) -> dict[str, dict[str, Site]]:
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
            if kind == "covariance" and site.kind != "dense":
                raise ValueError(
                    f"{site.path}: the input covariance exists for dense weights only, this is a {site.kind} weight."
                )
            wanted.setdefault(kind, {})[site.path] = site
    if not wanted:
        raise ValueError(
            "collect: nothing to collect; no method of the plan needs statistics. Pass what=['gradient'] to collect anyway."
        )
    return wanted


def _start(flat: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Site]]) -> dict[str, dict[str, jax.Array]]:
    sums: dict[str, dict[str, jax.Array]] = {}
    for kind, sites in wanted.items():
        for path, site in sites.items():
            last = site.n_out if kind == "gradient" else site.n_in
            zeros = jnp.zeros((*site.batch_shape, site.n_in, last), jnp.float32)
            sums.setdefault(kind, {})[path] = zeros
    return sums


def _adder(loss: Loss, params: Any, wanted: Mapping[str, Mapping[str, Site]]) -> Callable[..., Any]:
    probed, differentiated = wanted.get("covariance", {}), wanted.get("gradient", {})
    plan = Plan(tuple(Entry(site, _PROBE) for site in probed.values()))
    probes = init(jax.random.key(0), params, plan)

    def add(sums: Any, params: Any, batch: Any) -> Any:
        weights = {path: flatten(params)[path] for path in differentiated}

        def of(weights: Any, leaves: Any) -> jax.Array:
            return loss(with_leaves(params, weights), probes.replace(sites=leaves), batch)

        gradient, observed = jax.grad(of, argnums=(0, 1))(weights, probes.sites)
        new: dict[str, dict[str, jax.Array]] = {kind: {} for kind in sums}
        for path, site in differentiated.items():
            new["gradient"][path] = sums["gradient"][path] + site.canonical(gradient[path]).astype(jnp.float32)
        for path in probed:
            mean = observed[path]["covariance"] / observed[path]["count"][..., None, None]
            new["covariance"][path] = sums["covariance"][path] + mean
        return new

    return jax.jit(add, donate_argnums=0)


def _finish(sums: Mapping[str, Mapping[str, jax.Array]], flat: Mapping[str, Any], count: int) -> Statistics:
    values = {kind: {path: value / count for path, value in of.items()} for kind, of in sums.items()}
    return Statistics(values, {path: fingerprint(flat[path]) for of in sums.values() for path in of}, count)


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from rich.progress import track

    return track(batches, description="statistics", transient=True)


def _probe() -> Method:
    def leaves(site: Site) -> dict[str, Leaf]:
        return {"covariance": Leaf((site.n_in, site.n_in), ("in", "")), "count": Leaf((), ())}

    def start(key: jax.Array, site: Site, given: Given) -> Leaves:
        return {
            "covariance": jnp.zeros((*site.batch_shape, site.n_in, site.n_in)),
            "count": jnp.zeros(site.batch_shape),
        }

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Probe:
        return Probe(leaves["covariance"], leaves["count"])

    return Method(Probe, leaves, start, expand, name="probe")


_PROBE = _probe()
