"""Evaluation of an adapter, or of the base alone, on a loader's every row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lr
from lowrank_jax import models
from lowrank_jax.hosts import on_host
from train import base, scores, sharding
from train.data import Loader
from train.job import Job

Forward = Callable[..., dict[str, jax.Array]]

# The score that decides which checkpoint is the best, and its sign.
_DECIDES = {"classification": ("accuracy", 1), "regression": ("pearson", 1), "causal_lm": ("loss", -1)}


def forward(job: Job) -> Forward:
    """The compiled part: ``(params, adapters or None, batch) -> per-row outputs``. Make it once; it keeps its compilations."""

    def run(params: Any, adapters: lr.Adapters | None, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        apply = job.model.apply if adapters is None else lr.linen.adapted(job.model, adapters)
        outputs = job.task.outputs(job.task.logits(apply, {"params": params}, batch, None), batch)
        return outputs | {name: batch[name] for name in ("valid", "label") if name in batch}

    # Every process scores all rows, those too that others read.
    where = None if job.mesh is None else sharding.everywhere(job.mesh)
    return jax.jit(sharding.within(job.mesh, run), out_shardings=where)


def evaluate(job: Job, run: Forward, params: Any, adapters: lr.Adapters | None, loader: Loader) -> dict[str, float]:
    """Scores on every row of a loader.

    Args:
      run: from `forward`. params, adapters: the base and the adapter on it (folded together, or neither).

    Returns:
      classification: loss, accuracy, macro_f1, matthews; regression: loss, pearson; causal_lm: loss (nats a token), perplexity.

    Raises:
      ValueError: a label out of range.
    """
    collected = _collect(job, run, params, adapters, loader)
    if job.task.name == "causal_lm":
        loss = float(collected["loss"].sum(dtype=np.float64) / max(collected["tokens"].sum(dtype=np.float64), 1.0))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    loss = float(collected["loss"].mean(dtype=np.float64))
    if job.task.name == "regression":
        return {"loss": loss, "pearson": scores.pearson(collected["guess"], collected["label"])}
    counts = scores.confusion(collected["guess"], collected["label"], loader.num_labels)
    return {
        "loss": loss, "accuracy": scores.accuracy(counts), "macro_f1": scores.macro_f1(counts), "matthews": scores.matthews(counts)
    }  # fmt: skip


def decides(job: Job) -> str:
    """The name of the score that chooses the best checkpoint."""
    return _DECIDES[job.task.name][0]


def merit(job: Job, result: dict[str, float]) -> float:
    """One number of an evaluation, higher is better; not a number counts as the worst."""
    name, sign = _DECIDES[job.task.name]
    return sign * result[name] if math.isfinite(result[name]) else -math.inf


def _collect(job: Job, run: Forward, params: Any, adapters: Any, loader: Loader) -> dict[str, np.ndarray]:
    parts: list[dict[str, Any]] = []
    for batch in loader.evaluation_batches():
        inputs = {name: value for name, value in batch.items() if name != "index"}
        parts.append(run(params, adapters, sharding.put_batch(inputs, job.mesh)))
    host = [jax.tree.map(np.asarray, part) for part in parts]
    return {name: np.concatenate([part[name][part["valid"]] for part in host]) for name in host[0]}


def exact_match(job: Job, params: Any, adapters: lr.Adapters | None, loader: Loader, limit: int) -> float:
    """The share of examples whose generated answer equals the completion; after '####' where there is one (GSM8K).

    Args:
      limit: how many examples are answered, from the first.
    """
    apply, params = base.for_generation(job.model, params, adapters)
    ends = () if job.tokenizer.eos_id is None else (job.tokenizer.eos_id,)
    examples = sorted(_examples(loader, limit), key=lambda example: len(example[0]))
    size, right = loader.batch_size, 0
    model: Any = job.model
    for begin in range(0, len(examples), size):
        chosen = examples[begin : begin + size]
        width = max(len(prompt) for prompt, _ in chosen)
        tokens, mask = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
        mask[:, -1] = True  # rows that only fill up the batch still need one token
        for i, (prompt, _) in enumerate(chosen):
            tokens[i, width - len(prompt) :], mask[i, width - len(prompt) :] = prompt, True
        prompts, mask = sharding.spread((jnp.asarray(tokens), jnp.asarray(mask)), job.mesh)
        out = models.generate(model, params, prompts, attention_mask=mask, apply=apply,
                              max_new_tokens=job.config.max_new_tokens, eos_token_id=ends, pad_token_id=job.tokenizer.pad_id)  # fmt: skip
        for made, (_, wanted) in zip(on_host(out)[:, width:], chosen, strict=False):
            right += scores.answer(job.tokenizer.decode(made)) == scores.answer(job.tokenizer.decode(wanted))
    return right / max(len(examples), 1)


def _examples(loader: Loader, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Prompt and completion of the first examples, whatever rows they are packed into."""
    table = loader.table
    for begin, end in zip(table.offsets[:limit], table.offsets[1 : limit + 1], strict=False):
        learned = np.flatnonzero(table.marks[begin:end])
        if len(learned) and learned[0] > 0:
            yield table.ids[begin : begin + learned[0]], table.ids[begin + learned[0] : end]
