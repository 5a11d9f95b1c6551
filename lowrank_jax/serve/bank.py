"""Bank: named adapters beside one base, as a value."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.adapters import Adapters, check_params, stack
from lowrank_jax.combining.combine import combine
from lowrank_jax.convert.conversion import check_plain, to_lora
from lowrank_jax.convert.factors import Rank
from lowrank_jax.convert.padding import pad
from lowrank_jax.convert.updates import common_entry
from lowrank_jax.forms import UnsupportedError
from lowrank_jax.methods.lora import lora
from lowrank_jax.methods.ranks import largest
from lowrank_jax.plan import Entry, Plan
from lowrank_jax.sites import flatten

BASE = "__base__"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, eq=False)
class Bank(Mapping[str, Adapters]):
    """Named adapters of one base: an immutable mapping, ``{name: Adapters}``.

    Every function below returns a new bank and leaves this one as it is; nothing is registered anywhere, no model is changed, and no
    adapter is ever active. Which one acts is which one is passed to a bridge:

    - switch: ``linen.apply(model, bank.params, bank["a"], x)``; disable: ``model.apply({"params": bank.params}, x)``;
    - several at once: ``linen.apply(model, bank.params, bank.sum(["a", "b"]), x)``;
    - one for each row: ``stacked, rows = bank.rows(["a", "__base__", "b"])``, then ``linen.apply(..., stacked, x, rows=rows)``.

    The adapters may be of different methods and ranks and on different weights of the base: a weight that an adapter does not have,
    it does not change.

    Args:
      params: the base; referred to, never changed. adapters: ``{name: adapters}``, unfolded.

    Raises:
      ValueError: a name that is no file name or reserved, an adapter of another base, folded or stacked.

    Example:
      >>> import lowrank_jax as lr
      >>> params = {"layer": {"kernel": jnp.ones((8, 6))}}
      >>> make = lambda method: lr.init(jax.random.key(0), params, lr.plan(params, {"layer": method}))
      >>> bank = Bank(params).add("small", make(lr.lora(2))).add("large", make(lr.pissa(3)))
      >>> stacked, rows = bank.rows(["large", "__base__", "small"])
      >>> list(bank), stacked.sites["layer/kernel"]["a"].shape, rows.tolist()
      (['small', 'large'], (2, 8, 6), [1, -1, 0])
    """

    params: Any
    adapters: Mapping[str, Adapters] = field(default_factory=dict)

    def __post_init__(self) -> None:
        flat = flatten(self.params)
        for name, one in self.adapters.items():
            check_name(name)
            check_plain(f"Bank: {name!r}", one)
            check_params(flat, one.plan)
        object.__setattr__(self, "adapters", MappingProxyType(dict(self.adapters)))

    def __getitem__(self, name: str) -> Adapters:
        if name not in self.adapters:
            near = difflib.get_close_matches(name, self.adapters, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(self.adapters) or 'none'}."
            raise KeyError(f"No adapter {name!r} in the bank{hint}")
        return self.adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    # A Mapping compares its values, and arrays do not compare to a truth value: a bank is itself only.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Bank({', '.join(self.adapters)})"

    def add(self, name: str, adapters: Adapters) -> Bank:
        """With one more adapter. Raises a ValueError if the name is taken, see `swap`."""
        if name in self.adapters:
            raise ValueError(f"The bank has an adapter {name!r} already; remove it first, or swap it.")
        return Bank(self.params, {**self.adapters, name: adapters})

    def remove(self, *names: str) -> Bank:
        """Without some adapters. Raises a KeyError for a name it does not have."""
        for name in names:
            _ = self[name]
        return self.select([name for name in self if name not in names])

    def rename(self, old: str, new: str) -> Bank:
        """With an adapter under another name, in the same place. Raises a KeyError or, if the new name is taken, a ValueError."""
        if new != old and new in self.adapters:
            raise ValueError(f"The bank has an adapter {new!r} already.")
        _ = self[old]
        return Bank(self.params, {new if name == old else name: one for name, one in self.adapters.items()})

    def select(self, names: Sequence[str]) -> Bank:
        """Some of the adapters, in the order given. Raises a KeyError for a name it does not have."""
        return Bank(self.params, {name: self[name] for name in names})

    def swap(self, name: str, adapters: Adapters) -> Bank:
        """With another adapter in the place of one, laid out alike, so that nothing compiled has to be compiled again.

        Args:
          adapters: of the same plan; or of any methods where the old one is a LoRA with at least its rank and sites: it is converted
            (`to_lora`) and padded (`pad`). For room to grow make the bank `uniform` with a larger rank first.

        Raises:
          KeyError: no such adapter. ValueError: it does not fit; names the site.
        """
        old = self[name]
        if adapters.plan != old.plan:
            adapters = pad(to_lora(self.params, adapters).adapters, old.plan)
        return Bank(self.params, {**self.adapters, name: jax.tree.map(_alike, adapters, old)})

    def sum(self, names: Sequence[str], weights: Sequence[float] | None = None, **how: Any) -> Adapters:
        """Several adapters acting at once, as one; see `lowrank_jax.combine`, whose options ``how`` are."""
        chosen = [self[name] for name in names]
        return combine(chosen, weights or [1.0] * len(chosen), params=self.params, **how).adapters

    def uniform(self, rank: Rank = None, tolerance: float | None = None) -> Bank:
        """The same adapters as LoRAs of one plan: every weight that any of them adapts, at one rank for each weight.

        Args:
          rank: None: the largest that one of them needs to be exact; a number: for all, cut to what the weight allows; a float: see
            `lowrank_jax.to_lora`. tolerance: the largest error that cutting may make; None: any.

        Raises:
          UnsupportedError: an adapter that cannot be a LoRA; names it. ValueError: an error above the tolerance.
        """
        made = {}
        for name, one in self.adapters.items():
            try:
                made[name] = to_lora(self.params, one, rank, tolerance=tolerance).adapters
            except UnsupportedError as error:
                raise UnsupportedError(f"{name!r}: {error}") from error
        if not made:
            return self
        plan = _common([one.plan for one in made.values()], rank if isinstance(rank, int) else None)
        return Bank(self.params, {name: pad(one, plan) for name, one in made.items()})

    def rows(self, names: Sequence[str]) -> tuple[Adapters, jax.Array]:
        """A stack of all adapters, and which of them each row of a batch uses: what the bridges take as adapters and ``rows=``.

        The stack is made once for a bank, so mixing rows anew costs nothing and compiles nothing. Adapters of one plan whose form may
        differ by row are stacked as they are; others as `uniform` LoRAs. For a smaller stack take a `select` of the bank.

        Args:
          names: one for each row of the batch; ``"__base__"`` asks for the base.

        Raises:
          KeyError: a name the bank does not have. ValueError: an empty bank. UnsupportedError: an adapter that cannot be a LoRA.
        """
        chosen = self.select([name for name in names if name != BASE])
        places = {name: n for n, name in enumerate(self) if name in chosen}
        return self._stacked, jnp.asarray([places.get(name, -1) for name in names], jnp.int32)

    @functools.cached_property
    def _stacked(self) -> Adapters:
        if not self.adapters:
            raise ValueError("The bank is empty: there is nothing to stack. Call the model for the base.")
        plans = [one.plan for one in self.adapters.values()]
        alike = all(plan == plans[0] for plan in plans)
        if alike and all(entry.method.form.record.rows for entry in plans[0].entries):
            return stack(list(self.adapters.values()))
        return stack(list(self.uniform().adapters.values()))


def check_name(name: Any) -> None:
    """Raises a ValueError unless ``name`` may name an adapter, and so a directory."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name for an adapter: expected up to 100 letters, digits, dots, dashes and underscores, a letter or digit "
            f"first ({BASE!r} means the base)."
        )


def _common(plans: Sequence[Plan], rank: int | None) -> Plan:
    """The smallest plan that has room for LoRAs of several plans; ``rank``: at every site, cut to what the weight allows."""
    found: dict[str, list[Entry]] = {}
    for plan in plans:
        for entry in plan.entries:
            found.setdefault(entry.site.path, []).append(entry)
    common = []
    for own in found.values():
        entry = common_entry("uniform", own)
        need = (
            max(largest(dict(e.method.config)["rank"]) for e in own) if rank is None else min(rank, entry.site.max_rank)
        )
        common.append(replace(entry, method=lora(rank=need)))
    return replace(plans[0], entries=tuple(common))


def _alike(new: jax.Array, old: jax.Array) -> jax.Array:
    """In the dtype and place of the old, on which a compiled program depends too."""
    new = new.astype(old.dtype)
    return jax.device_put(new, old.sharding) if old.committed else new
