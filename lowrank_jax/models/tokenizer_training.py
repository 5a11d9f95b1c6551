"""A tokenizer made from text, for models that are trained from scratch."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers

from lowrank_jax.models.tokenizer import Tokenizer

END = "<|endoftext|>"
_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level byte-pair encoding: every text has tokens, and decoding gives it back.

    Args:
      texts: read once. vocab_size: tokens at most, those of the 256 bytes and ``<|endoftext|>`` included; small corpora give fewer.

    Raises:
      ValueError: a vocabulary too small for the bytes.

    Example:
      >>> tokenizer = train_tokenizer(["to be or not to be"] * 3, vocab_size=270)
      >>> ids = tokenizer.encode("to be, ô")
      >>> len(ids), tokenizer.decode(ids), tokenizer.vocab_size
      (6, 'to be, ô', 266)
    """
    if vocab_size <= _BYTES:
        raise ValueError(f"vocab_size={vocab_size}: expected more than the {_BYTES} bytes and one end-of-text token.")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    end = backend.token_to_id(END)
    assert end is not None
    return Tokenizer(backend, end, None, end, {"eos_token": END, "pad_token": END}, None)
