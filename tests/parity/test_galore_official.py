"""Our GaLore against the official package, step for step, on the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_jax.optim import galore

torch = pytest.importorskip("torch", reason="needs the parity extra")
pytestmark = pytest.mark.parity
GaLoreAdamW = pytest.importorskip("galore_torch", reason="needs the parity extra").GaLoreAdamW
SHAPES = {"wide": (12, 30), "tall": (30, 12), "square": (16, 16)}  # [n_in, n_out]


@pytest.fixture(autouse=True)
def signs(monkeypatch):
    """A singular vector's sign is anybody's choice, and old moments notice it after a refresh: torch is made to choose as we do.

    On each side for itself: one side only is projected on.
    """
    plain = torch.linalg.svd

    def signed(x, full_matrices=True):
        u, s, vh = plain(x, full_matrices=False)
        return positive(u.T).T, s, positive(vh)

    def positive(rows):
        return rows * torch.where(rows.gather(1, rows.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)

    monkeypatch.setattr(torch.linalg, "svd", signed)


# Not "full": P^T G Q is diagonal at a refresh, and Adam makes steps of full length out of the rounding beside the diagonal.
@pytest.mark.parametrize(("theirs", "side"), [("std", "smaller"), ("left", "output"), ("right", "input")])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_step_for_step_across_refreshes(theirs, side, decay):
    random = np.random.default_rng(0)
    start = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    weights = {name: torch.nn.Parameter(torch.tensor(x.T.copy())) for name, x in start.items()}
    group = {"rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": theirs}
    # Theirs adds eps before the bias correction, optax after it: it is made small enough not to matter.
    official = GaLoreAdamW(
        [{"params": list(weights.values()), **group}],
        lr=0.01,
        eps=1e-12,
        weight_decay=decay,
        no_deprecation_warning=True,
    )
    tx = optax.chain(
        galore(optax.scale_by_adam(eps=1e-12), 4, refresh_every=5, side=side, svd="exact", stagger=False),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(0.01),
    )
    params = {name: {"kernel": jnp.asarray(x)} for name, x in start.items()}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(13):  # two refreshes after the first
        gradients = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
        for name, weight in weights.items():
            weight.grad = torch.tensor(gradients[name].T.copy())
        official.step()
        updates, state = update({name: {"kernel": jnp.asarray(g)} for name, g in gradients.items()}, state, params)
        params = optax.apply_updates(params, updates)
        for name, weight in weights.items():
            ours = np.asarray(params[name]["kernel"])
            # Decay is applied to the weight after the step there and before it here: a factor 1 - lr * decay on one step's update.
            np.testing.assert_allclose(ours, weight.detach().numpy().T, atol=2e-6 if not decay else 2e-4, err_msg=name)
    moved = max(np.abs(np.asarray(params[name]["kernel"]) - start[name]).max() for name in SHAPES)
    assert moved > 0.01
