"""Computes the requested scores: a task's, a group's by its own aggregation, a tag's as a mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gptailor.config import TaskSpec
from gptailor.errors import UsageError
from gptailor.evaluation import metrics, per_document
from gptailor.evaluation.outcome import Score
from gptailor.evaluation.tasks import TaskSet

Results = Mapping[str, Mapping[str, Any]]
"""In the form of lm-eval's `results`: task or group → key of a metric → value."""


class Scoring:
    """Makes scores out of results.

    Args:
        tasks: the loaded tasks.
        keys: task → the keys that it gives.
        documents: task → its documents.
    """

    def __init__(
        self,
        tasks: TaskSet,
        keys: Mapping[str, Sequence[str]],
        documents: Mapping[str, metrics.Documents],
    ) -> None:
        self._set = tasks
        self._keys = keys
        self._documents = documents
        self._chances: dict[tuple[str, str], float | None] = {}  # (task, metric) → known so far

    def known(self, name: str) -> list[str]:
        """The keys of a task, group or tag, the default one first."""
        parts = self._parts(name)
        if name in self._set.tasks or parts != (name,):
            return metrics.common_keys([self._keys[part] for part in parts])
        return metrics.group_keys(self._set.groups[name], self._keys)

    def choose(self, spec: TaskSpec, *, comparable: bool) -> str:
        """The key of the requested metric.

        Args:
            spec: the requested task and metric.
            comparable: refuse a metric that is better when it is lower.

        Raises:
            UsageError: there is no such metric, or it is not comparable.
        """
        known = self.known(spec.task)
        key = metrics.choose_key(spec.task, spec.metric, known)
        if comparable and self.is_lower_better(spec.task, key):
            raise UsageError(
                f"The metric {key} of the task {spec.task} is better when it is lower, so it "
                f"can't be part of an accuracy. Known: {', '.join(known)}."
            )
        return key

    def is_lower_better(self, name: str, key: str) -> bool:
        """Whether less is better in a metric of a task, group or tag."""
        leaf = next(one for one in self._set.members[name] if key in self._keys[one])
        return not self._set.tasks[leaf].higher_is_better().get(key.partition(",")[0], True)

    def inside(self, name: str) -> list[str]:
        """A task, group or tag itself, then the groups and tasks in it."""
        group = self._set.groups.get(name)
        groups = [g.name for g in group.get_all_groups()] if group is not None else []
        return list(dict.fromkeys([name, *groups, *self._set.members[name]]))

    def score(self, name: str, key: str, results: Results, weight: float = 1.0) -> Score:
        """The score of a task, group or tag; its value may not be finite."""
        metric, _, filter_name = key.partition(",")
        parts = [results[part] for part in self._parts(name)]
        weights = [part["sample_len"] for part in parts]
        values = [float(part[key]) for part in parts]
        errors = [part.get(f"{metric}_stderr,{filter_name}") for part in parts]
        total = sum(weights)
        stderr = None
        if all(isinstance(e, float) and math.isfinite(e) for e in errors):
            terms = zip(errors, weights, strict=True)
            stderr = math.sqrt(sum((e * w / total) ** 2 for e, w in terms))
        value = sum(v * w for v, w in zip(values, weights, strict=True)) / total
        shares = self._shares(name, key, results)
        by_document = per_document.joined(shares, key, value, results)
        chance = self._chance(shares, metric)
        return Score(name, key, value, stderr, total, weight, *by_document, chance)

    def _parts(self, name: str) -> tuple[str, ...]:
        """The parts whose mean a score is: a task or group itself, or the tasks of a tag.

        A group whose rules fit none of its tasks has no score in lm-eval and counts as a tag.
        """
        group = self._set.groups.get(name)
        if name in self._set.tasks or (group and metrics.group_keys(group, self._keys)):
            return (name,)
        if group is not None:
            return tuple(dict.fromkeys(task.task_name for task in group.get_all_tasks()))
        return self._set.members[name]

    def _shares(self, name: str, key: str, results: Results) -> list[tuple[str, float]]:
        """The tasks that a score is the mean of, with their weights."""
        parts = self._parts(name)
        group = self._set.groups.get(name) if parts == (name,) else None
        if group is not None:
            leaves = [task.task_name for task in group.get_all_tasks()]
            return per_document.leaf_shares(group, leaves, key, results)
        return per_document.leaf_shares(None, parts, key, results)

    def _chance(self, shares: Sequence[tuple[str, float]], metric: str) -> float | None:
        """What guessing gives, averaged with the same weights; None if unknown for any task."""
        total = 0.0
        for name, weight in shares:
            if (name, metric) not in self._chances:
                documents = [document for _, document in self._documents[name]]
                self._chances[name, metric] = per_document.chance(
                    self._set.tasks[name], metric, documents
                )
            found = self._chances[name, metric]
            if found is None:
                return None
            total += weight * found
        return total
