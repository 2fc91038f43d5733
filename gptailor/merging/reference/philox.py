"""Philox4x32-10, the counter-based generator of the random masks, with the same numbers everywhere.

Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, SC'11. A number depends only on
the seed, the tensor's key, the source's index and the element's index, never on the order of work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_MASK64 = (1 << 64) - 1
_MASK32 = np.uint64(0xFFFFFFFF)
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_BUMPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def splitmix64(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): 64 bits, well mixed."""
    z &= _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def philox4x32(counter_4M: npt.ArrayLike, key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """The four output words, uint32 (4, M), for counters of four words (4, M) and one key."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in np.asarray(counter_4M, np.uint64))
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2  # 32 by 32 bits: no wrap
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & _MASK32,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _BUMPS[0]) & 0xFFFFFFFF, (k1 + _BUMPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def key_words(seed: int, key: int) -> tuple[int, int]:
    """Return the two words of the generator's key: low and high half of splitmix64(seed + G key).

    G is 2^64 divided by the golden ratio; everything is modulo 2^64.
    """
    mixed = splitmix64(seed + _GOLDEN * key)
    return mixed & 0xFFFFFFFF, mixed >> 32


def words(
    seed: int, key: int, source: int, n_elements: int, begin: int = 0
) -> npt.NDArray[np.uint32]:
    """Return one random word, uint32, for each of the elements `begin` to `begin + n_elements`.

    Element e gets the output word e % 4 of the counter (low32(e / 4), high32(e / 4), source, 0).
    """
    first, last = begin // 4, -(-(begin + n_elements) // 4)
    block = np.arange(first, max(first, last), dtype=np.uint64)
    counter = np.zeros((4, block.size), np.uint64)
    counter[0], counter[1], counter[2] = block & _MASK32, block >> np.uint64(32), source
    out = philox4x32(counter, key_words(seed, key)).T.ravel()
    return out[begin - 4 * first :][:n_elements]


def below(u: npt.NDArray[np.uint32], probability: Any) -> npt.NDArray[np.bool_]:
    """True where the word is below ceil(probability · 2^32); probabilities are float64."""
    threshold = np.ceil(np.asarray(probability, np.float64) * 2.0**32).astype(np.uint64)
    mask: npt.NDArray[np.bool_] = u.astype(np.uint64) < threshold
    return mask
