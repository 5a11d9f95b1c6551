"""A new paper is one function and one row: a method in the manner of VeRA (arXiv 2310.11454), defined here, obeys every law.

Two random matrices are frozen and shared by all sites, whatever their sizes; each site trains two vectors. The row below is all that
the suite needs of it.
"""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance_row import Row

import lowrank_jax as lr
from lowrank_jax.forms import Leaf, LowRank
from lowrank_jax.methods.base import check_rank

RANK, START = 3, 0.1


@lr.method
def toy_vector(rank: int = RANK) -> lr.Method:
    """``delta = A[:n_in] diag(d) B[:, :n_out] diag(c)`` with ``d [r]`` and ``c [n_out]`` trained, ``c = 0`` at first."""

    def leaves(site):
        check_rank("toy_vector", rank, site)
        return {"d": Leaf((rank,), ("rank",)), "c": Leaf((site.n_out,), ("out",))}

    def init(key, site, given):
        return {"d": jnp.full((*site.batch_shape, rank), START), "c": jnp.zeros((*site.batch_shape, site.n_out))}

    def shared(sites):
        n_in, n_out = max(s.n_in for s in sites), max(s.n_out for s in sites)
        return {"a": Leaf((n_in, rank), ("", ""), trains=None), "b": Leaf((rank, n_out), ("", ""), trains=None)}

    def init_shared(key, sites):
        shapes = {name: leaf.shape for name, leaf in shared(sites).items()}
        return {name: jax.random.normal(jax.random.fold_in(key, n), shapes[name]) for n, name in enumerate("ab")}

    def expand(site, leaves, context):
        shared = context.shared
        a = jnp.broadcast_to(shared["a"][: site.n_in], (*site.batch_shape, site.n_in, rank))
        b = shared["b"][:, : site.n_out] * leaves["c"][..., None, :]
        return LowRank(a, b, leaves["d"])

    return lr.Method(LowRank, leaves, init, expand, shared=shared, init_shared=init_shared)


def update(p, shared, kernel):
    a, b = shared["a"][: kernel.shape[-2]], shared["b"][:, : kernel.shape[-1]]
    return np.einsum("ir,...r,ro,...o->...io", a, p["d"], b, p["c"])


ROW = Row("toy_vector", toy_vector, lambda s, c: RANK + s.n_out, update, lambda c: c["rank"])


@pytest.mark.parametrize("case", conformance.cases([ROW]), ids=str)
def test_laws(case):
    conformance.check(case)


def test_shared_leaves_are_kept_once():
    case = next(case for case in conformance.cases([ROW]) if case.layout == "scanned")
    assert list(case.adapters.shared) == [str(toy_vector())]
    assert set(case.adapters.sites["conv/kernel"]) == {"d", "c"}
