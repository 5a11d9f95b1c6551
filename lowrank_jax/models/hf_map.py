"""Which Hugging Face tensor is which of our parameters, both ways, for every architecture.

The correspondence is a table of `Entry`, derived from a configuration; loading and saving only walk it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from flax import traverse_util

from lowrank_jax.models.bert_config import BertConfig
from lowrank_jax.models.llama_config import LlamaConfig
from lowrank_jax.models.trees import Config, param_shapes


class Entry(NamedTuple):
    """One parameter of ours and its tensors.

    Attributes:
      path: ours, in the layout of `config.scan_layers`, joined by '/'.
      names: the tensors' names without the prefix of the base model, one for each matrix or vector.
      transpose: a tensor is (out, in), ours (in, out).
      stacked: ours has a leading axis of layers. experts: behind it one of so many experts; 0: none. The names go layer by layer, and in
        each expert by expert.
    """

    path: str
    names: tuple[str, ...]
    transpose: bool
    stacked: bool
    experts: int = 0


_LLAMA_TOP = {"embed_tokens": "embed_tokens", "norm": "norm", "lm_head": "lm_head"}
_LLAMA_LAYER = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "mlp": "mlp",
    "moe/router": "block_sparse_moe.gate",
    "moe/experts/gate_proj": "block_sparse_moe.experts.{}.w1",
    "moe/experts/down_proj": "block_sparse_moe.experts.{}.w2",
    "moe/experts/up_proj": "block_sparse_moe.experts.{}.w3",
}
_BERT_TOP = {
    "embeddings/norm": "embeddings.LayerNorm",
    "embeddings": "embeddings",
    "pooler": "pooler.dense",
    "classifier": "classifier",
}
_BERT_LAYER = {
    "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "attention": "attention.self",
    "mlp/intermediate": "intermediate.dense",
    "mlp/output": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_MLM = {
    "bert": {
        "mlm_head/dense": "cls.predictions.transform.dense",
        "mlm_head/norm": "cls.predictions.transform.LayerNorm",
        "mlm_head": "cls.predictions",
    },
    "roberta": {"mlm_head/dense": "lm_head.dense", "mlm_head/norm": "lm_head.layer_norm", "mlm_head": "lm_head"},
}
_HEADS = r"(lm_head|classifier|cls)\."
_PREFIX = {"bert": "bert.", "roberta": "roberta."}
# Buffers, copies of tied weights and heads of other tasks. Everything else that is left over is an error.
_IGNORED = re.compile(
    r"embeddings\.(position_ids|token_type_ids)$|.*rotary_emb\.inv_freq$|cls\.seq_relationship\..*"
    r"|cls\.predictions\.decoder\..*|lm_head\.decoder\..*"
)


def entries(config: Config) -> list[Entry]:
    """Returns the correspondence for every parameter of the model.

    Args:
      config: architecture, task and layout.

    Example:
      >>> entries(LlamaConfig.tiny())[0].names
      ('embed_tokens.weight',)
    """
    shapes = traverse_util.flatten_dict(param_shapes(config), sep="/")
    return [_entry(config, path) for path in shapes]


def hf_name(config: Config, name: str) -> str:
    """Adds the prefix of the base model that a whole model with a head has, the name under which a tensor is saved.

    Example:
      >>> hf_name(LlamaConfig.tiny(), "norm.weight")
      'model.norm.weight'
    """
    if re.match(_HEADS, name):
        return name
    if isinstance(config, LlamaConfig):
        return "model." + name
    # An encoder alone is saved without; so is a mean-pooled classifier, whose file transformers reads as an encoder.
    plain = config.task == "encoder" or (config.task == "classify" and config.classifier_pooling == "mean")
    return name if plain else _PREFIX[config.architecture] + name


def canonical(name: str) -> str:
    """Brings a tensor's name to the spelling of `Entry.names`: without prefix, with the present names of norm weights.

    Example:
      >>> canonical("bert.embeddings.LayerNorm.gamma")
      'embeddings.LayerNorm.weight'
    """
    name = re.sub(r"^(bert|roberta|model)\.", "", name)
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))


def ignorable(config: Config, name: str) -> bool:
    """Tells whether a tensor that no parameter wants may be left unread: a buffer, a tied copy, or another task's head.

    Args:
      config: the model that is being loaded.
      name: in the spelling of `canonical`.

    Example:
      >>> ignorable(LlamaConfig.tiny(), "layers.0.self_attn.rotary_emb.inv_freq")
      True
    """
    if _IGNORED.match(name):
        return True
    if isinstance(config, LlamaConfig):
        return name == "lm_head.weight" and config.tie_word_embeddings
    return re.match(r"(cls|lm_head|classifier|pooler)\.", name) is not None


def may_be_fresh(path: str) -> bool:
    """Tells whether a parameter belongs to a head, which a checkpoint of another task does not hold.

    Example:
      >>> may_be_fresh("classifier/kernel"), may_be_fresh("norm/scale")
      (True, False)
    """
    return path.split("/")[0] in ("pooler", "classifier", "mlm_head")


def _entry(config: Config, path: str) -> Entry:
    match = re.match(r"(?:encoder/)?layers(?:_(\d+))?/(.*)", path)
    module, _, leaf = (match[2] if match else path).rpartition("/")
    if isinstance(config, BertConfig):
        table = _BERT_LAYER if match else _BERT_TOP | _MLM[config.architecture]
        stem = "encoder.layer"
    else:
        table = _LLAMA_LAYER if match else _LLAMA_TOP
        stem = "layers"
    name = f"{_rename(module, table)}.{'bias' if leaf == 'bias' else 'weight'}"
    if not match:
        return Entry(path, (name,), leaf == "kernel", stacked=False)
    stacked = match[1] is None
    numbers = range(config.num_hidden_layers) if stacked else (int(match[1]),)
    experts = config.num_local_experts if isinstance(config, LlamaConfig) and "{}" in name else 0
    names = tuple(f"{stem}.{i}.{name}".format(e) for i in numbers for e in range(experts or 1))
    return Entry(path, names, leaf == "kernel", stacked, experts)


def _rename(module: str, table: dict[str, str]) -> str:
    """Translates the longest known head of a module's path; the rest keeps its words."""
    known = [head for head in table if module == head or module.startswith(head + "/")]
    head = max(known, key=len)
    return table[head] + module[len(head) :].replace("/", ".")
