"""The cache keeps the groups that are used most and never exceeds its budget."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.evaluation.lfu_cache import HALF_LIFE, LFUCache


def ask(cache: LFUCache[str], keys: str, size: int = 10, held: str = "") -> str:
    """Uses these keys as one recipe does; returns those that had to be loaded."""
    cache.tick()
    missed = ""
    for key in keys:
        cache.use(key)
        if key not in cache:
            missed += key
            cache.admit(key, size, held=held)
    return missed


def test_the_coldest_key_is_evicted() -> None:
    cache: LFUCache[str] = LFUCache(30)
    ask(cache, "abc")
    ask(cache, "ab")
    cache.tick()
    cache.use("d")
    assert cache.admit("d", 10) == ["c"]  # used as often as d, but longer ago
    assert sorted(cache) == ["a", "b", "d"]
    assert cache.n_bytes == 30


def test_a_key_colder_than_all_others_is_not_admitted() -> None:
    cache: LFUCache[str] = LFUCache(30)
    for _ in range(5):
        ask(cache, "abc")
    assert ask(cache, "d") == "d"
    assert sorted(cache) == ["a", "b", "c"]
    cache.use("d")
    assert cache.admit("d", 10, must=True) == ["a"]
    cache.use("e")
    assert cache.admit("e", 31, must=True) is None
    assert cache.n_bytes == 30


def test_held_keys_are_not_evicted() -> None:
    cache: LFUCache[str] = LFUCache(20)
    ask(cache, "ab")
    cache.use("c")
    cache.use("c")
    assert cache.admit("c", 10, held="ab", must=True) is None
    assert cache.admit("c", 10, held="a") == ["b"]
    assert cache.shrink(5, held="ac") is None
    assert cache.shrink(5, held="c") is None
    assert cache.shrink(10, held="c") == ["a"]
    assert list(cache) == ["c"]


def test_a_scan_slightly_too_large_keeps_most_of_its_hits() -> None:
    """With least-recently-used eviction it would have none."""
    cache: LFUCache[str] = LFUCache(90)
    ask(cache, "abcdefghij")
    misses = sum(len(ask(cache, "abcdefghij")) for _ in range(20))
    assert misses <= 2 * 20


def test_old_uses_count_less() -> None:
    cache: LFUCache[str] = LFUCache(10)
    for _ in range(20):
        ask(cache, "a")
    for _ in range(int(8 * HALF_LIFE)):
        cache.tick()
    assert ask(cache, "b") == "b"
    assert list(cache) == ["b"]
    for _ in range(100_000):  # the numbers stay small
        cache.tick()
    assert ask(cache, "c") == "c"
    assert list(cache) == ["c"]


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(0, 100),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
)
def test_the_budget_holds(budget: int, sizes: list[int], seed: int) -> None:
    rng = random.Random(seed)
    cache: LFUCache[int] = LFUCache(budget)
    kept: dict[int, int] = {}
    for _ in range(100):
        key, held = rng.randrange(len(sizes)), {rng.randrange(len(sizes))}
        cache.tick()
        cache.use(key)
        if key in cache:
            continue
        must = rng.random() < 0.5
        before = dict(kept)
        gone = cache.admit(key, sizes[key], held=held, must=must)
        if gone is None:
            assert kept == before
            if must:
                fixed = sum(size for k, size in kept.items() if k in held)
                assert fixed + sizes[key] > budget
        else:
            assert not held & set(gone)
            for old in gone:
                del kept[old]
            kept[key] = sizes[key]
        assert set(cache) == set(kept)
        assert cache.n_bytes == sum(kept.values()) <= budget
