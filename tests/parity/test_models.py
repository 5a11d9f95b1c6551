"""The reference models against transformers: the same random weights, read and written both ways, give the same logits."""

import pathlib

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")

from lowrank_jax import models  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
BATCH, LENGTH = 3, 11

_BERT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
_ROBERTA = _BERT | {"type_vocab_size": 1, "pad_token_id": 1}
_LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
_SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}

# name -> (class of the model, class of its config, fields of the config)
CASES = {
    "bert-encoder": ("BertModel", "BertConfig", _BERT),
    "bert-classify": ("BertForSequenceClassification", "BertConfig", _BERT | {"num_labels": 3}),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", _BERT),
    "bert-gelu_new": ("BertForMaskedLM", "BertConfig", _BERT | {"hidden_act": "gelu_new"}),
    "roberta-encoder": ("RobertaModel", "RobertaConfig", _ROBERTA),
    "roberta-classify": ("RobertaForSequenceClassification", "RobertaConfig", _ROBERTA | {"num_labels": 3}),
    "roberta-mlm": ("RobertaForMaskedLM", "RobertaConfig", _ROBERTA),
    "llama2": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama-bias": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"rope_parameters": _LLAMA3}),
    "llama-linear": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"rope_parameters": _LINEAR}),
    "smollm2": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _LLAMA | {"num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA | {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA | _SLIDING),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA | {"head_dim": 16}),
    "qwen3-sliding": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA | _SLIDING | {"head_dim": 16}),
}


def oracle(name: str):
    """A model of transformers whose every weight, biases and norms included, is random."""
    model_class, config_class, fields = CASES[name]
    config = getattr(transformers, config_class)(**fields)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and a mask: a full row, a right-padded one, and another; the padding is the pad token."""
    tokens = np.random.default_rng(seed).integers(5, 97, (BATCH, LENGTH))
    mask = np.ones_like(tokens)
    for row, real in ((1, 6), (2, 9)):
        tokens[row, real:], mask[row, real:] = 1, 0
    return tokens, mask


def theirs(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask))
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def ours(loaded: models.Loaded, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    out = loaded.model.apply({"params": loaded.params}, tokens, attention_mask=mask)
    return np.asarray(getattr(out, "hidden", out))


def assert_same(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> None:
    """Equal where there is a real token; a classifier's logits (batch, labels) everywhere."""
    assert a.shape == b.shape
    if a.ndim == 3:
        a, b = a[mask.astype(bool)], b[mask.astype(bool)]
    assert np.ptp(a) > 1, "logits this flat would agree whatever the weights are"
    np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_both_ways(name: str, tmp_path: pathlib.Path) -> None:
    model = oracle(name)
    model.save_pretrained(tmp_path / "theirs")
    loaded = models.load(tmp_path / "theirs")
    assert loaded.fresh == ()
    tokens, mask = batch()
    expected = theirs(model, tokens, mask)
    assert_same(ours(loaded, tokens, mask), expected, mask)

    models.save(loaded.params, loaded.config, tmp_path / "ours")
    back, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same(theirs(back.eval(), tokens, mask), expected, mask)


@pytest.mark.parametrize("name", ["bert-classify", "llama3", "mistral", "qwen3"])
def test_scanned_layers_load_to_the_same_logits(name: str, tmp_path: pathlib.Path) -> None:
    model = oracle(name)
    model.save_pretrained(tmp_path)
    tokens, mask = batch()
    loaded = models.load(tmp_path, scan_layers=True, remat="full")
    assert_same(ours(loaded, tokens, mask), theirs(model, tokens, mask), mask)


@pytest.mark.parametrize("name", ["bert-encoder", "roberta-encoder"])
def test_pooled_output_equals(name: str, tmp_path: pathlib.Path) -> None:
    model = oracle(name)
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    tokens, mask = batch()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).pooler_output.numpy()
    pooled = loaded.model.apply({"params": loaded.params}, tokens, attention_mask=mask).pooled
    np.testing.assert_allclose(pooled, expected, atol=TOLERANCE)


def test_token_types_equal(tmp_path: pathlib.Path) -> None:
    model = oracle("bert-classify")
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    tokens, mask = batch()
    types = (np.arange(LENGTH) > 4).astype(np.int64)[None].repeat(BATCH, 0)
    with torch.no_grad():
        expected = model(torch.tensor(tokens), torch.tensor(mask), torch.tensor(types)).logits.numpy()
    logits = loaded.model.apply({"params": loaded.params}, tokens, attention_mask=mask, token_types=types)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_encoder_loads_from_a_checkpoint_with_another_head(tmp_path: pathlib.Path) -> None:
    model = oracle("bert-mlm")
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path, task="encoder")
    tokens, mask = batch()
    assert_same(ours(loaded, tokens, mask), theirs(model.bert, tokens, mask), mask)
    assert all(name.startswith("cls.") for name in loaded.ignored)


@pytest.mark.parametrize("name", ["llama2", "mistral", "mixtral", "qwen3"])
@pytest.mark.parametrize("left", [False, True])
def test_greedy_generation_equals(name: str, left: bool, tmp_path: pathlib.Path) -> None:
    model = oracle(name)
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    tokens = np.random.default_rng(1).integers(5, 97, (2, 7))
    mask = np.ones_like(tokens)
    if left:
        tokens[1, :3], mask[1, :3] = 0, 0
    expected = model.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    got = models.generate(loaded.model, loaded.params, tokens, attention_mask=mask, max_new_tokens=12)
    np.testing.assert_array_equal(got, expected)


def test_bfloat16_weights_survive_loading_and_saving(tmp_path: pathlib.Path) -> None:
    model = oracle("llama2").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    loaded = models.load(tmp_path / "theirs", param_dtype=jax.numpy.bfloat16, scan_layers=True)
    models.save(loaded.params, loaded.config, tmp_path / "ours")
    back = type(model).from_pretrained(tmp_path / "ours", dtype="auto")
    assert back.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_published_minilm_equals() -> None:
    from lowrank_jax import assets

    try:
        directory = assets.fetch("minilm")
    except assets.AssetError as error:
        if "SHA-256" in str(error):
            raise
        pytest.skip(f"the pinned weights cannot be fetched: {error}")
    model = transformers.AutoModel.from_pretrained(directory).eval()
    loaded = models.load(directory)
    tokens = np.random.default_rng(2).integers(1000, 30000, (2, 24))
    mask = np.ones_like(tokens)
    mask[1, 15:] = 0
    assert_same(ours(loaded, tokens, mask), theirs(model, tokens, mask), mask)
