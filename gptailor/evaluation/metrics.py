"""Metrics of tasks and groups: lists them, resolves their names, and computes them from answers.

A key is lm-eval's name of a metric with its filter: "acc,none", "exact_match,strict-match".
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from numbers import Real
from typing import Any

from gptailor.errors import UsageError, unknown
from gptailor.evaluation.per_document import document_values

Documents = Sequence[tuple[int, Any]]
"""Documents in lm-eval's form: (index among the documents that are answered, document)."""

_TRIED = 10
"""A metric that is missing from this many documents counts as not given by the task."""


def judged(task: Any, documents: Documents) -> dict[tuple[str, str], list[Any]]:
    """(metric, filter) → each document's value, from the filtered answers in the instances."""
    by_document: dict[int, list[Any]] = defaultdict(list)
    for instance in task.instances:
        by_document[instance.doc_id].append(instance)
    values: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for filter_name in task.instances[0].filtered_resps:
        for doc_id, document in documents:
            instances = sorted(by_document[doc_id], key=lambda i: i.idx)
            answers = [i.filtered_resps[filter_name] for i in instances]
            for metric, value in task.process_results(document, answers).items():
                values[metric, filter_name].append(value)
    return values


def task_metrics(name: str, task: Any, documents: Documents) -> dict[str, Any]:
    """What lm-eval computes for one task from the answers in its instances."""
    task.apply_filters()
    values = judged(task, documents)
    metrics: dict[str, Any] = {"name": name, "alias": name}
    metrics["sample_len"] = max(len(items) for items in values.values())
    metrics["values"] = {}
    for (metric, filter_name), items in values.items():
        aggregate = aggregation(task, metric)
        try:
            metrics[f"{metric},{filter_name}"] = aggregate(items)
        except OverflowError:  # a perplexity of more than 1e308
            metrics[f"{metric},{filter_name}"] = math.inf
        metrics[f"{metric}_stderr,{filter_name}"] = _stderr(aggregate, items)
        metrics["values"][f"{metric},{filter_name}"] = document_values(aggregate, items)
    return metrics


def declared_keys(task: Any) -> list[str]:
    """The keys that a task's configuration declares, in its order."""
    filters = [f["name"] for f in task.dump_config().get("filter_list") or []] or ["none"]
    return [f"{metric},{name}" for metric in task.aggregation() for name in filters]


def given_keys(task: Any, documents: Documents) -> list[str]:
    """The keys that a task gives: those of its configuration first, then what its code adds.

    Dummy answers to a few documents are scored to find them, so errors in a task's own code show
    up before a model is run. The instances keep the dummy answers until they get others.
    """
    for instance in task.instances:
        instance.resps = [_any_answer(instance)] * instance.repeats
        instance.filtered_resps = {}
    task.apply_filters()
    declared = declared_keys(task)
    found: dict[str, list[Any]] = {}
    for document in deepcopy(documents[:_TRIED]):  # a task's code may change them
        values = judged(task, [document])
        found = {f"{metric},{name}": items for (metric, name), items in values.items()} | found
        if set(declared) <= set(found):
            break
    numbers = [key for key, items in found.items() if _gives_number(task, key, items)]
    return [k for k in declared if k in numbers] + [k for k in numbers if k not in declared]


def group_keys(group: Any, keys: Mapping[str, Sequence[str]]) -> list[str]:
    """The keys that a group aggregates and that any of its tasks gives, in the group's order.

    Args:
        group: lm-eval's group.
        keys: task → the keys that it gives.
    """
    there = [key for task in group.get_all_tasks() for key in keys[task.task_name]]
    found = []
    for rule in group.aggregate_metric_list or ():
        filters = rule.filter_list
        if filters is None:  # lm-eval takes all filters
            filters = sorted(
                {k.partition(",")[2] for k in there if k.startswith(f"{rule.metric},")}
            )
        found += [f"{rule.metric},{name}" for name in filters]
    return [key for key in dict.fromkeys(found) if key in there]


def common_keys(keys: Sequence[Sequence[str]]) -> list[str]:
    """The keys that several tasks have in common, in the first task's order."""
    return [key for key in keys[0] if all(key in others for others in keys)]


def choose_key(name: str, wanted: str | None, known: Sequence[str]) -> str:
    """Resolves a metric, with or without its filter, to a key; None means the first key.

    Raises:
        UsageError: there is no such metric.
    """
    if not known:
        raise UsageError(
            f"The task {name} has no metric that is a number in all of its tasks: correct its "
            "metric_list, or list the tasks of a group one by one."
        )
    matches = [k for k in known if wanted is None or wanted in (k, k.partition(",")[0])]
    if not matches:
        names = known if "," in str(wanted) else list(dict.fromkeys(k.split(",")[0] for k in known))
        raise unknown("metric", wanted, names, f"the task {name}")
    return matches[0]


def bottom_up(groups: Mapping[str, Any]) -> Iterator[Any]:
    """The groups that aggregate, children before their parents."""
    done: set[str] = set()

    def visit(group: Any) -> Iterator[Any]:
        if group.name not in done:
            done.add(group.name)
            for child in group.get_all_groups(recursive=False):
                yield from visit(child)
            if group.has_aggregation:
                yield group

    for group in groups.values():
        yield from visit(group)


def aggregation(task: Any, metric: str) -> Callable[[list[Any]], Any]:
    """The function that aggregates a metric's per-document values."""
    from lm_eval.api.metrics import mean

    found: Callable[[list[Any]], Any] = task.aggregation().get(metric, mean)
    return found


def _stderr(aggregate: Callable[[list[Any]], Any], items: list[Any]) -> float | str:
    """The standard error as lm-eval computes it; "N/A" where lm-eval would have to bootstrap."""
    from lm_eval.api.metrics import acc_all, acc_all_stderr, mean, mean_stderr

    closed = {mean: mean_stderr, acc_all: acc_all_stderr}.get(aggregate)
    return "N/A" if closed is None or len(items) < 2 else float(closed(items))


def _any_answer(instance: Any) -> Any:
    if instance.request_type == "loglikelihood":
        return -1.2345678 - instance.idx, False
    return "" if instance.request_type == "generate_until" else -123.45678


def _gives_number(task: Any, key: str, items: list[Any]) -> bool:
    """Whether a metric is a single number; true if these few documents can't tell."""
    try:
        value = aggregation(task, key.partition(",")[0])(items)
    except TypeError:
        return False
    except Exception:
        return True
    return isinstance(value, Real)
