"""The registry: declarations do not change by accident, and values are checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gptailor.errors import UsageError
from gptailor.merging.registry import METHODS, Method, Parameter, for_each, get_method

GOLDEN = Path(__file__).parents[1] / "golden" / "methods.txt"


def declared() -> Iterator[str]:
    """A line for each method, and one for each of its parameters."""
    for method in METHODS.values():
        low, high = method.min_sources, method.max_sources
        kind = "weights" if method.weighted else "models"
        yield f"{method.name}: {low} to {high} {kind}, base {method.base}"
        for p in method.parameters:
            traits = [p.kind, *["per source"] * p.per_source, *["late"] * p.is_late]
            yield f"  {p.name} = {p.default!r} in {p.low!r} to {p.high!r}, {', '.join(traits)}"


def test_defaults_and_bounds_have_not_changed() -> None:
    """Recipes depend on them. After a deliberate change, update the golden file."""
    assert "\n".join(declared()) + "\n" == GOLDEN.read_text()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_declarations_make_sense(method: Method) -> None:
    assert METHODS[method.name] is method
    assert method.formula
    assert any(digit.isdigit() for digit in method.paper)  # a year at least
    assert method.is_random == (method.name.partition("_")[0] in ("dare", "della"))
    for p in method.parameters:
        for value in (*p.search, *([] if p.default is None else [p.default])):
            shown = p.shown(value)
            assert p.checked(shown, "here") == value
            assert isinstance(shown, bool) == p.is_flag
    search = {p.name: p.shown(p.search[0]) for p in method.parameters}
    method.checked(search, "space", ["a", "b"])  # the values that a search tries fit together


def test_an_optional_base() -> None:
    nuslerp = get_method("nuslerp")
    assert not nuslerp.uses_base
    assert not nuslerp.takes_base({"task_vectors": 0.0})
    assert nuslerp.takes_base({"task_vectors": 1.0})
    assert get_method("ties").takes_base({})
    assert not get_method("karcher").takes_base({})


def test_values_for_each_source() -> None:
    ties = get_method("ties")
    found = ties.checked({"density": {"b": 0.5}}, "here", ["a", "b"])
    assert found == {"density": (1.0, 0.5), "lambda": 1.0, "normalize": 1.0, "rescale": 0.0}
    assert for_each(found["density"], 2) == (1.0, 0.5)
    assert for_each(0.3, 3) == (0.3, 0.3, 0.3)
    assert dict(ties.completed({"density": (0.5, 0.5)}))["density"] == 0.5


def refused(method: str, sources: list[str], **values: object) -> str:
    with pytest.raises(UsageError) as caught:
        get_method(method).checked(values, "here", sources)
    assert "here" in str(caught.value)
    return str(caught.value)


def test_what_is_refused() -> None:
    two = ["a", "b"]
    assert "did you mean 'abc'" in refused("ties", ["abc", "b"], density={"abd": 0.5})
    assert "density is 1.5, outside its bounds 0 to 1" in refused("ties", two, density={"a": 1.5})
    assert "lambda is one value, not one for each model" in refused("ties", two, **{"lambda": {}})
    assert "epsilon is one value" in refused("ram", two, epsilon={"a": 1e-5})
    assert "density is 'x', but must be a number" in refused("ties", two, density="x")
    assert "needs a value for t" in refused("nearswap", ["a"])
    assert "t is -1" in refused("nearswap", ["a"], t=-1)
    assert "seed is 1.5, but must be a whole number" in refused("dare_ties", two, seed=1.5)
    assert "seed is -1, outside" in refused("dare_ties", two, seed=-1)
    assert "max_iter is True, but must be a number" in refused("karcher", two, max_iter=True)
    assert "filter_wise is 1, but must be true" in refused("model_stock", two, filter_wise=1)
    together = "density 0.9 and epsilon 0.15 do not fit together"
    assert together in refused("della", two, density=0.9)
    assert together in refused("della_linear", two, density={"a": 0.5, "b": 0.9})
    assert "density 0.1 and epsilon 0.1" in refused("della", two, density=0.1, epsilon=0.1)
    get_method("della").checked({"density": {"a": 0.0}, "epsilon": 0.6}, "here", two)


def test_a_parameter_without_a_default_needs_a_value_for_each_source() -> None:
    parameter = Parameter("x", None, 0.0, 1.0, (0.5,), "", per_source=True)
    assert parameter.checked_values({"a": 0, "b": 1}, ["a", "b"], "here") == (0.0, 1.0)
    with pytest.raises(UsageError, match="x needs a value for each model"):
        parameter.checked_values({"a": 0}, ["a", "b"], "here")
