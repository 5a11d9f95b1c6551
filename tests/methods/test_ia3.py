"""IA3: what is multiplied on either side, bias included; convolutions; what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, delta, kernel, params_of

import lowrank_jax as lr
from lowrank_jax.forms import Call, InputRescale, Rescale, UnsupportedError

N_IN, N_OUT = 12, 10
K, X, BIAS = kernel(N_IN, N_OUT), kernel(7, N_IN, seed=1), kernel(N_OUT, seed=3)


def moved(side, weight=K):
    adapters = adapt(weight, lr.ia3(side=side))
    return adapters.replace(sites={PATH: {"l": kernel(*adapters.sites[PATH]["l"].shape, seed=5)}})


@pytest.mark.parametrize("side", ["output", "input"])
def test_the_whole_output_or_the_input_is_multiplied(side):
    adapters = moved(side)
    learned, form = adapters.sites[PATH]["l"], lr.expand(adapters)[PATH]
    got = form.apply(Call("dense", X, X @ K + BIAS, K, jnp.matmul, None, BIAS))
    expected = (X @ K + BIAS) * learned if side == "output" else (X * learned) @ K + BIAS
    np.testing.assert_allclose(got, expected, atol=1e-5)
    params = {"layer": {"kernel": K, "bias": BIAS}}
    merged = lr.merge(params, adapters)["layer"]
    np.testing.assert_allclose(X @ merged["kernel"] + merged["bias"], expected, atol=1e-5)
    assert (merged["bias"] != BIAS).any() == (side == "output")


@pytest.mark.parametrize("side", ["output", "input"])
def test_it_starts_at_one(side):
    adapters = adapt(kernel(2, N_IN, N_OUT), lr.ia3(side=side))
    assert (adapters.sites[PATH]["l"] == 1).all()
    assert adapters.sites[PATH]["l"].shape == (2, N_OUT if side == "output" else N_IN)
    assert not np.asarray(delta(adapters, kernel(2, N_IN, N_OUT))).any()


def test_a_convolution_multiplies_its_channels_at_every_place_of_the_window():
    """A window of 2 over 3 channels, written out as a matmul on patches."""
    x, weight, change = kernel(2, 7, 3, seed=8), kernel(6, N_OUT), kernel(3, seed=9)
    patches = lambda x: jnp.concatenate([x[:, :-1], x[:, 1:]], -1)  # noqa: E731
    call = Call("conv", x, patches(x) @ weight + BIAS, weight, lambda x, w: patches(x) @ w, None, BIAS)
    expected = patches(x * (1 + change)) @ weight + BIAS
    np.testing.assert_allclose(InputRescale(change).apply(call), expected, atol=1e-5)
    np.testing.assert_allclose(patches(x) @ (weight + InputRescale(change).delta(weight)) + BIAS, expected, atol=1e-5)


@pytest.mark.parametrize("side", ["output", "input"])
def test_one_product_forward_and_one_backward(side):
    """On the input side too: the call's own product is dead code once compiled."""
    form = lr.expand(moved(side))[PATH]

    def loss(form, x):
        return (form.apply(Call("dense", x, x @ K, K, jnp.matmul)) ** 2).sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(form, X).compile().as_text()
    assert sum(" dot(" in line or "custom-call" in line for line in text.splitlines()) == 2


def test_an_input_rescale_has_to_come_first():
    first, second = adapt(K, lr.lora(2)), moved("input")
    with pytest.raises(UnsupportedError, match="ia3 reads the weight"):
        lr.add(first, second)
    both = lr.add(first, moved("output"))
    assert lr.merge(params_of(K), both) is not None


@pytest.mark.parametrize("form", [Rescale(jnp.ones(2)), InputRescale(jnp.ones(2))])
def test_embeddings_are_refused(form):
    with pytest.raises(UnsupportedError, match="does not apply to embeddings"):
        form.transpose()
    assert "embed" not in form.record.kinds


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="ia3\\(side='both'\\): expected one of"):
        lr.ia3(side="both")
