"""Layers on several GPUs: the placement is contiguous, fits, and leaves the most room."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptailor.errors import ResourceError
from gptailor.evaluation.spread import layer_ranges, place_layers

GIB = 1 << 30


def fill(placement: tuple[int, ...], layers: list[int], outside: int, free: list[int]) -> float:
    needed = [outside] + [0] * (len(free) - 1)
    for gpu, n_bytes in zip(placement, layers, strict=True):
        needed[gpu] += n_bytes
    return max(n / f if n else 0.0 for n, f in zip(needed, free, strict=True))


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=6),
    st.integers(0, 30),
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
)
def test_no_placement_leaves_more_room(layers: list[int], outside: int, free: list[int]) -> None:
    every = list(combinations_with_replacement(range(len(free)), len(layers)))
    best = min(fill(placement, layers, outside, free) for placement in every)
    if best > 1.0:
        with pytest.raises(ResourceError, match="give each worker more GPUs"):
            place_layers(layers, outside, free)
        return
    placement = place_layers(layers, outside, free)
    assert list(placement) == sorted(placement)
    assert fill(placement, layers, outside, free) == best


def test_a_70b_model_over_gpus_of_80_gb() -> None:
    layers, outside = [1_711_308_800] * 80, 4_202_708_992  # Llama-3.1-70B in bfloat16
    free = 72 * GIB
    with pytest.raises(ResourceError, match=r"needs 131\.4 GiB, but the worker's 1 GPUs have 72"):
        place_layers(layers, outside, [free])
    over_two = layer_ranges(place_layers(layers, outside, [free] * 2))
    assert over_two == {0: range(39), 1: range(39, 80)}  # the first also has the embeddings
    over_four = layer_ranges(place_layers(layers, outside, [free] * 4))
    assert [len(layers) for layers in over_four.values()] == [18, 21, 21, 20]
    with pytest.raises(ResourceError):  # the total would do, but layers can't be split
        place_layers([3 * GIB, 3 * GIB, 3 * GIB], 0, [4 * GIB + 1, 5 * GIB])


def test_gpus_of_different_sizes_and_a_full_one() -> None:
    assert place_layers([4] * 6, 0, [8, 16]) == (0, 0, 1, 1, 1, 1)
    assert place_layers([4] * 2, 0, [0, 8]) == (1, 1)
    assert place_layers([4] * 2, 4, [4, 8]) == (1, 1)
    assert place_layers([1], 1, [100, 100]) in {(0,), (1,)}
