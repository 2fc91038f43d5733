"""Compares configurations of one run; some keys may change between its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptailor.config import renamed_keys

MAY_CHANGE = (
    "search.evaluations", "evaluation.batch_size", "evaluation.candidates_gib", "output",
)  # fmt: skip


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first key that differs between two configurations and may not; empty if there is none.

    `evaluation.dtype: auto` in the new one matches whatever the run has. Either may use the key
    names of an earlier version.
    """
    (old, _), (new, _) = (renamed_keys(with_repair_known(one)) for one in (old, new))
    evaluation = new.get("evaluation")
    if isinstance(evaluation, Mapping):
        theirs = dtype_of(old)
        mine = evaluation.get("dtype", "auto")
        new = {**new, "evaluation": {**evaluation, "dtype": theirs if mine == "auto" else mine}}
        old = {**old, "evaluation": {**old.get("evaluation", {}), "dtype": theirs}}
    return _difference(old, new, "")


def with_repair_known(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration with `space.repair`: runs of earlier versions repaired nothing."""
    space = config.get("space")
    return {**config, "space": {"repair": False, **(space if isinstance(space, Mapping) else {})}}


def dtype_of(config: Mapping[str, Any]) -> str:
    """The dtype in which a run's evaluations were computed, from its stored configuration.

    Runs of earlier versions stored "auto", and computed in the recipes' dtype.
    """
    found = config.get("evaluation", {}).get("dtype", "auto")
    return str(config.get("space", {}).get("dtype", "bfloat16") if found == "auto" else found)


def _difference(old: object, new: object, path: str) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            found = _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next(filter(None, (_difference(a, b, f"{path}.{i}") for i, (a, b) in pairs)), "")
    return "" if old == new or path in MAY_CHANGE else f"{path} was {old!r}, but is {new!r}"
