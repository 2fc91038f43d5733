"""A parameter's setting: a number, a gradient over the layers, or a list of filters.

All three are represented as a list of cases, of which the first whose filter matches a tensor's
name counts. A number is a gradient of one step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gptailor.errors import UsageError, unknown
from gptailor.strict_yaml import truth


@dataclass(frozen=True)
class Case:
    """The values for tensors with `filter` in their names ("" for all), bottom layer to top."""

    filter: str
    values: tuple[float, ...]


Setting = tuple[Case, ...]


def parse_setting(value: object, where: str) -> Setting:
    """Reads the setting of a parameter.

    Raises:
        UsageError: it is neither a number nor a list of numbers nor a list of `{filter, value}`.
    """
    if isinstance(value, list) and value and all(isinstance(case, dict) for case in value):
        return tuple(_case(case, f"{where}[{i}]") for i, case in enumerate(value))
    if isinstance(value, dict):
        return (_case(value, where),)
    return (Case("", _values(value, where)),)


def value_of(setting: Setting, tensor: str, t: float, *, is_flag: bool = False) -> float | None:
    """The value for one tensor, or None if no filter matches.

    Args:
        setting: the parameter's setting.
        tensor: the tensor's full name.
        t: the position of its layer in the slice, from 0 to 1.
        is_flag: do not interpolate between true and false; the last step up to t counts.
    """
    for case in setting:
        if case.filter in tensor:
            if is_flag:
                return case.values[int(t * (len(case.values) - 1))]
            return _interpolated(case.values, t)
    return None


def _interpolated(values: Sequence[float], t: float) -> float:
    """The value at t of the piecewise linear curve through equally spaced values, in mergekit's
    arithmetic."""
    place = t * (len(values) - 1)
    below = int(place)
    above = min(len(values) - 1, below + 1)
    part = place - below
    return (1 - part) * values[below] + part * values[above]


def _case(case: dict[object, object], where: str) -> Case:
    for key in case:
        if key not in ("filter", "value"):
            raise unknown("key", key, ("filter", "value"), where)
    if "value" not in case:
        raise UsageError(f"{where}: the key 'value' is missing.")
    text = case.get("filter")
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{where}: filter is {text!r}, but must be part of a tensor's name.")
    return Case("" if text in (None, "*") else str(text), _values(case["value"], f"{where}: value"))


def _values(value: object, where: str) -> tuple[float, ...]:
    if isinstance(value, list):
        if not value:
            raise UsageError(f"{where} is an empty list: write at least one number.")
        return tuple(_number(item, f"{where}[{i}]") for i, item in enumerate(value))
    return (_number(value, where),)


def _number(value: object, where: str) -> float:
    """A finite float; text is accepted, because YAML 1.1 reads 1e-5 as text."""
    value = truth(value)
    try:
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{where} is {value!r:.40}, but must be a number.")
    return number
