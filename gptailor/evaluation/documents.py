"""Chooses the documents of a task: lm-eval's limit, a seeded choice, or a few to check."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

_LOOKED_AT = 2000
"""The lengths of at most about this many documents are compared."""


def limited(size: int, limit: float | None) -> int:
    """How many documents lm-eval's `limit` leaves; below 1 it is a fraction of them."""
    if limit is None:
        return size
    return min(size, math.ceil(size * limit) if limit < 1.0 else int(limit))


def choose_documents(
    sizes: Mapping[str, int], num_documents: int | None, seed: int
) -> dict[str, set[int] | None]:
    """A nested, seeded choice: every task has its share, and larger choices contain smaller ones.

    Args:
        sizes: task → number of its documents.
        num_documents: how many in all; None for all of them.
        seed: for the choice; which documents a task gets does not depend on the other tasks.

    Returns:
        task → indices of its documents; None for all of them.
    """
    if num_documents is None or num_documents >= sum(sizes.values()):
        return dict.fromkeys(sizes)
    shares = dict.fromkeys(sizes, 0)
    left = max(num_documents, len(sizes))
    while left > 0:
        open_tasks = [name for name in sizes if shares[name] < sizes[name]]
        step = max(left // len(open_tasks), 1)
        for name in open_tasks[:left]:
            taken = min(step, sizes[name] - shares[name])
            shares[name] += taken
            left -= taken
    chosen: dict[str, set[int] | None] = {}
    for name, size in sizes.items():
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        chosen[name] = set(generator.permutation(size)[: shares[name]].tolist())
    return chosen


def choose_after(
    sizes: Mapping[str, int], skip: int, num_documents: int, seed: int
) -> dict[str, set[int]]:
    """The documents that `choose_documents` would add to its first `skip` next.

    Args:
        sizes: task → number of its documents.
        skip: how many documents in all come before.
        num_documents: how many in all, but one for each task; fewer where a task has no more.
        seed: as for `choose_documents`.
    """
    whole = {name: set(range(size)) for name, size in sizes.items()}
    before = choose_documents(sizes, skip, seed) if skip else {name: set() for name in sizes}
    least = len(sizes)
    end = (max(skip, least) if skip else 0) + max(num_documents, least)
    until = choose_documents(sizes, end, seed)
    chosen = {}
    for name in sizes:
        earlier, later = before[name], until[name]
        every = whole[name]
        chosen[name] = (every if later is None else later) - (every if earlier is None else earlier)
    return chosen


def telling(documents: Sequence[Any], indices: Collection[int], count: int) -> set[int]:
    """The shortest and longest documents, as they are the most likely to be empty or too long.

    Args:
        documents: the documents of a task.
        indices: the documents that may be chosen.
        count: how many at most.
    """
    order = sorted(indices)
    order = order[:: max(len(order) // _LOOKED_AT, 1)]
    by_length = sorted(order, key=lambda index: len(repr(documents[index])))
    half = count // 2
    return {*by_length[:half], *by_length[len(by_length) - (count - half) :]}
