"""The parameter trees of the models: building a model, its shapes, its logical axes, and stacking layers for a scan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from lowrank_jax.models.bert import Bert
from lowrank_jax.models.bert_config import BertConfig
from lowrank_jax.models.llama import Llama
from lowrank_jax.models.llama_config import LlamaConfig

Config = BertConfig | LlamaConfig
Axes = tuple[str | None, ...]

# The first match decides. 'kernel' is (in, out); a bias has the last axis of its kernel. None is never sharded: a name may
# not stand twice in one array, and short axes are not worth it.
_AXES: tuple[tuple[str, Axes], ...] = (
    (r"(embed_tokens|word_embeddings)/embedding$", ("vocab", "embed")),
    (r"(position|token_type)_embeddings/embedding$", (None, "embed")),
    (r"lm_head/kernel$", ("embed", "vocab")),
    (r"mlm_head/bias$", ("vocab",)),
    (r"attention/(q_proj|query)/kernel$", ("embed", "heads")),
    (r"attention/(k_proj|v_proj)/kernel$", ("embed", "kv_heads")),
    (r"attention/(key|value)/kernel$", ("embed", "heads")),
    (r"attention/(o_proj|output)/kernel$", ("heads", "embed")),
    (r"attention/[qk]_norm/scale$", ("head_dim",)),
    (r"moe/router/kernel$", ("embed", None)),
    (r"moe/experts/(gate_proj|up_proj)/kernel$", ("experts", "embed", "mlp")),
    (r"moe/experts/down_proj/kernel$", ("experts", "mlp", "embed")),
    (r"mlp/(gate_proj|up_proj|intermediate)/kernel$", ("embed", "mlp")),
    (r"mlp/(down_proj|output)/kernel$", ("mlp", "embed")),
    (r"(pooler|mlm_head/dense|classifier/dense)/kernel$", ("embed", None)),
    (r"classifier(/out_proj)?/kernel$", ("embed", "classes")),
    (r"norm/(scale|bias)$", ("embed",)),
)


def build(config: Config) -> nn.Module:
    """Returns the Linen model of a configuration.

    Example:
      >>> type(build(LlamaConfig.tiny())).__name__
      'Llama'
    """
    return Llama(config) if isinstance(config, LlamaConfig) else Bert(config)


def param_shapes(config: Config) -> dict[str, Any]:
    """Returns the parameter tree as `jax.ShapeDtypeStruct` leaves, without computing anything.

    Example:
      >>> param_shapes(LlamaConfig.tiny())["norm"]["scale"].shape
      (64,)
    """
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(build(config).init, jax.random.key(0), tokens)["params"]


def logical_axes(config: Config) -> dict[str, Any]:
    """Names the axes of every parameter, to be mapped to the axes of a device mesh.

    Names: 'layers', 'experts', 'vocab', 'embed', 'mlp', 'heads', 'kv_heads', 'head_dim', 'classes'; None for an axis kept whole. 'heads'
    and 'kv_heads' name the product heads x head_dim, as projections are kept as matrices.

    Returns:
      A tree with the structure of the parameters and a tuple of names in the place of each array.

    Example:
      >>> logical_axes(LlamaConfig.tiny(scan_layers=True))["layers"]["mlp"]["down_proj"]["kernel"]
      ('layers', 'mlp', 'embed')
    """
    shapes = traverse_util.flatten_dict(param_shapes(config), sep="/")
    return traverse_util.unflatten_dict({path: _axes_of(path) for path in shapes}, sep="/")


def _axes_of(path: str) -> Axes:
    leading: Axes = ("layers",) if re.search(r"(^|/)layers/", path) else ()
    for pattern, axes in _AXES:
        if re.search(pattern, path):
            return leading + axes
    if path.endswith("/bias"):
        return leading + _axes_of(re.sub(r"bias$", "kernel", path))[-1:]
    raise KeyError(f"no logical axes are known for parameter {path!r}")


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns `layers_0`, `layers_1`, ... into one `layers` with a leading layer axis, as `scan_layers=True` expects.

    Args:
      params: a parameter tree; it is not changed. Both layouts exist in memory until the caller drops one.

    Raises:
      ValueError: the numbers of the layers have a gap, or layers differ in structure.

    Example:
      >>> stack_layers({"layers_0": {"w": jnp.ones(2)}, "layers_1": {"w": jnp.ones(2)}})["layers"]["w"].shape
      (2, 2)
    """
    out: dict[str, Any] = {}
    numbered: dict[int, Any] = {}
    for name, value in params.items():
        match = re.fullmatch(r"layers_(\d+)", name)
        if match:
            numbered[int(match[1])] = value
        else:
            out[name] = stack_layers(value) if isinstance(value, Mapping) else value
    if numbered:
        if sorted(numbered) != list(range(len(numbered))):
            raise ValueError(f"cannot stack layers numbered {sorted(numbered)}: expected 0 to {len(numbered) - 1}")
        out["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(numbered[i] for i in range(len(numbered))))
    return out


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`: `layers` with a leading layer axis becomes `layers_0`, `layers_1`, ...

    Args:
      params: a parameter tree; it is not changed.

    Raises:
      ValueError: the leaves under `layers` disagree on the number of layers.

    Example:
      >>> sorted(unstack_layers({"layers": {"w": jnp.ones((2, 3))}}))
      ['layers_0', 'layers_1']
    """
    out: dict[str, Any] = {}
    for name, value in params.items():
        if name != "layers":
            out[name] = unstack_layers(value) if isinstance(value, Mapping) else value
            continue
        counts = {leaf.shape[0] for leaf in jax.tree.leaves(value)}
        if len(counts) != 1:
            raise ValueError(f"leaves under 'layers' have leading axes {sorted(counts)}: expected one number of layers")
        for i in range(counts.pop()):
            out[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], value)
    return out
