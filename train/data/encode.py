"""From records to tokens: classification, prompts with completions, and running text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank_jax.models.tokenizer import Tokenizer
from train.data.tokens import Encode, Example

SEPARATOR = "\n"  # between a prompt and its completion, where no chat template says otherwise


def classification(tokenizer: Tokenizer, max_length: int, num_labels: int | None) -> Encode:
    """Returns an encoder of `text`, `text_pair`, `label`; texts are cut to `max_length` tokens.

    Args:
        num_labels: labels are 0 to num_labels - 1; None for scores.
    """

    def encode(records: Sequence[Any]) -> list[Example]:
        texts, pairs = [_text(r["text"]) for r in records], [_text(r["text_pair"]) for r in records]
        encoded = tokenizer.encode_batch(texts, pairs if any(pairs) else None, max_length=max_length)
        labels = [float(r["label"]) for r in records]
        for label in labels:
            if num_labels is not None and not 0 <= label < num_labels:
                raise ValueError(
                    f"a label is {label:g}; expected 0 to {num_labels - 1}. Remove or relabel the example."
                )
        return [Example(e.ids, e.types, label) for e, label in zip(encoded, labels, strict=True)]

    return encode


def prompted(tokenizer: Tokenizer, chat: bool) -> Encode:
    """Returns an encoder of `prompt`, `completion`; the model learns the completion and the token that ends
    it.

    Prompt and completion are encoded apart, so the tokens of the prompt are the ones that generation will
    start from.

    Args:
        chat: wrap both in the tokenizer's chat template.
    """
    begin = _begin(tokenizer)
    end = _end(tokenizer) if not chat else np.zeros(0, np.int32)

    def encode(records: Sequence[Any]) -> list[Example]:
        prompts, completions = (
            [_text(r["prompt"]) for r in records],
            [_text(r["completion"]) for r in records],
        )
        if chat:
            return [_chat(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
        heads = tokenizer.encode_batch([p + SEPARATOR for p in prompts], special_tokens=False)
        tails = tokenizer.encode_batch(completions, special_tokens=False)
        return [_joined([begin, h.ids], [t.ids, end]) for h, t in zip(heads, tails, strict=True)]

    return encode


def running(tokenizer: Tokenizer) -> Encode:
    """Returns an encoder of `text`, `last`; a document ends with the tokenizer's end-of-text token."""
    end = _end(tokenizer)

    def encode(records: Sequence[Any]) -> list[Example]:
        encoded = tokenizer.encode_batch([_text(r["text"]) for r in records], special_tokens=False)
        return [_joined([], [e.ids, end[: int(r["last"])]]) for e, r in zip(encoded, records, strict=True)]

    return encode


def _chat(tokenizer: Tokenizer, prompt: str, completion: str) -> Example:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    ids, learned = tokenizer.chat(messages)
    return Example(ids, learned.astype(np.int8), 0.0)


def _joined(given: list[np.ndarray], learned: list[np.ndarray]) -> Example:
    ids = np.concatenate([*given, *learned]).astype(np.int32)
    marks = np.ones(len(ids), np.int8)
    marks[: sum(len(part) for part in given)] = 0
    return Example(ids, marks, 0.0)


def _begin(tokenizer: Tokenizer) -> np.ndarray:
    """The beginning-of-text token as an array, empty for a model that was trained without one."""
    added = tokenizer.encode("", special_tokens=True)
    return added[:1] if len(added) and added[0] == tokenizer.bos_id else np.zeros(0, np.int32)


def _end(tokenizer: Tokenizer) -> np.ndarray:
    if tokenizer.eos_id is None:
        raise ValueError(
            "this tokenizer names no end-of-text token, so a model could not learn to stop. "
            "Set eos_token in its tokenizer_config.json."
        )
    return np.asarray([tokenizer.eos_id], np.int32)


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else value
