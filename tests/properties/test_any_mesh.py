"""What holds of every layout, whatever the shapes and the division of the devices."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowrank_jax as lr
from lowrank_jax.shard import AXES, RULES, ShardingError, layout, mesh

_DIVISIONS = [
    dict(zip(AXES, sizes, strict=True))
    for sizes in np.ndindex(9, 9, 9, 9)
    if all(sizes) and math.prod(sizes) in (1, 2, 4, 8)
]
_MESHES = st.sampled_from(_DIVISIONS).map(mesh)
_SIZES = st.sampled_from((1, 2, 3, 6, 8, 12, 64, 96, 4096))
_SHAPES = st.lists(_SIZES, min_size=1, max_size=4).map(tuple)
_NAMES = st.sampled_from((None, "layers", *RULES))


def _check(shape, sharding):
    sizes = sharding.mesh.shape
    places = [(place,) if isinstance(place, str) else place or () for place in sharding.spec]
    axes = [axis for place in places for axis in place]
    assert len(places) <= len(shape) and set(axes) <= set(AXES)
    assert len(axes) == len(set(axes)), "an axis is used twice"
    for size, place in zip(shape, places, strict=False):
        assert size % math.prod(sizes[axis] for axis in place) == 0
    shards = math.prod(sizes[axis] for axis in axes)
    assert math.prod(sharding.shard_shape(shape)) * shards == math.prod(shape)


@given(st.dictionaries(st.sampled_from("abc"), _SHAPES, min_size=1), _MESHES)
def test_every_shape_finds_a_place(shapes, division):
    tree = {name: {"kernel": jax.ShapeDtypeStruct(shape, "float32")} for name, shape in shapes.items()}
    sites = lr.sites(tree, {n: "b" * (len(s) - 2) + "io" for n, s in shapes.items() if len(s) > 1} or None)
    for name, leaf in layout(tree, division, sites=sites).items():
        _check(shapes[name], leaf["kernel"])


@given(_MESHES, st.data())
def test_any_names_of_axes_find_a_place(division, data):
    shape = data.draw(_SHAPES)
    names = tuple(data.draw(_NAMES) for _ in shape)
    tree = {"x": jax.ShapeDtypeStruct(shape, "float32")}
    _check(shape, layout(tree, division, names={"x": names})["x"])


@given(_MESHES, st.data())
def test_a_place_that_is_asked_for_is_given_or_refused_by_name(division, data):
    shape = data.draw(_SHAPES)
    spec = tuple(data.draw(st.sampled_from((None, *AXES))) for _ in shape)
    used = [axis for axis in spec if axis]
    fits = len(used) == len(set(used)) and all(
        a is None or n % division.shape[a] == 0 for n, a in zip(shape, spec, strict=True)
    )
    tree = {"x": jax.ShapeDtypeStruct(shape, "float32")}
    if fits:
        got = layout(tree, division, overrides={"x": spec})["x"]
        assert tuple(got.spec) == spec
        _check(shape, got)
        return
    with pytest.raises(ShardingError, match=r"overrides=\{'x': "):
        layout(tree, division, overrides={"x": spec})
