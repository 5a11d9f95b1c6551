"""Text as tokens: the tokenizer, given or trained on the corpus, and the loaders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import ml_collections

from lowrank_jax import assets
from lowrank_jax.models.tokenizer import Tokenizer, load_tokenizer
from lowrank_jax.models.tokenizer_training import train_tokenizer
from train import data, sharding
from train.data import Loader
from train.data.builders.prepare import prepare
from train.job import locate, tokenizer_path


def tokenizer_of(config: ml_collections.ConfigDict) -> Tokenizer:
    """The tokenizer that a configuration names, or one trained on the training split; kept in the cache.

    Raises:
      ValueError: data without running text, a vocabulary that is too small.
    """
    if config.tokenizer.source:
        return load_tokenizer(tokenizer_path(locate(config.tokenizer.source)))
    corpus = prepare(config.data.name, config.data.train_split, config.data.directory or None)
    if corpus.source.kind != "running":
        raise data.DataError(f"config.data.name={config.data.name!r} is not running text, which pre-training reads.")
    key = json.dumps([corpus.fingerprint, config.data.train_split, config.tokenizer.vocab_size])
    folder = assets.cache_dir() / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:20]
    if not (folder / "tokenizer.json").is_file():
        trained = train_tokenizer(_texts(corpus.records), config.tokenizer.vocab_size)
        folder.mkdir(parents=True, exist_ok=True)
        trained.save(folder)
    return load_tokenizer(folder)


def loader(config: ml_collections.ConfigDict, split: str, tokenizer: Tokenizer, mesh: Any, *, training: bool) -> Loader:
    """The rows of a split, `config.data.max_length` tokens each; of several processes each reads what its part of the mesh needs."""
    size = config.batch_size if training else config.eval_batch_size
    limit = None if training else config.data.eval_limit or None
    return data.load(
        config.data.name, split, tokenizer, task="causal_lm", batch_size=size, max_length=config.data.max_length, seed=config.seed,
        directory=config.data.directory or None, limit=limit, share=sharding.share(mesh, size),
    )  # fmt: skip


def _texts(records: Any) -> Iterator[str]:
    for n in range(len(records)):
        text = records[n]["text"]
        yield text.decode("utf-8") if isinstance(text, bytes) else text
