"""Chain: several methods on one weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from lowrank_jax.forms import Leaf, UnsupportedError
from lowrank_jax.forms.chain import Chain
from lowrank_jax.methods.base import Context, Given, Leaves, Method, Seen, build, method
from lowrank_jax.sites import Site

Parts = tuple[tuple[str, tuple], ...]


@method
def chain(parts: Parts) -> Method:
    """Several methods on the same weight, whose updates act one after another (low-rank ones add up).

    Leaves are named ``0.a``, ``1.a`` and so on. Made by `lowrank_jax.add`; in a plan it trains all parts at once. Methods with leaves
    shared between sites, or with rank allocation, cannot be parts.

    Args:
      parts: ``((name, ((field, value), ...)), ...)``, i.e. ``(method.name, method.config)`` of each.

    Raises:
      UnsupportedError: a part with shared leaves, or a dense one; one that reads the weight anywhere but first.

    Example:
      >>> from lowrank_jax.methods import lora
      >>> chain(tuple((m.name, m.config) for m in (lora(2), lora(4)))).name
      'chain'
    """
    methods = [build(name, dict(config)) for name, config in parts]
    for m in methods:
        if m.shared is not None or m.allocate is not None or not m.form.record.factored:
            raise UnsupportedError(
                f"{m.name} cannot be combined with another method on the same weight; merge one of them first."
            )
    for m in methods[1:]:
        if _reads_kernel(m):
            raise UnsupportedError(
                f"{m.name} reads the weight it acts on, so it has to come first on that weight: it cannot see what {methods[0].name} "
                "makes of it. Change the order, or merge the other one."
            )

    def leaves(site: Site) -> dict[str, Leaf]:
        return {f"{n}.{k}": leaf for n, m in enumerate(methods) for k, leaf in m.leaves(site).items()}

    def init(key: jax.Array, site: Site, given: Given) -> Leaves:
        made: Leaves = {}
        for n, m in enumerate(methods):
            own = m.init(jax.random.fold_in(key, n), site, given)
            made |= {f"{n}.{k}": leaf for k, leaf in own.items()}
        return made

    def expand(site: Site, leaves: Mapping[str, jax.Array], context: Context) -> Chain:
        return Chain(tuple(m.expand(site, _own(leaves, n), context) for n, m in enumerate(methods)))

    def anchor(site: Site, leaves: Mapping[str, jax.Array]) -> Chain:
        return Chain(tuple(a(site, _own(leaves, n)) for n, a in anchors.items()))

    def transform(total_steps: int) -> optax.GradientTransformationExtraArgs:
        own = {n: m.transform(total_steps) for n, m in enumerate(methods) if m.transform is not None}
        extra = {n: optax.with_extra_args_support(tx) for n, tx in own.items()}

        def init(train: Any) -> dict[int, Any]:
            return {n: tx.init(_part(train, n)) for n, tx in extra.items()}

        def update(updates: Any, state: dict[int, Any], params: Any = None, **more: Any) -> tuple[Any, dict[int, Any]]:
            new, states = updates, {}
            for n, tx in extra.items():
                of_part = {name: _part(tree, n) for name, tree in more.items()}
                changed, states[n] = tx.update(_part(updates, n), state[n], _part(params, n), **of_part)
                new = {p: {**new[p], **{f"{n}.{k}": u for k, u in changed[p].items()}} for p in new}
            return new, states

        return optax.GradientTransformationExtraArgs(init, update)

    def penalty(seen: Mapping[str, Seen], context: Context) -> jax.Array:
        parts = [
            m.penalty({path: s._replace(leaves=_own(s.leaves, n)) for path, s in seen.items()}, context)
            for n, m in enumerate(methods)
            if m.penalty is not None
        ]
        return sum(parts[1:], parts[0])

    anchors: dict[int, Callable] = {n: m.anchor for n, m in enumerate(methods) if m.anchor is not None}
    return Method(
        Chain,
        leaves,
        init,
        expand,
        anchor=anchor if anchors else None,
        exact_init=all(m.exact_init for m in methods),
        kinds=frozenset.intersection(*(m.site_kinds for m in methods)),
        needs=frozenset.union(*(m.needs for m in methods)),
        transform=transform if any(m.transform for m in methods) else None,
        penalty=penalty if any(m.penalty for m in methods) else None,
    )


def _reads_kernel(m: Method) -> bool:
    parts = dict(m.config)["parts"] if m.name == "chain" else ()
    return m.form.record.reads_kernel or any(_reads_kernel(build(name, dict(config))) for name, config in parts)


def _part(tree: Any, n: int) -> Any:
    return None if tree is None else {path: _own(leaves, n) for path, leaves in tree.items()}


def _own(leaves: Mapping[str, jax.Array], n: int) -> Leaves:
    return {k.removeprefix(f"{n}."): v for k, v in leaves.items() if k.startswith(f"{n}.")}
