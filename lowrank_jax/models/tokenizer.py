"""Tokenizers of pretrained models, from a Hugging Face directory or from the metadata of a GGUF file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from lowrank_jax.files import write_file
from lowrank_jax.models import chat_template
from lowrank_jax.models.gguf import is_gguf, open_gguf
from lowrank_jax.models.gguf_vocabulary import gguf_tokenizer


class Encoded(NamedTuple):
    """One text as tokens: `ids` int32 [n], and `types` int8 [n], 1 in the second text of a pair."""

    ids: np.ndarray
    types: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with what a model needs to know about it.

    Attributes:
        backend: the `tokenizers.Tokenizer`; it neither truncates nor pads.
        pad_id: fills up rows; where a model names none, the end-of-text id (masks, not ids, say what counts).
        bos_id: begins a text, or None.
        eos_id: ends a text, or None.
        config: what tokenizer_config.json says, kept for `save`.
        chat_template: Jinja source, or None.
    """

    backend: tokenizers.Tokenizer
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    config: Mapping[str, Any]
    chat_template: str | None

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with anything that changes the tokens."""
        state = [self.backend.to_str(), self.chat_template, self.bos_id, self.eos_id]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]

    def encode_batch(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        special_tokens: bool = True,
    ) -> list[Encoded]:
        """Encodes texts, or pairs of texts.

        Args:
            texts: the texts.
            pairs: the second text of each, or None.
            max_length: cut to so many tokens, special ones included; of a pair the longer text is cut first.
            special_tokens: add what the model's own rule adds, such as [CLS] and [SEP].
        Raises:
            ValueError: `pairs` of another length than `texts`.
        """
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts, but {len(pairs)} second texts; expected one for each.")
        backend = self.backend if max_length is None else _truncating(self, max_length)
        inputs: list[Any] = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encodings = backend.encode_batch(inputs, add_special_tokens=special_tokens)
        return [Encoded(np.asarray(e.ids, np.int32), np.asarray(e.type_ids, np.int8)) for e in encodings]

    def encode(self, text: str, *, special_tokens: bool = True) -> np.ndarray:
        """Returns the tokens of one text, int32 [n]."""
        return self.encode_batch([text], special_tokens=special_tokens)[0].ids

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """Returns the text of tokens [n]."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Mapping[str, str]], *, reply: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Renders a conversation with the model's chat template.

        Args:
            messages: mappings with 'role' and 'content'.
            reply: end with the header of an assistant's message, for generation.
        Returns:
            the tokens, int32 [n], and which of them the assistant wrote, bool [n]: its messages up to and
            with the token that ends them.
        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template. Use plain prompts, or a model tuned for chat.")
        special = {"bos_token": self._text(self.bos_id), "eos_token": self._text(self.eos_id)}
        pieces = chat_template.render_pieces(self.chat_template, messages, special, reply=reply)
        encoded = self.encode_batch([p.text for p in pieces], special_tokens=False)
        ids = [e.ids for e in encoded]
        learned = [
            self._learned(e.ids) if p.by_assistant else np.zeros(len(e.ids), bool)
            for p, e in zip(pieces, encoded, strict=True)
        ]
        return np.concatenate([np.zeros(0, np.int32), *ids]), np.concatenate([np.zeros(0, bool), *learned])

    def save(self, folder: os.PathLike[str] | str) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as Hugging Face reads them, into a folder."""
        folder = pathlib.Path(folder)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        for field, token in (
            ("pad_token", self.pad_id),
            ("bos_token", self.bos_id),
            ("eos_token", self.eos_id),
        ):
            if field not in config and token is not None:
                config[field] = self._text(token)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_file(folder / "tokenizer.json", [self.backend.to_str(pretty=True).encode()])
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_file(folder / "tokenizer_config.json", [text.encode()])

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.backend.id_to_token(token) or ""

    def _learned(self, ids: np.ndarray) -> np.ndarray:
        # Templates put a line break behind the token that ends a message; generation stops before it.
        ends = np.flatnonzero(ids == self.eos_id) if self.eos_id is not None else np.zeros(0, np.int64)
        last = ends[-1] + 1 if len(ends) else len(ids)
        return np.arange(len(ids)) < last


def load_tokenizer(path: os.PathLike[str] | str) -> Tokenizer:
    """Loads a tokenizer from a directory with tokenizer.json, from such a file, or from a GGUF file.

    Truncation and padding stored in tokenizer.json are switched off: the data pipeline decides about both.

    Raises:
        FileNotFoundError: no tokenizer.json there.
        ValueError: it cannot be read.
        NotImplementedError: a GGUF file with a vocabulary that is not read here.
    """
    path = pathlib.Path(path)
    if is_gguf(path):
        backend, config = gguf_tokenizer(open_gguf(path))
    else:
        backend, config = _from_folder(path)
    backend.no_truncation()
    backend.no_padding()
    bos, eos, pad = (_token_id(backend, path, config, f"{name}_token") for name in ("bos", "eos", "pad"))
    fallback = eos if eos is not None else 0
    return Tokenizer(backend, fallback if pad is None else pad, bos, eos, config, _template(config))


def _from_folder(path: pathlib.Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file. Expected a directory with tokenizer.json, or a GGUF file.")
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise ValueError(f"{file}: not a tokenizer ({error}). Fetch it again.") from error
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (file.parent / name).is_file():
            try:
                config |= json.loads((file.parent / name).read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file.parent / name}: not a JSON object ({error}). Fetch it again.") from error
    if (file.parent / "chat_template.jinja").is_file():
        config["chat_template"] = (file.parent / "chat_template.jinja").read_text(encoding="utf-8")
    return backend, config


def _token_id(backend: tokenizers.Tokenizer, path: pathlib.Path, config: Mapping[str, Any], field: str) -> int | None:
    token = config.get(field)
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return None
    found = backend.token_to_id(token)
    if found is None:
        raise ValueError(
            f"{path}: {field} is {token!r}, which is not in the vocabulary. Correct tokenizer_config.json."
        )
    return found


def _template(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template


@functools.lru_cache(maxsize=4)
def _truncating(tokenizer: Tokenizer, max_length: int) -> tokenizers.Tokenizer:
    # A copy: truncation is a setting of the backend, and changing it there would show through to others.
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.enable_truncation(max_length)
    return backend
