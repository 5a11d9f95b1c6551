"""Combined adapters against PEFT's `add_weighted_adapter`, where the two mean the same."""

import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import PATH, adapt, delta, kernel

torch = pytest.importorskip("torch", reason="needs the parity extra")
hf_peft = pytest.importorskip("peft", reason="needs the parity extra")

import lowrank_jax as lr  # noqa: E402

pytestmark = pytest.mark.parity
WEIGHT = kernel(10, 8)


def ours(rank, alpha, seed):
    random = np.random.default_rng(seed)
    adapters = adapt(WEIGHT, lr.lora(rank, alpha))
    leaves = {name: jnp.asarray(random.standard_normal(x.shape), x.dtype) for name, x in adapters.sites[PATH].items()}
    return adapters.replace(sites={PATH: leaves})


def theirs(adapters, weights, **how):
    """The update of PEFT's combination of the same adapters, ``[n_in, n_out]``."""
    model = None
    for n, one in enumerate(adapters):
        fields = dict(one.plan.entries[0].method.config)
        config = hf_peft.LoraConfig(r=fields["rank"], lora_alpha=fields["alpha"], target_modules=["layer"])
        if model is None:
            base = torch.nn.Module()
            base.layer = torch.nn.Linear(10, 8)
            model = hf_peft.PeftModel(base, config, adapter_name="0")
        else:
            model.add_adapter(str(n), config)
        layer = model.base_model.model.layer
        with torch.no_grad():
            layer.lora_A[str(n)].weight.copy_(torch.tensor(np.asarray(one.sites[PATH]["a"]).T))
            layer.lora_B[str(n)].weight.copy_(torch.tensor(np.asarray(one.sites[PATH]["b"]).T))
    model.add_weighted_adapter([str(n) for n in range(len(adapters))], weights, "combined", **how)
    return layer.get_delta_weight("combined").detach().numpy().T


PAIR = [ours(2, 5, 0), ours(2, 3, 1)]
UNEQUAL = [ours(2, 5, 0), ours(3, 4, 2)]


@pytest.mark.parametrize("weights", [[0.7, 1.5], [1.0, -0.4]], ids=str)
@pytest.mark.parametrize(
    "method, combination, adapters, rank",
    [("sum", "cat", UNEQUAL, None), ("svd", "svd", UNEQUAL, 3), ("svd", "svd", UNEQUAL, None), ("linear", "linear", PAIR, None)],
)  # fmt: skip
def test_sums(method, combination, adapters, rank, weights):
    got = lr.combine(adapters, weights, method, rank=rank).adapters
    expected = theirs(adapters, weights, combination_type=combination, svd_rank=rank)
    np.testing.assert_allclose(delta(got, WEIGHT), expected, atol=2e-5)


@pytest.mark.parametrize("density", [0.3, 0.55])
@pytest.mark.parametrize("method, weights", [("ties", [0.8, 0.8]), ("magnitude_prune", [0.7, -1.5])])
def test_pruning_of_the_update(method, weights, density):
    """TIES with equal weights, because PEFT elects the signs before it weighs. Of full rank, so that nothing is cut."""
    got = lr.combine(PAIR, weights, method, density=density, scope="matrix", rank=8).adapters
    expected = theirs(PAIR, weights, combination_type=f"{method}_svd", svd_rank=8, density=density)
    np.testing.assert_allclose(delta(got, WEIGHT), expected, atol=5e-5)
