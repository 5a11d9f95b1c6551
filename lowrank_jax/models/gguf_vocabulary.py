"""The tokenizer stored in the metadata of a GGUF file, rebuilt with the `tokenizers` library."""

from __future__ import annotations

from typing import Any

import tokenizers

from lowrank_jax.models.gguf import special_token
from lowrank_jax.models.gguf_file import GGUF
from lowrank_jax.models.tensors import CorruptFileError

_CONTROL, _USER_DEFINED = 3, 4
_PRE_TOKENIZERS = ("smollm", "gpt-2")


def gguf_tokenizer(gguf: GGUF) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Returns the tokenizer and what its tokenizer_config.json would say.

    Raises:
        NotImplementedError: a vocabulary other than byte-level BPE with the splitting rule of GPT-2 or
            SmolLM.
        CorruptFileError: tokens or merges are missing or malformed.
    """
    meta = gguf.metadata
    model, rule = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or rule not in _PRE_TOKENIZERS:
        raise NotImplementedError(
            f"{gguf.file}: tokenizer {model!r} with rule {rule!r}; read here are 'gpt2' with "
            f"{' or '.join(_PRE_TOKENIZERS)}. "
            "Pass the directory of the model's tokenizer.json instead."
        )
    tokens, kinds, merges = (
        _strings(gguf, "tokens", str),
        _strings(gguf, "token_type", int),
        _strings(gguf, "merges", str),
    )
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CorruptFileError(
            gguf.file, f"{len(tokens)} tokens with {len(kinds)} types", "distinct tokens, one type each"
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        bpe = tokenizers.models.BPE(vocab=vocabulary, merges=pairs)
    except Exception as error:  # the library raises bare Exception for merges that do not fit the vocabulary
        raise CorruptFileError(gguf.file, f"merges that do not fit the tokens ({error})", "byte-level BPE") from error
    backend = tokenizers.Tokenizer(bpe)
    digits = [tokenizers.pre_tokenizers.Digits(individual_digits=True)] if rule == "smollm" else []
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*digits, bytes_])
    backend.decoder = tokenizers.decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            tokenizers.AddedToken(t, special=special, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == kind
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    config: dict[str, Any] = {}
    for ours, theirs in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        token = special_token(gguf, theirs)
        if token is not None:
            if not 0 <= token < len(tokens):
                raise CorruptFileError(gguf.file, f"{theirs}_token_id is {token}", f"0 to {len(tokens) - 1}")
            config[ours] = tokens[token]
    if meta.get("tokenizer.ggml.add_bos_token", False) and "bos_token" in config:
        # Under a name of ours in the template, whatever characters the token has.
        begin = {"id": "bos", "ids": [special_token(gguf, "bos")], "tokens": [config["bos_token"]]}
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="bos $A", pair="bos $A $B", special_tokens=[begin]
        )
    template = meta.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise CorruptFileError(gguf.file, f"tokenizer.chat_template is a {type(template).__name__}", "text")
        config["chat_template"] = template
    return backend, config


def _strings(gguf: GGUF, key: str, kind: type) -> list[Any]:
    value = gguf.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise CorruptFileError(gguf.file, f"tokenizer.ggml.{key} is missing or malformed", f"a list of {kind.__name__}")
    return value
