"""Chain: several methods on one weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from lowrank_jax.forms import Leaf, UnsupportedError
from lowrank_jax.forms.chain import Chain
from lowrank_jax.methods.base import Leaves, Method, build, method
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
      UnsupportedError: a part with shared leaves, or a dense one.

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

    def leaves(site: Site) -> dict[str, Leaf]:
        return {f"{n}.{k}": leaf for n, m in enumerate(methods) for k, leaf in m.leaves(site).items()}

    def init(key: jax.Array, site: Site, kernel: jax.Array | None) -> Leaves:
        made: Leaves = {}
        for n, m in enumerate(methods):
            own = m.init(jax.random.fold_in(key, n), site, kernel)
            made |= {f"{n}.{k}": leaf for k, leaf in own.items()}
        return made

    def expand(site: Site, leaves: Mapping[str, jax.Array], shared: Mapping[str, jax.Array]) -> Chain:
        return Chain(tuple(m.expand(site, _own(leaves, n), shared) for n, m in enumerate(methods)))

    def anchor(site: Site, leaves: Mapping[str, jax.Array]) -> Chain:
        return Chain(tuple(a(site, _own(leaves, n)) for n, a in anchors.items()))

    anchors: dict[int, Callable] = {n: m.anchor for n, m in enumerate(methods) if m.anchor is not None}
    return Method(
        Chain,
        leaves,
        init,
        expand,
        anchor=anchor if anchors else None,
        exact_init=all(m.exact_init for m in methods),
        needs_kernel=any(m.needs_kernel for m in methods),
    )


def _own(leaves: Mapping[str, jax.Array], n: int) -> Leaves:
    return {k.removeprefix(f"{n}."): v for k, v in leaves.items() if k.startswith(f"{n}.")}
