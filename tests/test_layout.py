"""Einsum labels and the canonical views, checked against numpy's einsum."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.layout import Labels, dense_equation

CASES = {
    "dense": ("...i,io->...o", (2, 5, 4), (4, 3)),
    "heads out": ("...d,dnh->...nh", (2, 5, 4), (4, 2, 3)),
    "heads in": ("bsnh,nhd->bsd", (2, 5, 2, 3), (2, 3, 4)),
    "transposed": ("bi,oi->bo", (2, 4), (3, 4)),
    "out in front": ("bsd,hdk->hbsk", (2, 5, 4), (2, 4, 3)),
    "experts": ("ebi,eio->ebo", (3, 2, 4), (3, 4, 5)),
    "experts behind": ("bei,ioe->boe", (2, 3, 4), (4, 5, 3)),
    "in swapped": ("bhn,nhd->db", (2, 3, 2), (2, 3, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_canonical_views_reproduce_the_einsum(name):
    equation, x_shape, w_shape = CASES[name]
    random = np.random.default_rng(0)
    x, w = random.standard_normal(x_shape).astype(np.float32), random.standard_normal(w_shape).astype(np.float32)
    labels = Labels.parse(equation, x.ndim)
    order = [labels.w.index(c) for c in labels.batch + labels.inputs + labels.outputs]
    batch = [w.shape[labels.w.index(c)] for c in labels.batch]
    n_in = int(np.prod([w.shape[labels.w.index(c)] for c in labels.inputs]))
    matrix = w.transpose(order).reshape(*batch, n_in, -1)
    flat = labels.canonical_input(jnp.asarray(x))
    assert flat.shape[-1] == n_in
    middle = flat.reshape(*batch, -1, n_in) @ matrix
    update = middle.reshape(*flat.shape[:-1], matrix.shape[-1])
    expected = np.einsum(equation, x, w)
    np.testing.assert_allclose(labels.output(update, w.shape), expected, atol=1e-5)
    np.testing.assert_allclose(labels.canonical_output(jnp.asarray(expected)), update, atol=1e-5)


@pytest.mark.parametrize("equation", ["bi,io", "bi,io,oj->bj", "bi,...o->bo", "bi", "bi,iok->bo"])
def test_what_is_no_matmul_is_refused(equation):
    with pytest.raises(ValueError, match="Einsum equation"):
        Labels.parse(equation, 2)


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit an input with 4 axes"):
        Labels.parse("abi,io->abo", 4)


@pytest.mark.parametrize(
    ("axis", "batch", "n_out", "ndim", "expected"),
    [
        ((2,), (), 1, 3, "abc,cd->abd"),
        ((2,), (), 2, 3, "abc,cde->abde"),
        ((1, 2), (), 1, 3, "abc,bcd->ad"),
        ((2,), (0,), 1, 3, "abc,acd->abd"),
    ],
)
def test_dense_general_as_an_equation(axis, batch, n_out, ndim, expected):
    assert dense_equation(axis, batch, n_out, ndim) == expected
