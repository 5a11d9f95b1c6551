"""The peer of bench/throughput.py: google-tunix's Llama with qwix's LoRA, as its PeftTrainer updates it, on our weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer, utils

from lowrank_jax import flops, models

SITES = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def build(config: models.LlamaConfig, params: Any) -> llama3.Llama3:
    """Its model of our configuration, holding our weights (of scanned layers)."""
    shapes = llama3.ModelConfig(
        num_layers=config.num_hidden_layers, vocab_size=config.vocab_size, embed_dim=config.hidden_size,
        hidden_dim=config.intermediate_size, num_heads=config.num_attention_heads, head_dim=config.width,
        num_kv_heads=config.num_key_value_heads, rope_theta=int(config.rope_theta), norm_eps=config.rms_norm_eps,
    )  # fmt: skip
    model = llama3.Llama3(shapes, rngs=nnx.Rngs(0))
    put(model.embedder.input_embedding, params["embed_tokens"]["embedding"])
    put(model.final_norm.w, params["norm"]["scale"])
    put(model.lm_head.w, params["lm_head"]["kernel"])
    for n, layer in enumerate(model.layers):
        own = jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"])
        put(layer.input_layernorm.w, own["input_norm"]["scale"])
        put(layer.post_attention_layernorm.w, own["post_attention_norm"]["scale"])
        for name, module in own["attention"].items():
            put(getattr(layer.attn, name).w, module["kernel"])
        for name, module in own["mlp"].items():
            put(getattr(layer.mlp, name).kernel, module["kernel"])
    return model


def put(variable: nnx.Variable, weight: jax.Array) -> None:
    """Sets a variable; its heads have axes of their own."""
    variable.set_value(weight.reshape(variable.get_value().shape))


def model_input(example: peft_trainer.TrainingInput) -> dict[str, Any]:
    """What its own command line makes of a batch; token 0 is padding."""
    real = example.input_tokens != 0
    return {
        "input_tokens": example.input_tokens, "input_mask": example.input_mask,
        "positions": utils.build_positions_from_mask(real), "attention_mask": utils.make_causal_attn_mask(real),
    }  # fmt: skip


def sparse_loss(model: Any, input_tokens: Any, input_mask: Any, positions: Any, attention_mask: Any) -> jax.Array:
    """The mean cross-entropy, as `train.tasks` has it: without the one-hot targets of tunix's own."""
    logits, _ = model(input_tokens, positions, None, attention_mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], input_tokens[:, 1:])
    return jnp.sum(losses * input_mask[:, 1:]) / jnp.sum(input_mask[:, 1:])


def lora(
    config: models.LlamaConfig,
    params: Any,
    tx: optax.GradientTransformation,
    rank: int,
    batch: dict[str, np.ndarray],
    our_loss: bool,
) -> tuple[Callable[[dict[str, np.ndarray]], jax.Array], float]:
    """Its update, as `PeftTrainer.train` calls it (compiled, graph cached, buffers donated), and the FLOPs of its products."""
    provider = qwix.LoraProvider(module_path=SITES, rank=rank, alpha=float(rank))
    plain = build(config, params)
    model = qwix.apply_lora_to_model(plain, provider, rngs=nnx.Rngs(1), **plain.get_model_input())
    trainer = peft_trainer.PeftTrainer(model, tx, peft_trainer.TrainingConfig(eval_every_n_steps=1, max_steps=None))
    trainer = trainer.with_gen_model_input_fn(model_input)
    if our_loss:
        trainer = trainer.with_loss_fn(sparse_loss)
    graph, state = nnx.split((trainer.model, trainer.optimizer))

    def pure(state: Any, example: peft_trainer.TrainingInput) -> Any:
        own = nnx.merge(graph, state)
        return trainer.create_train_step_fn()(*own, example), nnx.state(own)

    products = flops.count(pure, state, example_of(batch))
    update, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    return lambda batch: update(example_of(batch))[0], products


def example_of(batch: dict[str, np.ndarray]) -> peft_trainer.TrainingInput:
    """Our batch as its trainer takes it."""
    return peft_trainer.TrainingInput(input_tokens=batch["tokens"], input_mask=batch["loss_mask"])
