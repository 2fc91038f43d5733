"""Exit codes, and suggestions for misspelt names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptailor import errors


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [
        (errors.GptailorError, 1),
        (errors.UsageError, 2),
        (errors.ModelError, 3),
        (errors.ResourceError, 4),
        (errors.StoppedEarly, 5),
    ],
)
def test_exit_codes(kind: type[errors.GptailorError], exit_code: int) -> None:
    assert kind("x").exit_code == exit_code
    assert isinstance(kind("x"), errors.GptailorError)


def test_usage_errors_are_value_errors() -> None:
    assert issubclass(errors.UsageError, ValueError)


def test_unknown() -> None:
    error = errors.unknown("merge method", "slrep", ["linear", "slerp", "ties"], "layers[3]")
    assert str(error) == (
        "unknown merge method 'slrep' in layers[3]: did you mean 'slerp'? "
        "Known: linear, slerp, ties."
    )
    assert str(errors.unknown("task", "zzz", ["piqa"])) == "unknown task 'zzz': Known: piqa."
    assert str(errors.unknown("task", 3, [])) == "unknown task '3': Known: none."
    many = str(errors.unknown("task", "x", [f"t{i}" for i in range(40)]))
    assert many.endswith("t11, ….")


@given(st.text(), st.lists(st.text(min_size=1, max_size=8), max_size=20))
def test_unknown_takes_any_name(name: str, known: list[str]) -> None:
    assert repr(name) in str(errors.unknown("key", name, known))


def test_two_sizes_never_look_alike() -> None:
    assert errors.sizes(1500, 3e9) == ("1.5 kB", "3 GB")
    assert errors.sizes(1_000_100, 1_000_200) == ("1,000,100 bytes", "1,000,200 bytes")
