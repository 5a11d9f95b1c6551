"""Tasks: what a batch is to the model, what is minimised, and what is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Batch = Mapping[str, jax.Array]
Apply = Callable[..., Any]  # the signature of model.apply


class Task(NamedTuple):
    """A task as pure functions.

    Attributes:
      name: 'classification', 'regression' or 'causal_lm'.
      logits: (apply, variables, batch, rngs) -> the model's output for a batch; rngs is None in evaluation. A causal_lm's are the losses
        of its tokens, since whole logits would be the largest array of a step.
      loss: (logits, batch) -> sum of the losses and the number they are to be divided by, both float32 scalars.
      outputs: (logits, batch) -> per-row arrays that evaluation needs on the host.
      unit: what progress is counted in.
      count: batch -> the number of units in it.
    """

    name: str
    logits: Callable[[Apply, Any, Batch, dict[str, jax.Array] | None], jax.Array]
    loss: Callable[[jax.Array, Batch], tuple[jax.Array, jax.Array]]
    outputs: Callable[[jax.Array, Batch], dict[str, jax.Array]]
    unit: str
    count: Callable[[Mapping[str, Any]], int]


def classification(dropout: bool = False, regression: bool = False) -> Task:
    """Sequence classification, or with ``regression`` one score a row (mean squared error).

    Args:
      dropout: apply the model's own dropout in training.

    Example:
      >>> task = classification()
      >>> total, weight = task.loss(jnp.zeros((4, 2)), {"label": jnp.array([0, 1, 1, 0])})
      >>> round(float(total / weight), 4)
      0.6931
    """

    def logits(apply: Apply, variables: Any, batch: Batch, rngs: dict[str, jax.Array] | None) -> jax.Array:
        return apply(
            variables, batch["tokens"], attention_mask=batch["mask"], token_types=batch["token_types"],
            deterministic=not (dropout and rngs), **({"rngs": rngs} if rngs else {}),
        )  # fmt: skip

    def losses(logits: jax.Array, batch: Batch) -> jax.Array:
        logits = logits.astype(jnp.float32)
        if regression:
            return (logits[:, 0] - batch["label"]) ** 2
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    def loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        valid = _valid(batch, logits.shape[0])
        return jnp.sum(losses(logits, batch) * valid), jnp.sum(valid)

    def outputs(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        guess = logits[:, 0].astype(jnp.float32) if regression else jnp.argmax(logits, axis=-1)
        return {"loss": losses(logits, batch), "guess": guess}

    return Task(
        "regression" if regression else "classification", logits, loss, outputs, "examples", lambda b: len(b["tokens"])
    )


def causal_lm(packed: bool = False) -> Task:
    """Next-token prediction on the tokens that the batch's ``loss_mask`` marks.

    Args:
      packed: rows hold several examples, which must not see each other.

    Example:
      >>> batch = {"tokens": jnp.zeros((1, 3), jnp.int32), "loss_mask": jnp.array([[False, True, True]])}
      >>> total, weight = causal_lm().loss(jnp.full((1, 3), 2.0), batch)
      >>> float(total), float(weight)
      (4.0, 2.0)
    """

    def losses(apply: Apply, variables: Any, batch: Batch, rngs: dict[str, jax.Array] | None) -> jax.Array:
        packing = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]} if packed else {}
        targets = jnp.roll(batch["tokens"], -1, axis=1)  # the last token has none: `rows` leaves it out
        return apply(variables, batch["tokens"], targets=targets, **packing, **({"rngs": rngs} if rngs else {}))

    def rows(losses: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        # Without packing a row is padded at its end only, which causal attention never sees from a real token.
        learned = batch["loss_mask"][:, 1:].astype(jnp.float32)
        return jnp.sum(losses[:, :-1] * learned, axis=1), jnp.sum(learned, axis=1)

    def loss(losses: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        total, weight = rows(losses, batch)
        return jnp.sum(total), jnp.sum(weight)

    def outputs(losses: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        total, weight = rows(losses, batch)
        return {"loss": total, "tokens": weight}

    return Task("causal_lm", losses, loss, outputs, "tokens", lambda b: int(b["segment_ids"].astype(bool).sum()))


def _valid(batch: Batch, rows: int) -> jax.Array:
    return batch["valid"].astype(jnp.float32) if "valid" in batch else jnp.ones(rows, jnp.float32)
