"""Configurations: what a config.json becomes, what is refused, and the trees that follow from it."""

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from lowrank_jax import models
from lowrank_jax.models import BertConfig, LlamaConfig, ModelConfigError, RopeScaling

LLAMA3 = RopeScaling(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
ROUND_TRIPS = [
    BertConfig.tiny(),
    BertConfig.tiny(task="classify", num_labels=5, classifier_dropout=0.3),
    BertConfig.tiny(task="classify", classifier_pooling="mean"),
    BertConfig.tiny(task="mlm", architecture="roberta", hidden_act="gelu_new"),
    LlamaConfig.tiny(rope_scaling=LLAMA3, rope_theta=5e5),
    LlamaConfig.tiny(rope_scaling=RopeScaling(kind="linear", factor=4.0), tie_word_embeddings=True),
    LlamaConfig.tiny(qkv_bias=True, out_bias=True, mlp_bias=True),
    LlamaConfig.tiny(architecture="mistral", sliding_window=7),
    LlamaConfig.tiny(architecture="mistral"),
    LlamaConfig.tiny(architecture="mixtral", num_local_experts=4, num_experts_per_tok=3),
    LlamaConfig.tiny(architecture="qwen2", qkv_bias=True),
    LlamaConfig.tiny(architecture="qwen2", qkv_bias=True, sliding_window=5),
    LlamaConfig.tiny(architecture="qwen3", qk_norm=True, head_dim=24),
]


@pytest.mark.parametrize("config", ROUND_TRIPS, ids=lambda c: c.architecture)
def test_to_and_from_a_config_file(config) -> None:
    back = models.from_hf(config.to_hf())
    # The file spells out the width of a head where ours may leave it to be derived.
    assert back.to_hf() == config.to_hf()
    assert jax.tree.map(lambda s: s.shape, models.param_shapes(back)) == jax.tree.map(
        lambda s: s.shape, models.param_shapes(config)
    )


def test_the_old_spelling_of_rope_is_read() -> None:
    hf = LlamaConfig.tiny().to_hf()
    del hf["rope_parameters"]
    hf |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 3.0}}
    config = LlamaConfig.from_hf(hf)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(kind="linear", factor=3.0)


def test_mistral_without_the_key_has_the_published_window() -> None:
    hf = LlamaConfig.tiny(architecture="mistral").to_hf()
    assert LlamaConfig.from_hf(hf).sliding_window is None
    del hf["sliding_window"]
    assert LlamaConfig.from_hf(hf).sliding_window == 4096


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "gpt2.*expected one of"),
        ({"hidden_act": "mish"}, "mish"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn.*llama3"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_llama_files_that_are_refused(changes, words: str) -> None:
    with pytest.raises(ModelConfigError, match=words):
        models.from_hf(LlamaConfig.tiny().to_hf() | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "mish"}, "mish"),
        ({"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering.*task="),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
    ],
)
def test_bert_files_that_are_refused(changes, words: str) -> None:
    with pytest.raises(ModelConfigError, match=words):
        models.from_hf(BertConfig.tiny().to_hf() | changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LlamaConfig.tiny(remat="some"), "remat='some'"),
        (lambda: LlamaConfig.tiny(remat="save_only_these_names"), "remat"),
        (lambda: LlamaConfig.tiny(attention_implementation="flash"), "attention_implementation"),
        (lambda: LlamaConfig.tiny(sliding_window=0), "sliding_window"),
        (lambda: LlamaConfig.tiny(head_dim=7), "even"),
        (lambda: LlamaConfig.tiny(architecture="gemma"), "architecture"),
        (lambda: LlamaConfig.tiny(rope_scaling=RopeScaling(kind="yarn", factor=2.0)), "yarn"),
        (lambda: BertConfig.tiny(task="qa"), "task='qa'"),
        (lambda: BertConfig.tiny(num_labels=0), "num_labels"),
        (lambda: BertConfig.tiny(classifier_pooling="max"), "classifier_pooling"),
    ],
)
def test_fields_that_are_refused(make, words: str) -> None:
    with pytest.raises(ModelConfigError, match=words):
        make()


def test_mixed_windows_are_refused() -> None:
    hf = LlamaConfig.tiny(architecture="qwen2", qkv_bias=True, sliding_window=4).to_hf()
    with pytest.raises(ModelConfigError, match="sliding window"):
        models.from_hf(hf | {"max_window_layers": 1})


def test_what_an_architecture_cannot_express_is_not_written() -> None:
    with pytest.raises(ModelConfigError, match="qkv_bias=True"):
        LlamaConfig.tiny(qkv_bias=True).to_hf()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("config", ROUND_TRIPS, ids=lambda c: c.architecture)
def test_every_axis_of_every_parameter_has_a_name(config, scan: bool) -> None:
    config = models.from_hf(config.to_hf(), scan_layers=scan)
    shapes = traverse_util.flatten_dict(models.param_shapes(config))
    axes = traverse_util.flatten_dict(models.logical_axes(config))
    assert shapes.keys() == axes.keys()
    sizes = {"layers": 2, "vocab": 97, "embed": 64, "mlp": 96, "classes": getattr(config, "num_labels", 0)}
    for path, names in axes.items():
        assert len(names) == len(shapes[path].shape), path
        named = [name for name in names if name]
        assert len(set(named)) == len(named), f"{path}: a mesh axis may stand once in an array"
        for name, size in zip(names, shapes[path].shape, strict=True):
            assert sizes.get(name, size) == size, (path, name)


def test_layers_with_gaps_or_disagreement_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        models.stack_layers({"layers_0": {"w": jnp.ones(1)}, "layers_2": {"w": jnp.ones(1)}})
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        models.unstack_layers({"layers": {"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}})
