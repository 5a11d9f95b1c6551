"""Sites from parameters alone: recognising, declaring, the canonical view."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import lowrank_jax as lr
from lowrank_jax.sites import flatten, matches, no_match, with_leaves


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_unambiguous_weights_are_recognised():
    found = lr.sites({
        "dense": {"kernel": zeros(4, 8), "bias": zeros(8)},
        "stack": {"kernel": zeros(3, 4, 8), "bias": zeros(3, 8)},
        "embed": {"embedding": zeros(10, 4)},
        "heads": {"kernel": zeros(4, 2, 8)},
        "stacked_heads_or_general": {"kernel": zeros(3, 4), "bias": zeros(3, 4)},
        "norm": {"scale": zeros(4)},
        "raw": zeros(4, 4),
    })  # fmt: skip
    assert {p: s.kind for p, s in found.items() if s.kind != "param"} == {
        "dense/kernel": "dense", "stack/kernel": "dense", "embed/embedding": "embed",
    }  # fmt: skip
    stack = found["stack/kernel"]
    assert (stack.batch, stack.inputs, stack.outputs, stack.scanned) == ((0,), (1,), (2,), (0,))
    assert (stack.n_in, stack.n_out, stack.max_rank, stack.batch_shape, stack.module) == (4, 8, 4, (3,), "stack")


def test_declared_axes():
    params = {"layers": {"attention": {"w": zeros(3, 2, 4, 5)}, "q": {"kernel": zeros(3, 4, 2, 5)}}}
    found = lr.sites(params, declare={".*/w": "bioo", ".*/q": "bioo"})
    w, q = found["layers/attention/w"], found["layers/q/kernel"]
    assert (w.kind, w.batch, w.inputs, w.outputs, w.factored) == ("dense", (0,), (1,), (2, 3), False)
    assert (q.n_in, q.n_out, q.factored) == (4, 10, True)


@pytest.mark.parametrize("roles", ["io", "bixo", "biooo"])
def test_a_declaration_needs_one_letter_an_axis(roles):
    with pytest.raises(ValueError, match=r"layers/w has shape \(3, 2, 4, 5\); expected one letter an axis"):
        lr.sites({"layers": {"w": zeros(3, 2, 4, 5)}}, declare={"layers/w": roles})


def test_a_declaration_that_matches_nothing_names_the_nearest():
    with pytest.raises(ValueError, match=r"declare=.*matches no weight. Nearest paths: layers"):
        lr.sites({"layers": {"w": zeros(3, 2)}, "other": {"x": zeros(2)}}, declare={"layer": "io"})


@pytest.mark.parametrize(
    ("batch", "inputs", "outputs"),
    [((0,), (1, 2), (3,)), ((), (1, 0), (3, 2)), ((2,), (3,), (0, 1)), ((3, 1), (0,), (2,))],
)
def test_canonical_and_back(batch, inputs, outputs):
    weight = jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    site = lr.Site("w", "dense", weight.shape, "float32", batch, inputs, outputs)
    matrix = site.canonical(weight)
    assert matrix.shape == (*site.batch_shape, site.n_in, site.n_out)
    assert (site.original(matrix) == weight).all()
    index = np.unravel_index(17, matrix.shape)
    place = [0] * 4
    groups = [(batch, index[: len(batch)]), (inputs, np.unravel_index(index[-2], [weight.shape[a] for a in inputs])),
              (outputs, np.unravel_index(index[-1], [weight.shape[a] for a in outputs]))]  # fmt: skip
    for axes, values in groups:
        for axis, value in zip(axes, values, strict=True):
            place[axis] = int(value)
    assert matrix[index] == weight[tuple(place)]


def test_trees_of_every_kind_flatten_alike():
    tree = {"a": {"kernel": jnp.ones((2, 3))}, "b": jnp.zeros(2)}
    assert list(flatten(tree)) == list(flatten(freeze(tree))) == ["a/kernel", "b"]
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert set(flatten(nnx.state(model, nnx.Param))) == {"bias", "kernel"}
    assert flatten([{"x": 1}, 2]) == {"0/x": 1, "1": 2}


def test_with_leaves_shares_the_rest():
    tree = {"a": {"kernel": jnp.ones(2)}, "b": jnp.zeros(2)}
    new = with_leaves(tree, {"b": jnp.ones(2)})
    assert new["a"]["kernel"] is tree["a"]["kernel"] and (tree["b"] == 0).all() and (new["b"] == 1).all()


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("a/b", "a/b/kernel", True), ("a/b/kernel", "a/b/kernel", True), ("b", "a/b/kernel", False), (".*/b", "a/b/kernel", True),
        (".*/a", "a/kernel", True), ("a/b", "a/bc/kernel", False), (".*/(q|v)", "x/v/kernel", True), ("kernel", "kernel", True),
    ],
)  # fmt: skip
def test_a_pattern_matches_a_whole_path_or_module(pattern, path, expected):
    assert matches(pattern, path) is expected


def test_a_broken_pattern_says_so():
    with pytest.raises(ValueError, match=r"Pattern '\(' is not a regular expression"):
        matches("(", "a/b")


def test_no_match_offers_close_paths_first():
    message = no_match(
        "Pattern 'x'", r".*/attn/query", ["layers_0/attention/query/kernel", "embed/embedding", "head/kernel"]
    )
    assert "Nearest paths: layers_0/attention/query" in message and "start it with '.*/'" in message
