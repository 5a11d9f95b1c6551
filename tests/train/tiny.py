"""A model of a few thousand random weights and a few dozen sentences: a run of seconds."""

from __future__ import annotations

import csv
import pathlib
import random
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers

from lowrank_jax import models
from train.config import base, rule

WORDS = [f"w{i}" for i in range(60)]
LABELS = ("bad", "fine", "good")


def bert(directory: pathlib.Path, **fields: Any) -> pathlib.Path:
    """Writes a BERT with random weights and a tokenizer of whole words."""
    config = models.BertConfig.tiny(task="encoder", use_pooler=False, hidden_size=32, num_attention_heads=2, **fields)
    return _write(directory, config)


def llama(directory: pathlib.Path, **fields: Any) -> pathlib.Path:
    """Writes a Llama with random weights and a tokenizer of whole words."""
    return _write(directory, models.LlamaConfig.tiny(**fields))


def _write(directory: pathlib.Path, config: Any) -> pathlib.Path:
    params = models.build(config).init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    out = models.save(params, config, directory)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "</s>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text('{"pad_token": "[PAD]", "eos_token": "</s>"}')
    return out


def sentences(directory: pathlib.Path, count: int = 44, longest: int = 12) -> pathlib.Path:
    """Writes train.csv and test.csv: the class is that of the words a sentence is made of."""
    directory.mkdir(parents=True, exist_ok=True)
    dice = random.Random(0)
    for split, size in (("train", count), ("test", 20)):
        with (directory / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("text", "category"))
            for i in range(size):
                words = WORDS[i % 3 :: 3]
                writer.writerow((" ".join(dice.choices(words, k=dice.randint(3, longest))), LABELS[i % 3]))
    return directory


def restaurants(directory: pathlib.Path, count: int = 40) -> pathlib.Path:
    """Writes files of the E2E layout: the text repeats the data."""
    directory.mkdir(parents=True, exist_ok=True)
    dice = random.Random(0)
    for split, size in (("train", count), ("valid", 8), ("test", 8)):
        lines = []
        for _ in range(size):
            words = " ".join(dice.choices(WORDS, k=dice.randint(2, 5)))
            lines.append(f"{words}||{words}\n")
        (directory / f"{split}.txt").write_text("".join(lines))
    return directory


def config(root: pathlib.Path, method: str = "lamda", **fields: Any) -> Any:
    """A run of 12 updates on `bert` and `sentences`, which are written below ``root`` unless they are there."""
    out = base()
    out.name, out.workdir = "tiny", str(root / "run")
    out.model.source, out.model.pooling = str(root / "bert"), "mean"
    out.data.name, out.data.directory = "banking77", str(root / "data")
    out.data.eval_split, out.data.max_length = "test", 16
    out.adapter = rule(
        method, r"encoder/.*/(query|value|output)", **({"rank": 4} | fields if method != "full" else fields)
    )
    out.head = rule("full", "classifier", learning_rate=1e-2)
    out.steps, out.batch_size, out.eval_batch_size = 12, 8, 10
    out.eval_every, out.checkpoint_every, out.log_every = 4, 3, 2
    if not (root / "bert").exists():
        bert(root / "bert")
        sentences(root / "data")
    return out
