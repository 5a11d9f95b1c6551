"""The two halves of AdaPT's precision switch: down to what keeps a layer's distribution, and up to what its gradients ask for."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowrank_jax.fixed_point import MAX_BITS, fixed_point

MIN, MEAN, MAX = 0, 1, 2
_EMPTY = 1e-12  # stands for the mass of an empty bin
_MORE = 3  # how many numbers of integer bits are tried, from the fewest on


def histogram_divergence(x: jax.Array, y: jax.Array, bins: jax.Array | int, max_bins: int | None = None) -> jax.Array:
    """Kullback-Leibler divergence of the histogram of ``x`` from that of ``y``, both over the range of ``x``.

    The edges are the same for both: with edges of its own a tensor that is shifted or scaled would not differ. What of ``y`` lies outside
    counts in the first or last bin, and an empty bin as 1e-12, so that the divergence stays finite.

    Args:
      x, y: of any shape and floating dtype. bins: how many, at least 1; with ``max_bins``, a static bound, it may be traced.

    Returns:
      A float32 scalar, in nats.

    Example:
      >>> x = jnp.linspace(0.0, 1.0, 1000)
      >>> [round(float(histogram_divergence(x, y, 10)), 1) for y in (x, 0.45 * x)]
      [0.0, 12.3]
    """
    x, y = (jnp.ravel(z).astype(jnp.float32) for z in (x, y))
    most = bins if max_bins is None else max_bins
    low, high = x.min(), x.max()
    per_bin = bins / jnp.where(high > low, high - low, 1)

    def histogram(z: jax.Array) -> jax.Array:
        # Clipped while it is a float: a large one is no int32.
        number = jnp.clip(jnp.floor((z - low) * per_bin), 0, jnp.asarray(bins, jnp.float32) - 1).astype(jnp.int32)
        return jnp.zeros(most, jnp.int32).at[number].add(1) / z.size

    p, q = histogram(x), histogram(y)
    return jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.maximum(p, _EMPTY)) - jnp.log(jnp.maximum(q, _EMPTY))), 0))


def push_down(
    w: jax.Array,
    key: jax.Array,
    threshold: jax.Array | float,
    bins: jax.Array | int,
    *,
    max_bins: int | None = None,
    max_fraction: int = MAX_BITS,
) -> tuple[jax.Array, jax.Array]:
    """The shortest format ``<WL, FL>`` whose quantised ``w`` has a histogram that diverges from that of ``w`` by less than a threshold.

    Bisection finds the fewest integer bits, ``WL - FL``, at the finest grid, and from there on, for each of three numbers of them, the
    fewest fraction bits; the shortest word wins, and of equal ones the one that clips less. Integer bits have to be searched too: at fixed
    ones clipping loses the same however fine the grid, and where a few outliers may be clipped the word gets shorter. Where no format is
    good enough it is the finest that covers every weight. That the divergence falls with either kind of bits, as bisection assumes,
    holds but for noise.

    Args:
      w: the weights of one layer, any shape. key: of the rounding, the same for every format that is tried.
      threshold: of the divergence, see `histogram_divergence`. bins, max_bins: of the histogram. max_fraction: the most fraction bits.

    Returns:
      ``WL`` (2 to 32) and ``FL`` (0 to ``max_fraction``), int32 scalars.

    Example:
      >>> [int(bits) for bits in push_down(jnp.linspace(-0.9, 0.9, 1000), jax.random.key(0), 0.05, 16)]
      [5, 4]
    """
    w = jnp.ravel(w).astype(jnp.float32)
    # All weights are in (-2^exponent, 2^exponent); the sign is one bit more.
    covering = jnp.clip(jnp.frexp(jnp.abs(w).max())[1].astype(jnp.int32) + 1, 2 - max_fraction, MAX_BITS)

    def good(integers: jax.Array, fraction: jax.Array) -> jax.Array:
        q = fixed_point(w, integers + fraction, fraction, key)
        return histogram_divergence(w, q, bins, max_bins) < threshold

    def finest(integers: jax.Array) -> jax.Array:
        return jnp.minimum(max_fraction, MAX_BITS - integers)

    fewest = _bisect(jnp.maximum(2 - max_fraction, covering - MAX_BITS), covering, lambda n: good(n, finest(n)))

    def shortest(integers: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        fraction = _bisect(jnp.maximum(0, 2 - integers), finest(integers), lambda n: good(integers, n))
        return integers + fraction, fraction, good(integers, fraction)

    # From more to fewer, so that argmin takes the one that clips less.
    words, fractions, kept = jax.lax.map(shortest, jnp.minimum(fewest + jnp.arange(_MORE)[::-1], covering))
    best = jnp.argmin(jnp.where(kept, words, MAX_BITS + 1))
    return words[best], fractions[best]


def gradient_diversity(sum_of_norms: jax.Array, norm_of_sum: jax.Array) -> jax.Array:
    """How much the gradients of a window disagree: ``sum ||g|| / ||sum g||``, 1 where all have a direction, infinite where they cancel.

    Example:
      >>> float(gradient_diversity(jnp.float32(4), jnp.float32(2)))
      2.0
    """
    return jnp.where(sum_of_norms > 0, sum_of_norms / jnp.where(norm_of_sum > 0, norm_of_sum, 0.0), 1.0)


def push_up(
    word_length: jax.Array,
    fraction_length: jax.Array,
    diversity: jax.Array,
    strategy: jax.Array | int,
    buffer: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """The format that learning needs, from the shortest one and the diversity of the gradients; never shorter, and never of less range.

    With ``d = log(diversity) - 1``, the fraction bits grow by ``s1 = ceil(1 / d^2)``, by ``s2 = ceil(32 d^2) - FL`` up to 32, or by their
    mean, rounded up; by at least one, and by one where ``d <= 0``. There are ``buffer`` integer bits, or as many as there were if more.

    The whole rule is a reconstruction: the paper's formulas could not be read. It follows a public optimiser that has the paper's
    vocabulary but whose origin is not confirmed. That integer bits never fall is ours: a switch up must not clip.

    Args:
      word_length, fraction_length: of `push_down`, int32. diversity: see `gradient_diversity`; of the same shape.
      strategy: `MIN`, `MEAN` or `MAX` of the two proposals; may be traced. buffer: integer bits for results.

    Returns:
      ``WL`` (at most 32) and ``FL``, int32.

    Example:
      >>> [int(bits) for bits in push_up(jnp.int32(8), jnp.int32(8), jnp.float32(1.0), MIN, buffer=4)]
      [13, 9]
    """
    d2 = jnp.square(jnp.maximum(jnp.log(diversity) - 1, 0))
    bits = lambda x: jnp.clip(jnp.ceil(x), 1, MAX_BITS).astype(jnp.int32)  # noqa: E731
    s1 = jnp.where(d2 > 0, bits(1 / jnp.where(d2 > 0, d2, 1)), 1)
    s2 = jnp.maximum(bits(MAX_BITS * d2) - fraction_length, 1)
    proposals = jnp.stack([jnp.minimum(s1, s2), (s1 + s2 + 1) // 2, jnp.maximum(s1, s2)])
    more = jnp.where(d2 > 0, proposals[strategy], 1)
    integers = jnp.maximum(word_length - fraction_length, buffer)
    fraction = jnp.maximum(jnp.minimum(fraction_length + more, MAX_BITS - integers), fraction_length)
    return fraction + integers, fraction


def _bisect(low: jax.Array, high: jax.Array, good: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The least number from ``low`` to ``high`` that is good, where all above are too; ``high``, untried, where none below it is."""

    def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) // 2
        kept = (low < high) & good(middle)
        return jnp.where(kept | (low == high), low, middle + 1), jnp.where(kept, middle, high)

    return jax.lax.fori_loop(0, MAX_BITS.bit_length() + 1, halve, (low, high))[1]
