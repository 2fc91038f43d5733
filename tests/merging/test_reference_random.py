"""Philox against its published test vectors, and the masks drawn with it."""

from __future__ import annotations

import numpy as np
import pytest

from gptailor.merging import reference
from gptailor.merging.reference import philox

# counter, key, output: Random123's tests/kat_vectors, the lines "philox4x32 10"
# (github.com/DEShawResearch/random123).
KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN_ANSWERS.split("\n")[1:-1])
def test_philox_gives_the_known_answers(line: str) -> None:
    numbers = [int(word, 16) for word in line.split()]
    counter, key, expected = numbers[:4], (numbers[4], numbers[5]), numbers[6:]
    once = philox.philox4x32(np.array(counter)[:, None], key)
    assert once[:, 0].tolist() == expected
    many = philox.philox4x32(np.repeat(np.array(counter)[:, None], 7, axis=1), key)
    assert (many == once).all()


def test_splitmix_gives_the_published_sequence() -> None:
    # The first outputs of the generator seeded with 1234567: the finaliser of seed + i · G.
    # (The test vector of Rosetta Code's "Pseudo-random numbers/Splitmix64".)
    gamma = 0x9E3779B97F4A7C15
    outputs = [philox.splitmix64(1234567 + i * gamma) for i in range(1, 6)]
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    low, high = philox.key_words(1234567, 3)
    assert low + (high << 32) == outputs[2]


def test_words_come_from_the_counter_of_their_element() -> None:
    whole = philox.words(7, 2**63 + 5, 2, 41)
    assert whole.dtype == np.uint32
    assert whole.shape == (41,)
    for begin, count in [(0, 41), (1, 3), (4, 4), (5, 30), (39, 2), (41, 0), (3, 0)]:
        part = philox.words(7, 2**63 + 5, 2, count, begin)
        np.testing.assert_array_equal(part, whole[begin : begin + count])
    far = 4 * ((5 << 32) + 9) + 2  # a counter whose second word is used
    expected = philox.philox4x32(np.array([[9], [5], [2], [0]]), philox.key_words(7, 2**63 + 5))
    assert philox.words(7, 2**63 + 5, 2, 1, far)[0] == expected[2, 0]


def test_every_part_of_the_key_changes_the_words() -> None:
    draws = [philox.words(*k, 64) for k in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, -1, 0)]]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert (a == b).sum() <= 1


def test_a_probability_of_a_half_keeps_the_lower_half() -> None:
    u = np.array([0, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    assert philox.below(u, 0.5).tolist() == [True, True, False, False]
    assert philox.below(u, 1e-12).tolist() == [True, False, False, False]
    assert not philox.below(u, 0.0).any()
    assert philox.below(u, 1.0).all()


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.97])
def test_dare_keeps_its_share(density: float) -> None:
    n = 200_000
    delta = np.random.default_rng(0).standard_normal((100, n // 100))
    kept = [reference.drop(delta, density, seed=3, key=k, source=0) != 0 for k in range(3)]
    sigma = np.sqrt(density * (1 - density) / n)
    for mask in kept:
        assert abs(mask.mean() - density) < 5 * sigma
        # The mask does not depend on magnitudes, rows or neighbours.
        large = np.abs(delta) > 1
        assert abs(mask[large].mean() - density) < 5 * sigma * np.sqrt(1 / large.mean())
        both = (mask[:, 1:] & mask[:, :-1]).mean()
        assert abs(both - density**2) < 5 * sigma
    assert abs((kept[0] & kept[1]).mean() - density**2) < 5 * sigma


def test_dare_at_the_ends_of_its_range() -> None:
    delta = np.arange(1.0, 100.0)
    assert reference.drop(delta, 1.0, seed=0, key=0, source=0) is delta
    assert not reference.drop(delta, 0.0, seed=0, key=0, source=0).any()
    x, base = delta[None], np.zeros_like(delta)
    for method in ("dare_linear", "dare_ties"):
        np.testing.assert_array_equal(
            reference.merge(method, x, base, parameters={"density": 0}), base
        )


def test_della_keeps_large_elements_more_often() -> None:
    density, epsilon, n, rows = 0.4, 0.3, 16, 30_000
    rng = np.random.default_rng(1)
    delta = rng.standard_normal((rows, n))
    mask = reference.drop_by_magnitude(delta, density, epsilon, seed=5, key=9, source=1) != 0
    order = np.argsort(np.abs(delta), axis=1)
    by_rank = np.take_along_axis(mask, order, axis=1).mean(axis=0)
    p = np.linspace(density - epsilon, density + epsilon, n)
    assert (np.abs(by_rank - p) < 5 * np.sqrt(p * (1 - p) / rows)).all()


def test_della_ranks_equal_magnitudes_by_index() -> None:
    delta = np.array([[2.0, -2.0, 1.0, 2.0], [0.0, 0.0, 0.0, -1.0]])
    p = reference.keep_probabilities(delta, 0.5, 0.3)
    np.testing.assert_allclose(p, [[0.4, 0.6, 0.2, 0.8], [0.2, 0.4, 0.6, 0.8]])
    column = reference.keep_probabilities(np.ones((3, 1)), 0.5, 0.3)
    np.testing.assert_array_equal(column, 0.5)


def test_della_at_the_ends_of_its_range() -> None:
    x, base = np.arange(1.0, 13.0).reshape(1, 3, 4), np.zeros((3, 4))
    for method in ("della", "della_linear"):
        all_of_it = {"density": 1, "epsilon": 0.5}
        np.testing.assert_array_equal(reference.merge(method, x, base, parameters=all_of_it), x[0])
        nothing = {"density": 0, "epsilon": 0.5}
        np.testing.assert_array_equal(reference.merge(method, x, base, parameters=nothing), base)
        for density, epsilon in [(0.5, 0.5), (0.1, 0.15), (0.9, 0.15)]:
            with pytest.raises(ValueError, match="smaller epsilon"):
                values = {"density": density, "epsilon": epsilon}
                reference.merge(method, x, base, parameters=values)


def test_each_source_has_its_own_mask() -> None:
    x = np.ones((3, 1000))
    base = np.zeros(1000)
    one = {"density": 0.5, "rescale": 0}
    together = reference.merge("dare_linear", x, base, parameters=one, key=4)
    apart = sum(reference.drop(x[i], 0.5, seed=0, key=4, source=i) for i in range(3))
    np.testing.assert_array_equal(together, apart)
    assert set(np.unique(together)) == {0.0, 1.0, 2.0, 3.0}
    other = reference.merge("dare_linear", x, base, parameters={**one, "seed": 1}, key=4)
    assert (other != together).any()
    assert (reference.merge("dare_linear", x, base, parameters=one, key=5) != together).any()
