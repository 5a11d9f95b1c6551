"""Trainable tokens: the values themselves are kept; the rest of the table never moves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.forms import Rows

TABLE = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
PARAMS = {"embed": {"embedding": TABLE}}


def trained(tokens: tuple[int, ...], rows: jax.Array) -> lr.Adapters:
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, {"embed": lr.trainable_tokens(token_indices=tokens)}))
    return adapters.replace(sites={"embed/embedding": {"rows": rows}})


def test_rows_are_values_and_not_what_is_added() -> None:
    """On a base whose rows of new tokens were drawn anew, the trained ones are still what was trained."""
    rows = jnp.arange(8.0).reshape(2, 4)
    adapters = trained((4, 1), rows)
    other = {"embed": {"embedding": TABLE.at[jnp.array([1, 4])].set(7.0)}}
    for base in (PARAMS, other):
        np.testing.assert_allclose(lr.merge(base, adapters)["embed"]["embedding"][jnp.array([4, 1])], rows, atol=1e-6)
    np.testing.assert_array_equal(lr.merge(PARAMS, adapters)["embed"]["embedding"][0], TABLE[0])


def test_the_start_is_the_base_bit_for_bit_in_both_directions() -> None:
    model, ids = nn.Embed(6, 4), jnp.array([[0, 4, 1, 5]])
    adapters = lr.init(
        jax.random.key(0), PARAMS["embed"], lr.plan(PARAMS["embed"], {".*": lr.trainable_tokens((4, 1))})
    )
    variables = {"params": PARAMS["embed"]}
    got = lr.linen.adapted(model, adapters)(variables, ids)
    np.testing.assert_array_equal(got, model.apply(variables, ids))
    query = jnp.ones((2, 4))
    attended = lr.linen.adapted(model, adapters)(variables, query, method="attend")
    np.testing.assert_array_equal(attended, model.apply(variables, query, method="attend"))


@pytest.mark.parametrize("side", ["in", "out"])
def test_index_zero_is_no_row(side: str) -> None:
    kernel = TABLE if side == "in" else TABLE.T
    form = Rows(jnp.full((2, 4), jnp.nan), jnp.zeros(2, jnp.int32), side=side)
    np.testing.assert_array_equal(form.delta(kernel), jnp.zeros_like(kernel))


def test_only_the_layers_of_a_stack_that_were_chosen_change() -> None:
    params = {"heads": {"kernel": jnp.ones((3, 4, 6)), "bias": jnp.zeros((3, 6))}}
    plan = lr.plan(params, {"heads/kernel": lr.on_layers(lr.trainable_tokens((2,)), [1])})
    adapters = lr.init(jax.random.key(0), params, plan)
    adapters = jax.tree.map(lambda x: x + 1, adapters)
    change = lr.merge(params, adapters)["heads"]["kernel"] - 1
    np.testing.assert_array_equal(change[1, :, 2], jnp.ones(4))
    assert float(jnp.abs(change).sum()) == 4


@pytest.mark.parametrize("tokens", [(), (1, 1), (-1,)])
def test_tokens_that_make_no_sense(tokens: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="trainable_tokens.token_indices"):
        lr.trainable_tokens(tokens)


def test_a_token_beyond_the_vocabulary_names_the_site() -> None:
    with pytest.raises(ValueError, match="embed/embedding: token 6 is beyond its 6 rows"):
        lr.plan(PARAMS, {"embed": lr.trainable_tokens((6,))})
