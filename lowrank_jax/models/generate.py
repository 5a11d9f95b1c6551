"""Text generation with a key/value cache, greedy or sampled, for a batch of prompts padded at either side.

A model is used through a callable with the signature of `model.apply`, so that an adapted model generates the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.models.llama import Cache, Llama, init_cache

Apply = Callable[..., Any]


class Sampling(NamedTuple):
    """How the next token is chosen.

    Attributes:
      temperature: 0 takes the most probable token; else logits are divided by it.
      top_k: keep this many most probable tokens; 0 keeps all.
      top_p: keep the fewest most probable tokens whose probabilities reach this sum (nucleus sampling, arXiv 1904.09751).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


class _State(NamedTuple):
    token: jax.Array  # (batch,) the newest token
    position: jax.Array  # (batch,) where it stands
    done: jax.Array  # (batch,) the row has ended
    cache: Cache
    key: jax.Array


def generate(
    model: Llama,
    params: Any,
    tokens: jax.Array,
    *,
    max_new_tokens: int,
    attention_mask: jax.Array | None = None,
    eos_token_id: int | Sequence[int] = (),
    pad_token_id: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    apply: Apply | None = None,
) -> jax.Array:
    """Continues every prompt, in one compiled loop that ends when all rows have.

    Args:
      model: gives the shapes of the cache.
      params: what `apply` takes as `{"params": params}`.
      tokens: int (batch, length), the prompts.
      attention_mask: bool or int (batch, length), zero at padding; each row needs a real token.
      max_new_tokens: the most to add.
      eos_token_id: a row ends after one of these.
      pad_token_id: fills a row that has ended.
      temperature, top_k, top_p: see `Sampling`; by default the choice is greedy.
      key: for sampling.
      apply: a callable `(variables, tokens, **kwargs)` as `model.apply`, which it is by default. Pass the same object each time:
        a new one compiles anew.

    Returns:
      int32 (batch, length + max_new_tokens), prompts included.

    Raises:
      ValueError: a setting is out of range, or sampling lacks a key.

    Example:
      >>> from lowrank_jax.models import LlamaConfig
      >>> model = Llama(LlamaConfig.tiny())
      >>> prompt = jnp.array([[5, 6, 7]])
      >>> params = model.init(jax.random.key(0), prompt)["params"]
      >>> generate(model, params, prompt, max_new_tokens=4).shape
      (1, 7)
    """
    tokens, mask, key = _prepare(tokens, attention_mask, max_new_tokens, Sampling(temperature, top_k, top_p), key)
    return _generate(
        apply or model.apply,
        model.config,
        Sampling(temperature, top_k, top_p),
        _ends(eos_token_id),
        pad_token_id,
        max_new_tokens,
        params,
        tokens,
        mask,
        key,
    )


def stream(
    model: Llama,
    params: Any,
    tokens: jax.Array,
    *,
    max_new_tokens: int,
    attention_mask: jax.Array | None = None,
    eos_token_id: int | Sequence[int] = (),
    pad_token_id: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    apply: Apply | None = None,
) -> Iterator[np.ndarray]:
    """Yields the tokens of `generate` as they come, int32 (batch,) each, until all rows have ended.

    Args and Raises: those of `generate`; errors are raised at the call.

    Example:
      >>> from lowrank_jax.models import LlamaConfig
      >>> model = Llama(LlamaConfig.tiny())
      >>> prompt = jnp.array([[5, 6, 7]])
      >>> params = model.init(jax.random.key(0), prompt)["params"]
      >>> len(list(stream(model, params, prompt, max_new_tokens=4)))
      4
    """
    sampling = Sampling(temperature, top_k, top_p)
    tokens, mask, key = _prepare(tokens, attention_mask, max_new_tokens, sampling, key)
    fixed = (apply or model.apply, sampling, _ends(eos_token_id), pad_token_id)
    slots = tokens.shape[1] + max_new_tokens

    def run() -> Iterator[np.ndarray]:
        state = _start_jit(*fixed, model.config, slots, params, tokens, mask, key)
        for i in range(max_new_tokens):
            yield np.asarray(state.token)
            if i + 1 == max_new_tokens or bool(state.done.all()):
                return
            state = _step_jit(*fixed, params, state)

    return run()


