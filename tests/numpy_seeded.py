"""`lowrank_jax.seeded` once more, in numpy. What adapters hold as seeds depends on it: it must not change."""

import numpy as np


def hashed(x):
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x21F0AAAD)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0xD35A2D97)
    return x ^ x >> np.uint32(15)


def golden(number):
    return np.uint32(number * 0x9E3779B9 & 0xFFFFFFFF)


def numpy_words(seed, shape):
    total = np.zeros((), np.uint32)
    seed = np.asarray(seed).astype(np.uint32)
    for axis, index in enumerate(np.indices(shape, np.uint32)):
        total = total + hashed(hashed(index ^ seed[0]) + seed[1] + golden(axis))
    return hashed(total)


def numpy_uniform(seed, shape):
    return ((numpy_words(seed, shape) >> np.uint32(9)) + 0.5) * 2.0**-22 - 1


def numpy_fold(seed, number):
    return hashed(np.asarray(seed).astype(np.uint32) + golden(number + 1))
