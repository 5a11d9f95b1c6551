"""PEGO: what the two penalties see, against their formulas and at the ends of their range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, delta, kernel, params_of

import lowrank_jax as lr

N_IN, N_OUT, RANK, GROUP = 12, 10, 2, 3
WIDTH = RANK * GROUP
K = kernel(N_IN, N_OUT)
BASIS = np.linalg.qr(np.asarray(kernel(N_IN, N_IN, seed=4), np.float64))[0]


def pego(**fields):
    return lr.pego(**{"rank": RANK, "group": GROUP, "alpha": 2.0 * RANK, **fields})


def with_factors(method, a, b, weight=K):
    leaves = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return adapt(weight, method).replace(sites={PATH: leaves})


def penalty(method, a, b, weight=K):
    return float(lr.penalty(params_of(jnp.asarray(weight, jnp.float32)), with_factors(method, a, b)))


def members(a, b):
    return [(a[:, s], b[s]) for s in (slice(n * RANK, (n + 1) * RANK) for n in range(GROUP))]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("norm", ["l1", "frobenius"])
@pytest.mark.parametrize("operand", ["product", "a"])
def test_penalty_is_its_formula(operand, norm, average):
    a, b = (np.asarray(kernel(*shape, seed=6), np.float64) for shape in ((N_IN, WIDTH), (WIDTH, N_OUT)))
    parts = [a @ b if operand == "product" else a for a, b in members(a, b)]
    total = lambda m: (np.mean if average else np.sum)(np.abs(m) if norm == "l1" else m**2)  # noqa: E731
    preserve = sum(total(np.asarray(K, np.float64).T @ part) for part in parts)
    diversify = sum(total(parts[i].T @ parts[j]) for i in range(GROUP) for j in range(i + 1, GROUP))
    got = penalty(pego(operand=operand, norm=norm, average=average, preserve=0.3, diversify=0.7), a, b)
    assert abs(got - (0.3 * preserve + 0.7 * diversify)) < 1e-5 * got


@pytest.mark.parametrize("operand", ["product", "a"])
def test_orthogonal_blocks_are_diverse_and_copies_are_not(operand):
    """Both act on the input with the same strength; only how the directions are shared out differs."""
    b = np.asarray(kernel(WIDTH, N_OUT, seed=7))
    method = pego(operand=operand, preserve=0)
    apart = penalty(method, BASIS[:, :WIDTH], b)
    copies = penalty(method, np.tile(BASIS[:, :RANK], GROUP), b)
    assert apart < 1e-5 < 1e-4 < copies


def test_orthogonal_outputs_are_not_diverse():
    """The products reach over the inputs: members that write apart but read alike are penalised."""
    a = np.tile(BASIS[:, :RANK], GROUP)
    b = np.linalg.qr(np.asarray(kernel(N_OUT, N_OUT, seed=8)))[0][:WIDTH]
    assert penalty(pego(preserve=0), a, b) > 1e-4


@pytest.mark.parametrize("operand", ["product", "a"])
def test_what_the_weight_does_not_read_is_preserved(operand):
    weight = BASIS[:, :4] @ BASIS[:4, :N_OUT]  # reads four directions of its input
    b = np.asarray(kernel(WIDTH, N_OUT, seed=7))
    method = pego(operand=operand, diversify=0)
    assert penalty(method, BASIS[:, 4 : 4 + WIDTH], b, weight) < 1e-5
    assert penalty(method, BASIS[:, :WIDTH], b, weight) > 1e-3


def test_the_order_of_the_group_does_not_matter():
    a, b = np.asarray(kernel(N_IN, WIDTH, seed=6)), np.asarray(kernel(WIDTH, N_OUT, seed=7))
    order = [4, 5, 0, 1, 2, 3]
    assert abs(penalty(pego(), a, b) - penalty(pego(), a[:, order], b[order])) < 1e-6
    mixed = [0, 2, 1, 3, 4, 5]  # a direction that changes its LoRA does matter
    assert abs(penalty(pego(), a, b) - penalty(pego(), a[:, mixed], b[mixed])) > 1e-3


def test_products_start_without_a_penalty_and_the_first_factors_with_one():
    adapters = adapt(K, pego())
    assert float(lr.penalty(params_of(K), adapters)) == 0
    assert float(lr.penalty(params_of(K), adapt(K, pego(operand="a")))) > 0
    assert adapt(K, pego(preserve=0, diversify=0)).plan.entries[0].method.penalty is None


def test_the_group_is_the_sum_of_its_loras():
    a, b = np.asarray(kernel(N_IN, WIDTH, seed=6)), np.asarray(kernel(WIDTH, N_OUT, seed=7))
    expected = 2 * sum(a @ b for a, b in members(a, b))
    np.testing.assert_allclose(delta(with_factors(pego(), a, b), K), expected, atol=1e-4)
    start = np.asarray(adapt(kernel(300, 200), pego()).sites[PATH]["a"])
    assert 0.9 / 300**0.5 < np.abs(start).max() <= 1 / 300**0.5


def test_a_stack_is_its_layers():
    weight, a, b = kernel(2, N_IN, N_OUT), kernel(2, N_IN, WIDTH, seed=6), kernel(2, WIDTH, N_OUT, seed=7)
    stacked = float(lr.penalty(params_of(weight), with_factors(pego(average=True), a, b, weight)))
    each = [penalty(pego(average=True), a[n], b[n], weight[n]) for n in range(2)]
    assert abs(stacked - sum(each)) < 1e-5 * stacked


def test_one_product_is_there_at_a_time():
    """Six matrices of a mebibyte for each weight, and their gradients, in the room of a few."""
    weight = jnp.ones((64, 512))
    adapters = adapt(weight, pego())
    of = jax.jit(jax.grad(lambda sites: lr.penalty(params_of(weight), adapters.replace(sites=sites))))
    assert of.lower(adapters.sites).compile().memory_analysis().temp_size_in_bytes < 3 * 512 * 512 * 4


def test_training_by_the_penalty_alone_turns_the_group_apart():
    a, b = kernel(N_IN, WIDTH, seed=6), kernel(WIDTH, N_OUT, seed=7)
    method = pego(operand="a", norm="frobenius", preserve=0, diversify=1)
    a = a / jnp.linalg.norm(a, axis=0)
    of = lambda a: lr.penalty(params_of(K), with_factors(method, a, b))  # noqa: E731
    step = jax.jit(lambda a: a - 0.1 * jax.grad(of)(a))
    start = of(a)
    for _ in range(100):
        a = step(a)
    assert of(a) < 1e-3 * start and jnp.linalg.norm(a) > 0.5


@pytest.mark.parametrize(
    "fields", [{"norm": "l2"}, {"operand": "b"}, {"group": 0}, {"preserve": -1.0}, {"dropout": 1.0}]
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=f"pego\\({next(iter(fields))}="):
        pego(**fields)
