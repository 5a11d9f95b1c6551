"""Modules other than linear ones, exchanged with PEFT through name_map: embeddings, convolutions, parameters of experts."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_models import assert_equal, hf_peft, shake, torch, train

import lowrank_jax as lr
from lowrank_jax import peft

pytestmark = pytest.mark.parity
IDS = np.random.default_rng(0).integers(0, 11, (3, 8))
NAMES = {"emb": "emb", "conv1": "body.conv1", "conv2": "body.conv2", "lin": "lin"}


class Mixed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(11, 6)
        self.body = torch.nn.ModuleDict(
            {"conv1": torch.nn.Conv1d(6, 8, 3, padding=1), "conv2": torch.nn.Conv2d(2, 5, (3, 2))}
        )
        self.lin = torch.nn.Linear(5, 4)

    def forward(self, ids):
        x = torch.tanh(self.body["conv1"](self.emb(ids).transpose(1, 2)))
        x = torch.tanh(self.body["conv2"](x.reshape(len(x), 2, 4, 8)))
        return self.lin(x.mean((2, 3)))


class MixedTwin(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = jnp.tanh(nn.Conv(8, (3,), padding=1, name="conv1")(nn.Embed(11, 6, name="emb")(ids)))
        x = jnp.moveaxis(jnp.swapaxes(x, 1, 2).reshape(len(x), 2, 4, 8), 1, -1)
        x = jnp.tanh(nn.Conv(5, (3, 2), padding="VALID", name="conv2")(x))
        return nn.Dense(4, name="lin")(x.mean((1, 2)))


def mixed():
    torch.manual_seed(0)
    model = Mixed()
    with torch.no_grad():  # so that a change anywhere shows
        for parameter in model.parameters():
            parameter.mul_(2)
    kernel = lambda module: jnp.asarray(np.moveaxis(module.weight.detach().numpy(), (0, 1), (-1, -2)))  # noqa: E731
    params = {
        name: {"kernel": kernel(module), "bias": jnp.asarray(module.bias.detach().numpy())}
        for name, module in (("conv1", model.body["conv1"]), ("conv2", model.body["conv2"]), ("lin", model.lin))
    }
    return model, params | {"emb": {"embedding": jnp.asarray(model.emb.weight.detach().numpy())}}


def run(twin, params, x, adapters=None):
    if adapters is None:
        return np.asarray(twin.apply({"params": params}, x))
    return np.asarray(lr.linen.apply(twin, params, adapters, x))


def evaluate(model, x):
    with torch.no_grad():
        return model.eval()(torch.tensor(x)).numpy()


ALL = ["emb", "conv1", "conv2", "lin"]
MIXED = {
    "lora": hf_peft.LoraConfig(r=2, lora_alpha=5, target_modules=ALL, rank_pattern={"conv2": 3}),
    "dora": hf_peft.LoraConfig(r=2, lora_alpha=5, target_modules=ALL, use_dora=True),
    "ia3": hf_peft.IA3Config(target_modules=["conv2", "lin"], feedforward_modules=["conv2"]),
    "ia3-outputs": hf_peft.IA3Config(target_modules=["conv2", "lin"], feedforward_modules=["lin"]),
    "adalora": hf_peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=["conv2", "lin"]),
    "tokens": hf_peft.TrainableTokensConfig(token_indices=[1, 2, 3, 7], target_modules=["emb"]),
}


@pytest.mark.parametrize("case", MIXED)
def test_embeddings_and_convolutions(case: str, tmp_path: pathlib.Path) -> None:
    base, params = mixed()
    twin, plain = MixedTwin(), run(MixedTwin(), params, IDS)
    np.testing.assert_allclose(evaluate(base, IDS), plain, atol=1e-5)
    model = hf_peft.get_peft_model(base, MIXED[case])
    train(model, lambda model: model(torch.tensor(IDS)), 3)
    shift(model)
    model.save_pretrained(tmp_path / "theirs")
    expected = evaluate(model, IDS)
    sites = lr.linen.sites(twin, params, IDS)
    adapters = peft.load(tmp_path / "theirs", params, name_map=NAMES, sites=sites)
    assert_equal(run(twin, params, IDS, adapters), expected, plain)
    out = peft.save(adapters, tmp_path / "ours", name_map=NAMES, peft_type="ADALORA" if case == "adalora" else None)
    again = hf_peft.PeftModel.from_pretrained(mixed()[0], out)
    assert_equal(evaluate(again, IDS), expected, plain)


def shift(model) -> None:
    """Far enough from the start for these small models to notice."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


X = np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32)


