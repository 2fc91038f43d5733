"""Which keys of a configuration may change while a run goes on, and which one did."""

from __future__ import annotations

MAY_CHANGE = (
    "search.evaluations", "evaluation.batch_size", "evaluation.candidates_gib", "output",
)  # fmt: skip


def config_difference(old: object, new: object, path: str = "") -> str:
    """The first key of two configurations that differs and may not; empty if there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            found = config_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return ""
    return "" if old == new or path in MAY_CHANGE else f"{path} was {old!r}, but is {new!r}"
