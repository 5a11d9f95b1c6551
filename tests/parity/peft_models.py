"""What the tests against PEFT share: tiny models with random weights on both sides, and how their logits are compared."""

import pathlib
import re

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")
hf_peft = pytest.importorskip("peft", reason="needs the parity extra")

import lowrank_jax as lr  # noqa: E402
from lowrank_jax import models  # noqa: E402

TOLERANCE = 1e-4
_SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
              "max_position_embeddings": 40, "initializer_range": 0.2}  # fmt: skip
BASES = {
    "bert": ("BertForSequenceClassification", "BertConfig", _SIZES | {"num_labels": 3}),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _SIZES | {"num_labels": 3, "type_vocab_size": 1, "pad_token_id": 1},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "tied": ("LlamaForCausalLM", "LlamaConfig", _SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}
SCANNED = {"bert": False, "roberta": True, "llama": True, "tied": True}
TOKENS = np.random.default_rng(0).integers(5, 97, (2, 9))


def make_base(name: str, directory: pathlib.Path) -> pathlib.Path:
    """Writes a model whose every weight is random."""
    model_class, config_class, fields = BASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def torch_model(name: str, directory: pathlib.Path):
    return getattr(transformers, BASES[name][0]).from_pretrained(directory, attn_implementation="eager").eval()


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(
            input_ids=torch.tensor(TOKENS), attention_mask=torch.ones_like(torch.tensor(TOKENS))
        ).logits.numpy()


def ours(loaded: models.Loaded, adapters: lr.Adapters | None = None) -> np.ndarray:
    mask = np.ones_like(TOKENS)
    if adapters is None:
        return np.asarray(loaded.model.apply({"params": loaded.params}, TOKENS, attention_mask=mask))
    return np.asarray(lr.linen.apply(loaded.model, loaded.params, adapters, TOKENS, attention_mask=mask))


def shaken(loaded: models.Loaded, rules) -> lr.Adapters:
    """Adapters as if trained."""
    sites = lr.linen.sites(loaded.model, loaded.params, TOKENS)
    return shake(lr.init(jax.random.key(1), loaded.params, lr.plan(loaded.params, rules, sites=sites)))


def shake(adapters: lr.Adapters) -> lr.Adapters:
    """Every trained leaf moved at random, so that nothing is left at its initial value."""
    train, frozen = lr.partition(adapters)
    leaves, tree = jax.tree.flatten(train)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.3 * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return lr.join(tree.unflatten(moved), frozen)


def assert_equal(a: np.ndarray, b: np.ndarray, base: np.ndarray) -> None:
    assert np.abs(a - base).max() > 0.05, "an adapter that changes nothing would agree with any other"
    np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE)


def train(model, run, steps: int = 2, after_step=lambda step: None) -> None:
    """A few steps of AdamW from a random start, so that everything that is trained has moved."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search("lora_|vera_lambda|randlora_lambda|ia3_l|trainable_tokens_delta", name):
                parameter.add_(0.1 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        run(model.train()).square().mean().backward()
        optimizer.step()
        after_step(step)