class Experts(torch.nn.Module):
    def __init__(self, width: int, layout: str) -> None:
        super().__init__()
        self.inwards = layout != "out_in"
        if layout == "is_transposed":
            self.is_transposed = True
        up, down = (4, 6, width), (4, width, 6)
        if not self.inwards:
            up, down = (4, width, 6), (4, 6, width)
        self.up = torch.nn.Parameter(torch.randn(up))
        self.gate = torch.nn.Parameter(torch.randn(1))
        self.down = torch.nn.Parameter(torch.randn(down))

    def forward(self, x):
        up, down = ("td,edf->etf", "etf,efd->etd") if self.inwards else ("td,efd->etf", "etf,edf->etd")
        return torch.einsum(down, torch.tanh(torch.einsum(up, x, self.up)), self.down).mean(0)


class Mixture(torch.nn.Module):
    def __init__(self, width: int, layout: str) -> None:
        super().__init__()
        self.lin, self.block = torch.nn.Linear(6, 6), torch.nn.ModuleDict({"experts": Experts(width, layout)})

    def forward(self, x):
        return x + self.block["experts"](self.lin(x))


class MixtureTwin(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        h = jnp.broadcast_to(nn.Dense(6, name="lin")(x), (4, *x.shape))
        h = jnp.tanh(nn.Einsum((4, 6, self.width), "etd,edf->etf", use_bias=False, name="up")(h))
        return x + nn.Einsum((4, self.width, 6), "etf,efd->etd", use_bias=False, name="down")(h).mean(0)


def mixture(width: int, layout: str):
    torch.manual_seed(0)
    model = Mixture(width, layout)
    array = lambda x: jnp.asarray(x.detach().numpy())  # noqa: E731
    experts = model.block["experts"]
    inwards = lambda x: array(x) if experts.inwards else jnp.swapaxes(array(x), 1, 2)  # noqa: E731
    params = {"lin": {"kernel": array(model.lin.weight).T, "bias": array(model.lin.bias)},
              "up": {"kernel": inwards(experts.up)}, "down": {"kernel": inwards(experts.down)}}  # fmt: skip
    return model, params


def expert_names(flipped: bool) -> dict:
    up, down = (peft.Parameter("block.experts", name, n, flipped) for n, name in ((0, "up"), (2, "down")))
    return {"lin": "lin", "up": up, "down": down}


@pytest.mark.parametrize("layout", ["out_in", "is_transposed", "flipped"])
@pytest.mark.parametrize("width", [6, 5])
@pytest.mark.parametrize("which", [["up", "down"], ["down"]], ids=str)
def test_parameters_of_experts(width: int, layout: str, which: list[str], tmp_path: pathlib.Path) -> None:
    base, params = mixture(width, layout)
    twin, plain = MixtureTwin(width), run(MixtureTwin(width), params, X)
    np.testing.assert_allclose(evaluate(base, X), plain, atol=1e-4)
    config = hf_peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lin"], rank_pattern={"experts.down": 1},
                                target_parameters=[f"experts.{name}" for name in which])  # fmt: skip
    model = hf_peft.get_peft_model(base, config)
    train(model, lambda model: model(torch.tensor(X)), 2)
    shift(model)
    model.save_pretrained(tmp_path / "theirs")
    expected = evaluate(model, X)
    sites = lr.linen.sites(twin, params, X)
    assert sites["up/kernel"].batch_shape == (4,)
    # Where the two sizes differ the shapes tell which side is which, and a wrong word about it does no harm.
    names = expert_names(flipped=layout == "flipped")
    adapters = peft.load(
        tmp_path / "theirs", params, sites=sites, name_map=names if width == 6 else expert_names(False)
    )
    assert_equal(run(twin, params, X, adapters), expected, plain)
    out = peft.save(adapters, tmp_path / "ours", name_map=names)
    again = hf_peft.PeftModel.from_pretrained(mixture(width, layout)[0], out)
    assert_equal(evaluate(again, X), expected, plain)


def test_peft_runs_our_experts_alone(tmp_path: pathlib.Path) -> None:
    """No module is adapted, only parameters."""
    base, params = mixture(5, "out_in")
    twin, plain = MixtureTwin(5), run(MixtureTwin(5), params, X)
    rules = {"up": lr.pissa(rank=2, alpha=3), "down": lr.lora(rank=3)}
    plan = lr.plan(params, rules, sites=lr.linen.sites(twin, params, X))
    adapters = shake(lr.init(jax.random.key(0), params, plan))
    out = peft.save(adapters, tmp_path / "out", name_map=expert_names(False))
    expected = run(twin, params, X, adapters)
    assert_equal(evaluate(hf_peft.PeftModel.from_pretrained(base, out), X), expected, plain)
    back = peft.load(out, params, name_map=expert_names(False), sites=lr.linen.sites(twin, params, X))
    assert_equal(run(twin, params, X, back), expected, plain)
