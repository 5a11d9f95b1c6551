"""Configuration of the BERT family: BERT, MiniLM (a small BERT) and RoBERTa."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowrank_jax.models.config_base import ModelConfig, ModelConfigError, activation, check_multiple, present

TASKS = ("encoder", "classify", "mlm")
_CLASSES = {"encoder": "Model", "classify": "ForSequenceClassification", "mlm": "ForMaskedLM"}
_STEM = {"bert": "Bert", "roberta": "Roberta"}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_OPTIONAL = (
    "type_vocab_size",
    "hidden_act",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "pad_token_id",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """A BERT or RoBERTa encoder with one of three heads. Field names are those of the published config.json files.

    BERT: Pre-training of Deep Bidirectional Transformers (arXiv 1810.04805); RoBERTa (arXiv 1907.11692); MiniLM
    (arXiv 2002.10957).

    Attributes:
      architecture: 'bert' or 'roberta' (positions counted from pad_token_id + 1, another classification head).
      task: 'encoder' (hidden states), 'classify' (logits of num_labels classes), 'mlm' (logits over the vocabulary).
      num_labels: classes of the 'classify' head; 1 means regression.
      classifier_pooling: what 'classify' reads: 'cls' (the first token, through the published head of the architecture) or
        'mean' (the average of the real tokens, as sentence encoders are trained).
      use_pooler: 'encoder' only: whether the dense tanh layer on the first token exists.
      classifier_dropout: dropout before the classifier; None means hidden_dropout_prob.

    Raises:
      ModelConfigError: from the constructor, naming the field.

    Example:
      >>> BertConfig.tiny(task="classify", num_labels=3).head_dim
      16
    """

    architecture: str = "bert"
    task: str = "encoder"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    pad_token_id: int = 0
    num_labels: int = 2
    classifier_pooling: str = "cls"
    use_pooler: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value, allowed in (
            ("architecture", self.architecture, tuple(_STEM)),
            ("task", self.task, TASKS),
            ("classifier_pooling", self.classifier_pooling, ("cls", "mean")),
        ):
            if value not in allowed:
                raise ModelConfigError(f"BertConfig.{field}={value!r}: expected one of {list(allowed)}")
        if self.attention_implementation == "splash":
            raise ModelConfigError(
                "BertConfig.attention_implementation='splash': expected None, 'xla' or 'cudnn'; splash attention is causal"
            )
        if self.num_labels < 1:
            raise ModelConfigError(f"BertConfig.num_labels={self.num_labels}: expected at least 1")
        activation(self.hidden_act)
        check_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_pooler(self) -> bool:
        """Whether the parameters contain `pooler`."""
        if self.task == "encoder":
            return self.use_pooler
        return self.task == "classify" and self.architecture == "bert" and self.classifier_pooling == "cls"

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> BertConfig:
        """Reads a parsed config.json.

        Args:
          hf: the parsed file; its 'architectures' decide the task unless `overrides` has one.
          **overrides: fields of this class that win over the file.

        Raises:
          ModelConfigError: the file describes a model that this family does not compute, or lacks a size.

        Example:
          >>> BertConfig.from_hf(BertConfig.tiny(task="mlm").to_hf()).task
          'mlm'
        """
        architecture = hf.get("model_type")
        if architecture not in _STEM:
            raise ModelConfigError(
                f"model_type={architecture!r} is not of the BERT family; expected one of {sorted(_STEM)}"
            )
        if hf.get("position_embedding_type", "absolute") != "absolute":
            raise ModelConfigError(
                f"position_embedding_type={hf['position_embedding_type']!r} is not supported; expected 'absolute'"
            )
        if hf.get("is_decoder") or hf.get("add_cross_attention"):
            raise ModelConfigError("is_decoder and add_cross_attention are not supported; these models are encoders")
        fields = present(hf, _REQUIRED, architecture)
        fields["pad_token_id"] = 1 if architecture == "roberta" else 0
        fields |= {name: hf[name] for name in _OPTIONAL if hf.get(name) is not None}
        fields["classifier_dropout"] = hf.get("classifier_dropout")
        fields["classifier_pooling"] = hf.get("classifier_pooling", "cls")
        fields["num_labels"] = _num_labels(hf)
        fields["task"] = _task(hf)
        return cls(**({"architecture": architecture, **fields} | overrides))

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a config.json that transformers reads back as the same model.

        Example:
          >>> BertConfig.tiny().to_hf()["architectures"]
          ['BertModel']
        """
        mean = self.task == "classify" and self.classifier_pooling == "mean"
        # No class of transformers pools by the mean: naming a wrong one would silently compute something else there.
        suffix = "Model" if mean else _CLASSES[self.task]
        names = _REQUIRED + _OPTIONAL + ("classifier_dropout",)
        out: dict[str, Any] = {name: getattr(self, name) for name in names}
        out |= {
            "model_type": self.architecture,
            "architectures": [_STEM[self.architecture] + suffix],
            "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
        }
        if mean:
            out["classifier_pooling"] = "mean"
        if self.task == "classify":
            out["id2label"] = {str(i): f"LABEL_{i}" for i in range(self.num_labels)}
            out["label2id"] = {f"LABEL_{i}": i for i in range(self.num_labels)}
        return out

    @classmethod
    def tiny(cls, **overrides: Any) -> BertConfig:
        """A model of a few thousand parameters, for tests and examples.

        Example:
          >>> BertConfig.tiny().num_hidden_layers
          2
        """
        small: dict[str, Any] = {
            "vocab_size": 97,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "max_position_embeddings": 40,
        }
        if overrides.get("architecture") == "roberta":
            small |= {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
        return cls(**(small | overrides))


def _num_labels(hf: Mapping[str, Any]) -> int:
    labels = hf.get("id2label")
    return len(labels) if labels else int(hf.get("num_labels", 2))


def _task(hf: Mapping[str, Any]) -> str:
    """The task that 'architectures' of a config.json names; 'encoder' where it names none."""
    if hf.get("classifier_pooling") == "mean":
        return "classify"
    named = (hf.get("architectures") or [""])[0]
    if named.endswith("ForPreTraining"):
        return "mlm"
    for task, suffix in _CLASSES.items():
        if named in ("", _STEM[hf["model_type"]] + suffix):
            return task
    raise ModelConfigError(
        f"architectures={[named]} has a head that is not supported; pass task= one of {list(TASKS)} to load its encoder"
    )
