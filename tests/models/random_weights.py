"""Random weights for the tests, made by NumPy: a compiled `model.init` costs seconds of a test's time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import models


@functools.cache
def random_params(config, seed: int = 0):
    """Every leaf random, also those that are initialised to a constant, with a spread that makes logits of order one."""
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(make, models.param_shapes(config))
