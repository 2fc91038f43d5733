"""A workload: the requests of a set of lm-eval tasks, built once and answered by every recipe.

lm-eval's own Task objects make the requests, read the answers and aggregate the metrics; this
module keeps them from doing anything twice. It leaves the answers to a `ResidentLM`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptailor.archive import Score
from gptailor.config import EvaluationConfig, TaskSpec
from gptailor.errors import UsageError, unknown
from gptailor.evaluation import per_document

_LM_EVAL_SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""The seeds that `lm_eval.simple_evaluate` sets before it builds requests."""


class Workload:
    """Tasks with their requests.

    Args:
        specs: the tasks, groups or tags.
        config: include path, chat template and the like.
        lm: gives the chat template and its tokenizer's name; a `ResidentLM`.
        num_documents: how many documents in all, None for all that there are.
        seed: of the choice of documents.
        comparable: refuse metrics of which less is better (they can't be part of an accuracy).

    Raises:
        UsageError: a task or metric is unknown, or its data can't be had.
    """

    def __init__(
        self,
        specs: Sequence[TaskSpec],
        config: EvaluationConfig,
        lm: Any,
        *,
        num_documents: int | None = None,
        seed: int = 0,
        comparable: bool = True,
    ) -> None:
        self.specs = tuple(specs)
        self._tasks: dict[str, Any] = {}
        self._groups: dict[str, Any] = {}
        self._parts: dict[str, tuple[str, ...]] = {}
        with _quiet(), _seeded():
            self._load(config.include_path)
            samples = choose_documents(
                {name: len(task.eval_docs) for name, task in self._tasks.items()},
                num_documents,
                seed,
            )
            for name, task in self._tasks.items():
                task.build_all_requests(
                    samples=samples[name],
                    rank=0,
                    world_size=1,
                    system_instruction=config.system_instruction,
                    apply_chat_template=config.apply_chat_template,
                    fewshot_as_multiturn=config.fewshot_as_multiturn,
                    chat_template=lm.apply_chat_template if config.apply_chat_template else None,
                    tokenizer_name=lm.tokenizer_name if config.apply_chat_template else "",
                )
        self._samples = samples
        self._documents = {
            name: list(task.doc_iterator(rank=0, world_size=1, samples=samples[name]))
            for name, task in self._tasks.items()
        }
        self._metrics = {spec.task: self._metric(spec, comparable) for spec in self.specs}
        self._chances: dict[tuple[str, str], float | None] = {}  # (task, metric) → known so far

    @property
    def num_documents(self) -> int:
        """Documents that one evaluation answers."""
        return sum(len(documents) for documents in self._documents.values())

    @property
    def task_names(self) -> set[str]:
        """All tasks, those of groups and tags included."""
        return set(self._tasks)

    @property
    def digest(self) -> str:
        """Changes when tasks, metrics, few-shot examples or documents do (16 hex digits)."""
        requests = [
            [name, instance.request_type, instance.doc_id, repr(instance.args)]
            for name, task in self._tasks.items()
            for instance in task.instances
        ]
        text = json.dumps([self._metrics, requests, self._documents], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def contexts(self, lm: Any, count: int) -> list[list[int]]:
        """Tokens of `count` contexts with their continuations, spread evenly over the tasks."""
        texts: list[str] = []
        per_task = max(count // len(self._tasks), 1)
        for task in self._tasks.values():
            first = {
                i.doc_id: "".join(a for a in i.args if isinstance(a, str))
                for i in reversed(task.instances)
            }
            texts += [first[doc_id] for doc_id in sorted(first)][:per_task]
        encoded = [lm.tok_encode(text)[: lm.max_length] for text in texts]
        return [tokens for tokens in encoded if tokens]

    def run(self, lm: Any) -> dict[str, dict[str, Any]]:
        """Answers every request and aggregates: task or group → lm-eval's metrics.

        Args:
            lm: answers the requests; any `lm_eval.api.model.LM`.

        Returns:
            As `results` of lm-eval: `{"task": {"acc,none": 0.5, "acc_stderr,none": 0.01, …}}`. A
            task (no group) also has "values": key of a metric → `Score.values`.
        """
        with _seeded():  # tasks that sample do so from the same state for every recipe
            return self._answered(lm)

    def requests(self) -> dict[str, list[Any]]:
        """Kind of request → lm-eval's instances, each as often as it is to be answered."""
        found: dict[str, list[Any]] = defaultdict(list)
        for task in self._tasks.values():
            for instance in task.instances:
                found[instance.request_type].extend([instance] * instance.repeats)
        return dict(found)

    def _answered(self, lm: Any) -> dict[str, dict[str, Any]]:
        requests = self.requests()
        for instances in requests.values():
            for instance in instances:
                instance.resps = []
                instance.filtered_resps = {}
        for request_type, instances in requests.items():
            answers = getattr(lm, request_type)(instances)
            for instance, answer in zip(instances, answers, strict=True):
                instance.resps.append(answer)
        results = {name: self._task_metrics(name, task) for name, task in self._tasks.items()}
        for group in _bottom_up(self._groups):
            results[group.name] = group.aggregate(results)
        return results

    def scores(self, results: Mapping[str, Mapping[str, Any]]) -> tuple[Score, ...]:
        """The scores that were asked for, one for each spec, out of what `run` gave."""
        scores = []
        for spec in self.specs:
            key = self._metrics[spec.task]
            name, _, filter_name = key.partition(",")
            parts = [results[part] for part in self._parts[spec.task]]
            weights = [part["sample_len"] for part in parts]
            values = [float(part[key]) for part in parts]
            errors = [part.get(f"{name}_stderr,{filter_name}") for part in parts]
            total = sum(weights)
            stderr = None
            if all(isinstance(e, float) and math.isfinite(e) for e in errors):
                terms = zip(errors, weights, strict=True)
                stderr = math.sqrt(sum((e * w / total) ** 2 for e, w in terms))
            value = sum(v * w for v, w in zip(values, weights, strict=True)) / total
            if not math.isfinite(value):
                raise FloatingPointError(f"{key} of {spec.task} is not a finite number")
            shares = self._shares(spec.task, key, results)
            by_document = per_document.joined(shares, key, value, results)
            chance = self._chance(shares, name)
            scores.append(
                Score(spec.task, key, value, stderr, total, spec.weight, *by_document, chance)
            )
        return tuple(scores)

    def _shares(
        self, name: str, key: str, results: Mapping[str, Mapping[str, Any]]
    ) -> list[tuple[str, float]]:
        """The tasks that a score is the mean of, with their weights."""
        group = self._groups.get(name) if self._parts[name] == (name,) else None
        if group is not None:
            leaves = [task.task_name for task in group.get_all_tasks()]
            return per_document.leaf_shares(group, leaves, key, results)
        return per_document.leaf_shares(None, self._parts[name], key, results)

    def _chance(self, shares: Sequence[tuple[str, float]], metric: str) -> float | None:
        """What guessing gives, in the same mean; None where one of the tasks does not tell."""
        total = 0.0
        for name, weight in shares:
            if (name, metric) not in self._chances:
                documents = [document for _, document in self._documents[name]]
                self._chances[name, metric] = per_document.chance(
                    self._tasks[name], metric, documents
                )
            found = self._chances[name, metric]
            if found is None:
                return None
            total += weight * found
        return total

    def _load(self, include_path: str | None) -> None:
        manager = task_manager(include_path, [spec.task for spec in self.specs])
        for spec in self.specs:
            if spec.task not in manager.all_tasks:
                raise unknown("task", spec.task, manager.all_tasks, "evaluation.tasks")
            try:
                loaded = manager.load([spec.task])
            except Exception as error:  # whatever a dataset's loader raises
                reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
                raise UsageError(
                    f"The task {spec.task} can't be loaded: {reason[0]} (offline? run "
                    "where there is a network first)."
                ) from error
            for name, task in loaded["tasks"].items():
                if name in self._tasks:
                    raise UsageError(f"The task {name} is named twice (by {spec.task}, too).")
                _configure(task, spec)
                self._tasks[name] = task
            self._groups |= loaded.get("groups", {})
            own = spec.task in loaded["tasks"] or _has_aggregate(loaded, spec.task)
            self._parts[spec.task] = (spec.task,) if own else tuple(loaded["tasks"])

    def _metric(self, spec: TaskSpec, comparable: bool) -> str:
        """The full key of the metric that a spec asks for."""
        leaves = [task for name, task in self._tasks.items() if name in self._leaves(spec.task)]
        known = [key for key in _metric_keys(leaves[0]) if _in_all(key, leaves)]
        wanted = spec.metric
        matches = [k for k in known if wanted is None or wanted in (k, k.partition(",")[0])]
        if not matches:
            names = known if "," in str(wanted) else [k.partition(",")[0] for k in known]
            raise unknown("metric", wanted, names, f"the task {spec.task}")
        key = matches[0]
        higher = leaves[0].higher_is_better().get(key.partition(",")[0], True)
        if comparable and not higher:
            raise UsageError(
                f"The metric {key} of the task {spec.task} is better when it is lower, so it "
                f"can't be part of an accuracy. Known: {', '.join(known)}."
            )
        return key

    def _leaves(self, name: str) -> set[str]:
        if name in self._tasks:
            return {name}
        if name in self._groups:
            return {task.task_name for task in self._groups[name].get_all_tasks()}
        return set(self._parts[name])

    def _task_metrics(self, name: str, task: Any) -> dict[str, Any]:
        """What lm-eval computes for one task from the answers in its instances."""
        task.apply_filters()
        by_document: dict[int, list[Any]] = defaultdict(list)
        for instance in task.instances:
            by_document[instance.doc_id].append(instance)
        values: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for filter_name in task.instances[0].filtered_resps:
            for doc_id, document in self._documents[name]:
                instances = sorted(by_document[doc_id], key=lambda i: i.idx)
                answers = [i.filtered_resps[filter_name] for i in instances]
                for metric, value in task.process_results(document, answers).items():
                    values[metric, filter_name].append(value)
        metrics: dict[str, Any] = {"name": name, "alias": name}
        metrics["sample_len"] = max(len(items) for items in values.values())
        metrics["values"] = {}
        for (metric, filter_name), items in values.items():
            aggregate = _aggregation(task, metric)
            metrics[f"{metric},{filter_name}"] = aggregate(items)
            metrics[f"{metric}_stderr,{filter_name}"] = _stderr(aggregate, items)
            found = per_document.document_values(aggregate, items)
            metrics["values"][f"{metric},{filter_name}"] = found
        return metrics


def open_workloads(
    config: EvaluationConfig, lm: Any, *, seed: int, comparable: bool = True
) -> dict[str, Workload]:
    """ "search" and, if there is one, "holdout" → its workload.

    Args:
        config: of the evaluations.
        lm: as for `Workload`.
        seed: of the choice of documents.
        comparable: refuse metrics that can't be part of an accuracy.

    Raises:
        UsageError: as `Workload`, or the holdout has a task of the search.
    """
    rung = config.rungs[-1] if config.rungs else None
    search = Workload(
        config.tasks, config, lm, num_documents=rung, seed=seed, comparable=comparable
    )
    if config.holdout is None:
        return {"search": search}
    holdout = Workload(config.holdout.tasks, config, lm, comparable=comparable)
    seen = search.task_names & holdout.task_names
    if seen:
        raise UsageError(f"The task {min(seen)} is part of the search, so it is no holdout.")
    return {"search": search, "holdout": holdout}


def choose_documents(
    sizes: Mapping[str, int], num_documents: int | None, seed: int
) -> dict[str, set[int] | None]:
    """A nested, seeded choice: every task has its share, and more documents include fewer.

    Args:
        sizes: task → number of its documents.
        num_documents: how many in all; None for all that there are.
        seed: of the choice; a task's choice does not depend on the other tasks.

    Returns:
        task → indices of its documents; None for all of them.
    """
    if num_documents is None or num_documents >= sum(sizes.values()):
        return dict.fromkeys(sizes)
    shares = dict.fromkeys(sizes, 0)
    left = max(num_documents, len(sizes))
    while left > 0:
        open_tasks = [name for name in sizes if shares[name] < sizes[name]]
        step = max(left // len(open_tasks), 1)
        for name in open_tasks[:left]:
            taken = min(step, sizes[name] - shares[name])
            shares[name] += taken
            left -= taken
    chosen: dict[str, set[int] | None] = {}
    for name, size in sizes.items():
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        chosen[name] = set(generator.permutation(size)[: shares[name]].tolist())
    return chosen


def task_manager(include_path: str | None, names: Sequence[str]) -> Any:
    """lm-eval's index of tasks: the own folder's only, if that has all (it is much quicker)."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(name in manager.all_tasks for name in names):
            return manager
    return TaskManager(include_path=include_path)


def _configure(task: Any, spec: TaskSpec) -> None:
    """What `simple_evaluate` does to a task before it is used."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(
            f"The task {spec.task} runs code that a model wrote, which gptailor does not do."
        )
    if spec.num_fewshot and task.get_config("num_fewshot") == 0:
        raise UsageError(
            f"The task {spec.task} sets num_fewshot to 0 itself, and lm-eval keeps to that: leave "
            "num_fewshot out."
        )
    if spec.num_fewshot is not None:
        task.set_config(key="num_fewshot", value=spec.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_LM_EVAL_SEEDS["fewshot"])


def _metric_keys(task: Any) -> list[str]:
    """lm-eval's keys of a task's metrics, in the order of its configuration."""
    filters = [f["name"] for f in task.dump_config().get("filter_list") or []] or ["none"]
    return [f"{metric},{name}" for metric in task.aggregation() for name in filters]


def _in_all(key: str, tasks: Sequence[Any]) -> bool:
    return all(key in _metric_keys(task) for task in tasks)


def _has_aggregate(loaded: Mapping[str, Any], name: str) -> bool:
    group = loaded.get("groups", {}).get(name)
    return group is not None and bool(group.has_aggregation)


def _bottom_up(groups: Mapping[str, Any]) -> Iterator[Any]:
    """Groups that aggregate, children before their parents."""
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


def _aggregation(task: Any, metric: str) -> Callable[[list[Any]], Any]:
    from lm_eval.api.metrics import mean

    found: Callable[[list[Any]], Any] = task.aggregation().get(metric, mean)
    return found


def _stderr(aggregate: Callable[[list[Any]], Any], items: list[Any]) -> float | str:
    """The standard error of a mean, as lm-eval's; "N/A" for what it would have to bootstrap."""
    from lm_eval.api.metrics import mean, mean_stderr

    return float(mean_stderr(items)) if aggregate is mean and len(items) > 1 else "N/A"


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Global generators as lm-eval seeds them, and afterwards as they were."""
    import torch

    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    random.seed(_LM_EVAL_SEEDS["random"])
    np.random.seed(_LM_EVAL_SEEDS["numpy"])  # noqa: NPY002
    torch.manual_seed(_LM_EVAL_SEEDS["torch"])
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.random.set_rng_state(states[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's and datasets' progress bars and notes stay out of a search's output."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
