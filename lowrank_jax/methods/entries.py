"""Counting the entries of a weight that a sparse method trains."""

from __future__ import annotations

import math

import numpy as np

from lowrank_jax.sites import Site


def count_entries(name: str, field: str, share: float, site: Site) -> int:
    """``floor(share * n_in * n_out)``.

    Raises:
      ValueError: that is none, or positions would not fit int32; names the site.
    """
    size = site.n_in * site.n_out
    check_size(name, site)
    # The tiny offset keeps a product that rounding left just under a whole number from losing one.
    entries = math.floor(share * size + 1e-9)
    if entries < 1:
        raise ValueError(
            f"{name} at {site.path}: {field}={share} of {size} entries is none. Take a larger {field}, or exclude the site."
        )
    return entries


def check_size(name: str, site: Site) -> None:
    """Raises a ValueError that names the site where positions would not fit int32."""
    size = site.n_in * site.n_out
    if size > np.iinfo(np.int32).max:
        raise ValueError(f"{name} at {site.path}: {size} entries are too many for int32 positions; exclude the site.")


def check_share(name: str, field: str, share: float) -> None:
    """Raises a ValueError unless ``0 < share <= 1``."""
    if not 0 < share <= 1:
        raise ValueError(f"{name}({field}={share}): expected a share of the entries in (0, 1].")
