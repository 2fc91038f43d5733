"""Which groups stay: those used most, within the budget, whatever is asked for."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.evaluation.lfu_cache import HALF_LIFE, LFUCache


def ask(hot: LFUCache[str], keys: str, size: int = 10, held: str = "") -> str:
    """One recipe that uses these keys; returns those that had to be loaded."""
    hot.tick()
    missed = ""
    for key in keys:
        hot.use(key)
        if key not in hot:
            missed += key
            hot.admit(key, size, held=held)
    return missed


def test_the_coldest_goes() -> None:
    hot: LFUCache[str] = LFUCache(30)
    ask(hot, "abc")
    ask(hot, "ab")
    hot.tick()
    hot.use("d")
    assert hot.admit("d", 10) == ["c"]  # as often, but longer ago
    assert sorted(hot) == ["a", "b", "d"]
    assert hot.n_bytes == 30


def test_what_is_colder_than_all_does_not_get_in() -> None:
    hot: LFUCache[str] = LFUCache(30)
    for _ in range(5):
        ask(hot, "abc")
    assert ask(hot, "d") == "d"
    assert sorted(hot) == ["a", "b", "c"]
    hot.use("d")
    assert hot.admit("d", 10, must=True) == ["a"]
    hot.use("e")
    assert hot.admit("e", 31, must=True) is None
    assert hot.n_bytes == 30


def test_held_keys_do_not_go() -> None:
    hot: LFUCache[str] = LFUCache(20)
    ask(hot, "ab")
    hot.use("c")
    hot.use("c")
    assert hot.admit("c", 10, held="ab", must=True) is None
    assert hot.admit("c", 10, held="a") == ["b"]
    assert hot.shrink(5, held="ac") is None
    assert hot.shrink(5, held="c") is None
    assert hot.shrink(10, held="c") == ["a"]
    assert list(hot) == ["c"]


def test_a_scan_that_is_a_little_too_large_keeps_most_of_its_hits() -> None:
    """Under the least recently used rule it would have none."""
    hot: LFUCache[str] = LFUCache(90)
    ask(hot, "abcdefghij")
    misses = sum(len(ask(hot, "abcdefghij")) for _ in range(20))
    assert misses <= 2 * 20


def test_old_uses_count_less() -> None:
    hot: LFUCache[str] = LFUCache(10)
    for _ in range(20):
        ask(hot, "a")
    for _ in range(int(8 * HALF_LIFE)):
        hot.tick()
    assert ask(hot, "b") == "b"
    assert list(hot) == ["b"]
    for _ in range(100_000):  # the numbers stay small
        hot.tick()
    assert ask(hot, "c") == "c"
    assert list(hot) == ["c"]


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(0, 100),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
)
def test_the_budget_holds(budget: int, sizes: list[int], seed: int) -> None:
    rng = random.Random(seed)
    hot: LFUCache[int] = LFUCache(budget)
    kept: dict[int, int] = {}
    for _ in range(100):
        key, held = rng.randrange(len(sizes)), {rng.randrange(len(sizes))}
        hot.tick()
        hot.use(key)
        if key in hot:
            continue
        must = rng.random() < 0.5
        before = dict(kept)
        gone = hot.admit(key, sizes[key], held=held, must=must)
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
        assert set(hot) == set(kept)
        assert hot.n_bytes == sum(kept.values()) <= budget