def next_token(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Chooses one token a row.

    Args:
      logits: (batch, vocab).
      sampling: how.
      key: unused when greedy.

    Returns:
      int32 (batch,).

    Example:
      >>> next_token(jnp.array([[0.0, 2.0, 1.0]]), Sampling(), jax.random.key(0)).tolist()
      [1]
    """
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those before it have not reached the sum; the first always stays.
        kept = (jnp.cumsum(probs, axis=-1) - probs < sampling.top_p).sum(axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, jnp.maximum(kept, 1) - 1, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _prepare(
    tokens: jax.Array, mask: jax.Array | None, max_new_tokens: int, sampling: Sampling, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must have shape (batch, length) with length at least 1, got {tokens.shape}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(f"{sampling}: expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
    if sampling.temperature > 0 and key is None:
        raise ValueError("sampling (temperature > 0) needs key=jax.random.key(seed)")
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask has shape {mask.shape}, expected that of tokens, {tokens.shape}")
    return tokens, mask, jax.random.key(0) if key is None else key


def _ends(eos_token_id: int | Sequence[int]) -> tuple[int, ...]:
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def _choose(
    logits: jax.Array, sampling: Sampling, ends: tuple[int, ...], pad: int, done: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next token of every row, which rows have then ended, and the next key."""
    own = key
    if sampling.temperature:  # a greedy loop compiles faster without random bits
        key, own = jax.random.split(key)
    token = jnp.where(done, pad, next_token(logits, sampling, own))
    return token, done | jnp.isin(token, jnp.array(ends, jnp.int32)), key


def _start(
    apply: Apply,
    sampling: Sampling,
    ends: tuple[int, ...],
    pad: int,
    config: Any,
    slots: int,
    params: Any,
    tokens: jax.Array,
    mask: jax.Array,
    key: jax.Array,
) -> _State:
    """Runs the prompts. Positions count real tokens only, and a padded slot is never attended to, at either side."""
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.int32)
    last = tokens.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    logits, cache = apply(
        {"params": params},
        tokens,
        attention_mask=mask,
        positions=positions,
        cache=init_cache(config, tokens.shape[0], slots),
        logits_at=last,
    )
    done = jnp.zeros(tokens.shape[0], bool)
    token, done, key = _choose(logits, sampling, ends, pad, done, key)
    return _State(token, mask.sum(axis=1).astype(jnp.int32), done, cache, key)


def _step(apply: Apply, sampling: Sampling, ends: tuple[int, ...], pad: int, params: Any, state: _State) -> _State:
    logits, cache = apply(
        {"params": params}, state.token[:, None], positions=state.position[:, None], cache=state.cache
    )
    token, done, key = _choose(logits[:, 0], sampling, ends, pad, state.done, state.key)
    return _State(token, state.position + 1, done, cache, key)


_start_jit = jax.jit(_start, static_argnums=(0, 1, 2, 3, 4, 5))
_step_jit = jax.jit(_step, static_argnums=(0, 1, 2, 3), donate_argnums=(5,))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _generate(
    apply: Apply,
    config: Any,
    sampling: Sampling,
    ends: tuple[int, ...],
    pad: int,
    max_new_tokens: int,
    params: Any,
    tokens: jax.Array,
    mask: jax.Array,
    key: jax.Array,
) -> jax.Array:
    length = tokens.shape[1]
    state = _start(apply, sampling, ends, pad, config, length + max_new_tokens, params, tokens, mask, key)
    out = jnp.full((tokens.shape[0], length + max_new_tokens), pad, jnp.int32)
    out = out.at[:, :length].set(tokens).at[:, length].set(state.token)

    def go_on(carry: tuple[jax.Array, jax.Array, _State]) -> jax.Array:
        i, _, state = carry
        return (i < max_new_tokens) & ~state.done.all()

    def body(carry: tuple[jax.Array, jax.Array, _State]) -> tuple[jax.Array, jax.Array, _State]:
        i, out, state = carry
        state = _step(apply, sampling, ends, pad, params, state)
        return i + 1, jax.lax.dynamic_update_slice_in_dim(out, state.token[:, None], length + i, axis=1), state

    return jax.lax.while_loop(go_on, body, (jnp.int32(1), out, state))[1]
