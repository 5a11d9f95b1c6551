"""Continues a prompt: python -m train.generate --adapter=runs/x/adapter --prompt="..." [--chat], or --model=runs/pretrain_x/model"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from train import cli

_ADAPTER = flags.DEFINE_string("adapter", None, "The directory of an adapter that train.finetune wrote.")
_MODEL = flags.DEFINE_string(
    "model", None, "A causal language model without an adapter: an asset, directory, GGUF file or name on the hub."
)
_PROMPT = flags.DEFINE_string("prompt", None, "What to continue.")
_CHAT = flags.DEFINE_bool("chat", None, "Use the model's chat template; by default as in training.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "The most to add.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most probable token.", lower_bound=0.0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus sampling.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")
_BASE = flags.DEFINE_bool("base", False, "Use the base without the adapter, for comparison.")


def main() -> None:
    """Writes the continuation as it comes."""
    from train import base, saved

    if not _PROMPT.value:
        raise ValueError("--prompt is missing.")
    if _MODEL.value:
        if _ADAPTER.value:
            raise ValueError("--model and --adapter: expected one of them; an adapter knows its model.")
        model = saved.plain_model(_MODEL.value)
        tokens = prompted(model, _PROMPT.value, True) if _CHAT.value else model.tokenizer.encode(_PROMPT.value)
        _write(continuation(model, model.params, tokens))
        return
    config = saved.config(_ADAPTER.value)
    if config.task != "causal_lm":
        raise ValueError(f"{_ADAPTER.value} is for {config.task}; only a causal_lm generates text.")
    model, adapters = saved.load_model(_ADAPTER.value, config)
    if _BASE.value:
        params, folded = base.alone(config, model.params), None
    else:
        params, folded = base.under(config, model.params, adapters)
    chat = config.data.chat if _CHAT.value is None else _CHAT.value
    _write(continuation(model, params, prompted(model, _PROMPT.value, chat), folded))


def _write(pieces: Iterator[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def prompted(model: Any, prompt: str, chat: bool) -> Any:
    """The tokens of a prompt as training encodes it: what comes before the first token that is learned.

    Args:
      model: a `train.job.Model`. chat: put the prompt into the model's chat template.
    """
    from train.data import encode

    example = encode.prompted(model.tokenizer, chat)([{"prompt": prompt, "completion": ""}])[0]
    return example.ids[: int(example.marks.argmax())]


def continuation(model: Any, params: Any, tokens: Any, adapters: Any = None) -> Iterator[str]:
    """Pieces of text as they are made; the flags say how.

    Args:
      model: a `train.job.Model`. params: its base. tokens: of the prompt, int [n]. adapters: on the base, or None.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lowrank_jax import models
    from train import base

    apply, params = base.for_generation(model.module, params, adapters)
    tokenizer = model.tokenizer
    ends = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    made: list[int] = []
    shown = ""
    for token in models.stream(
        model.module, params, jnp.asarray(tokens)[None], max_new_tokens=_TOKENS.value, eos_token_id=ends, pad_token_id=tokenizer.pad_id,
        apply=apply, temperature=_TEMPERATURE.value, top_p=_TOP_P.value, key=jax.random.key(_SEED.value),
    ):  # fmt: skip
        made.append(int(np.asarray(token)[0]))
        text = tokenizer.decode(made)
        # A character of several tokens decodes to a replacement sign until its last one has come.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


if __name__ == "__main__":
    cli.run(main)
