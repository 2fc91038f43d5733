"""The parts of a score: each document's value, the tasks' weights in it, and what guessing gives.

With these, two models can be compared on the same documents, and scores near chance are recognized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

MIN_ANSWERS = 10
"""With fewer distinct answers, free text may be guessed at an unknown rate."""

_BY_CHOICE = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info"}
_TOLERANCE = 1e-9


def document_values(aggregate: Callable[..., Any], items: Sequence[Any]) -> tuple[float, ...]:
    """The values whose mean a metric is; empty if it is any other function of its items."""
    from lm_eval.api.metrics import mean

    if aggregate is not mean:
        return ()
    try:
        values = tuple(float(item) for item in items)
    except (TypeError, ValueError):
        return ()
    return values if all(map(math.isfinite, values)) else ()


def leaf_shares(
    group: Any | None, leaves: Sequence[str], key: str, results: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, float]]:
    """The tasks that a score is the mean of, with their weights, which add up to 1.

    Args:
        group: lm-eval's group, which aggregates its tasks itself; None to weight tasks by their
            number of documents.
        leaves: the tasks, in order; those without the metric are left out.
        key: lm-eval's key of the metric.
        results: the tasks' results, as `Workload.run` returns them.
    """
    sizes = {name: results[name]["sample_len"] for name in leaves if key in results[name]}
    weights = sizes
    metric, _, filter_name = key.partition(",")
    for rule in (group.aggregate_metric_list or ()) if group is not None else ():
        if rule.metric == metric and filter_name in (rule.filter_list or [filter_name]):
            weights = sizes if rule.weight_by_size else dict.fromkeys(sizes, 1)
    total = sum(weights.values())
    return [(name, weight / total) for name, weight in weights.items()]


def joined(
    shares: Sequence[tuple[str, float]],
    key: str,
    value: float,
    results: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[float, ...], tuple[tuple[int, float], ...]]:
    """`Score.values` and `Score.leaves`; empty unless they reproduce `value`."""
    parts = [(results[name]["values"].get(key, ()), weight) for name, weight in shares]
    if not parts or not all(values for values, _ in parts):
        return (), ()
    mean = sum(weight * sum(values) / len(values) for values, weight in parts)
    if not math.isclose(mean, value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
        return (), ()
    leaves = tuple((len(values), weight) for values, weight in parts)
    together = tuple(number for values, _ in parts for number in values)
    return together, leaves if len(leaves) > 1 else ()


def chance(task: Any, metric: str, documents: Iterable[Any]) -> float | None:
    """What guessing gives on average: 1/n for n choices, 0 for free text, None if unknown.

    Args:
        task: lm-eval's task.
        metric: the metric's name, without the filter.
        documents: the task's documents.
    """
    kind = getattr(task, "OUTPUT_TYPE", None)
    is_own = callable(task.get_config("process_results"))
    try:
        if kind == "multiple_choice" and metric in _BY_CHOICE and not is_own:
            parts = [_right_choices(task, document) for document in documents]
            return sum(parts) / len(parts)
        if kind == "generate_until" and metric == "exact_match":
            if task.get_config("doc_to_choice") is not None:
                parts = [1.0 / len(task.doc_to_choice(document)) for document in documents]
                return sum(parts) / len(parts)
        elif (kind, metric) != ("loglikelihood", "acc"):
            return None
        answers = {repr(task.doc_to_target(document)) for document in documents}
        return 0.0 if len(answers) >= MIN_ANSWERS else None
    except Exception:  # a task's own functions may raise anything; the score doesn't need chance
        return None


def _right_choices(task: Any, document: Any) -> float:
    """The fraction of a document's choices that is right."""
    choices = len(task.doc_to_choice(document))
    if not task.multiple_target:
        return 1.0 / choices
    return len({i for i in task.doc_to_target(document) if 0 <= i < choices}) / choices
