"""Reference models for low-rank adaptation, in Flax Linen: the BERT and the Llama family, with published weights.

`load` reads a checkpoint of the Hugging Face layout, `save` writes one. `build` makes a model from a configuration.
"""

from lowrank_jax.models.bert import Bert, EncoderOutput, mean_pool
from lowrank_jax.models.configs import (
    BertConfig,
    LlamaConfig,
    ModelConfig,
    ModelConfigError,
    RopeScaling,
    from_hf,
    llama2_7b,
    llama2_13b,
    llama2_70b,
    minilm_l6,
    mixtral_8x7b,
    roberta_base,
    smollm2_135m,
)
from lowrank_jax.models.generate import generate, stream
from lowrank_jax.models.hf import CheckpointError, Loaded, load
from lowrank_jax.models.hf_save import save
from lowrank_jax.models.llama import Llama, init_cache
from lowrank_jax.models.llama_parts import join_layers, llama_parts, split_layers
from lowrank_jax.models.llama_sizes import GALORE_RANKS, galore_paper
from lowrank_jax.models.tokenizer_training import train_tokenizer
from lowrank_jax.models.trees import build, logical_axes, param_shapes, stack_layers, unstack_layers

__all__ = [
    "GALORE_RANKS",
    "galore_paper",
    "join_layers",
    "llama_parts",
    "split_layers",
    "train_tokenizer",
    "Bert",
    "BertConfig",
    "CheckpointError",
    "EncoderOutput",
    "Llama",
    "LlamaConfig",
    "Loaded",
    "ModelConfig",
    "ModelConfigError",
    "RopeScaling",
    "build",
    "from_hf",
    "generate",
    "init_cache",
    "llama2_7b",
    "llama2_13b",
    "llama2_70b",
    "load",
    "logical_axes",
    "mean_pool",
    "minilm_l6",
    "mixtral_8x7b",
    "param_shapes",
    "roberta_base",
    "save",
    "smollm2_135m",
    "stack_layers",
    "stream",
    "unstack_layers",
]
