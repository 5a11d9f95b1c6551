"""What every model configuration shares: how the model runs, and how a config.json is read.

The architecture is a property of the checkpoint; how it runs (compute type, scan over layers, rematerialisation) is a choice
of the user. Both live in one frozen dataclass, so that a model is a function of its config alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank_jax import remat as adapter_remat

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}

_POLICIES: Mapping[str, str] = {
    # Keeps the products with weights and recomputes the batched ones, whose (tokens x tokens) results are the large ones.
    "dots": "dots_with_no_batch_dims_saveable",
    "full": "nothing_saveable",
}
_FROZEN_BASE = {"adapter": False, "adapter_offload": True}
# The other attributes of jax.checkpoint_policies are functions that make a policy and need arguments of their own.
_PLAIN_POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)


class ModelConfigError(ValueError):
    """A configuration asks for something these models do not compute."""


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the activation that Hugging Face configurations call `name`.

    Args:
      name: such as 'gelu' (exact, by erf), 'gelu_new' (by tanh), 'silu'.

    Raises:
      ModelConfigError: the name is unknown.

    Example:
      >>> float(activation("relu")(jnp.float32(-1.0)))
      0.0
    """
    if name not in ACTIVATIONS:
        raise ModelConfigError(f"hidden_act={name!r} is not supported; expected one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def remat_policy(name: str) -> Callable[..., bool]:
    """Returns the checkpoint policy behind a `remat` setting other than 'none'.

    Args:
      name: 'full' (saves nothing inside a layer), 'dots' (saves products with weights), 'adapter' or 'adapter_offload' (for frozen
        bases: `lowrank_jax.remat.policy`) or the name of a plain policy in `jax.checkpoint_policies`.

    Raises:
      ModelConfigError: the name is unknown.

    Example:
      >>> remat_policy("full") is jax.checkpoint_policies.nothing_saveable
      True
    """
    if name in _FROZEN_BASE:
        return adapter_remat.policy(offload=_FROZEN_BASE[name])
    policy = _POLICIES.get(name, name)
    if policy not in _PLAIN_POLICIES:
        raise ModelConfigError(
            f"remat={name!r} is not supported; expected 'none', 'full', 'dots', 'adapter', 'adapter_offload' or one of "
            f"{list(_PLAIN_POLICIES)}"
        )
    return getattr(jax.checkpoint_policies, policy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """How a model runs, common to every architecture.

    Attributes:
      scan_layers: one compiled layer run by `nn.scan` over parameters with a leading layer axis (True), or a Python loop.
      remat: 'none', or a policy of `remat_policy` for what each layer keeps for the backward pass: 'full', 'dots', 'adapter',
        'adapter_offload' or the name of a plain policy in `jax.checkpoint_policies`.
      dtype: type of the activations.
      param_dtype: type of the stored parameters.
      attention_implementation: of `jax.nn.dot_product_attention`: None, 'xla' or 'cudnn' (NVIDIA GPUs, 16-bit types); or 'splash' (TPUs,
        causal models, see `lowrank_jax.models.splash`; with a cache it is as None).

    Raises:
      ModelConfigError: from the constructor, if `remat` or `attention_implementation` is unknown.
    """

    scan_layers: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    attention_implementation: Literal["xla", "cudnn", "splash"] | None = None

    def __post_init__(self) -> None:
        if self.remat != "none":
            remat_policy(self.remat)
        if self.attention_implementation not in (None, "xla", "cudnn", "splash"):
            raise ModelConfigError(
                f"attention_implementation={self.attention_implementation!r}: expected None, 'xla', 'cudnn' or 'splash'"
            )

    @property
    def library_attention(self) -> Literal["xla", "cudnn"] | None:
        """What `jax.nn.dot_product_attention` is asked for where splash attention does not apply: with a cache."""
        return None if self.attention_implementation == "splash" else self.attention_implementation


def check_multiple(name: str, value: int, of_name: str, of: int) -> None:
    """Raises ModelConfigError unless `value` is a positive multiple of `of`.

    Example:
      >>> check_multiple("hidden_size", 64, "num_attention_heads", 4)
    """
    if of <= 0 or value <= 0 or value % of:
        raise ModelConfigError(f"{name}={value} must be a positive multiple of {of_name}={of}")


def present(hf: Mapping[str, Any], names: tuple[str, ...], architecture: str) -> dict[str, Any]:
    """Picks `names` out of a config.json, each of which must be there.

    Args:
      hf: the parsed config.json.
      names: keys without which the shapes of the model are unknown.
      architecture: for the message.

    Raises:
      ModelConfigError: a key is missing.

    Example:
      >>> present({"vocab_size": 8, "x": 1}, ("vocab_size",), "bert")
      {'vocab_size': 8}
    """
    missing = [name for name in names if hf.get(name) is None]
    if missing:
        raise ModelConfigError(f"the config.json of this {architecture} model lacks {missing}; is it complete?")
    return {name: hf[name] for name in names}
