"""A workload: the requests of a set of lm-eval tasks, built once and answered by every recipe.

lm-eval's own Task objects make the requests, read the answers and aggregate the metrics; this
module avoids doing anything twice. A `ResidentLM` gives the answers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from gptailor.config import EvaluationConfig, TaskSpec
from gptailor.errors import UsageError
from gptailor.evaluation import metrics
from gptailor.evaluation.documents import choose_after, choose_documents, limited, telling
from gptailor.evaluation.outcome import Documents, Score
from gptailor.evaluation.requests import Asked, check_requests
from gptailor.evaluation.scoring import Results, Scoring
from gptailor.evaluation.surroundings import quiet, seeded
from gptailor.evaluation.task_errors import code_failed
from gptailor.evaluation.tasks import load_tasks


class Workload:
    """Tasks with their requests.

    Args:
        specs: the tasks, groups or tags.
        config: include path, chat template and the like.
        lm: has the chat template and the tokenizer's name; a `ResidentLM`.
        num_documents: how many documents in all; None for all of them.
        skip: choose them after this many, which are another workload's with the same seed.
        seed: for the choice of documents.
        comparable: refuse metrics that are better when lower (they can't be part of an accuracy)
            unless the task has weight 0.
        few: use only this many documents of each task, those most likely to be refused.

    Raises:
        UsageError: a task or metric is unknown, its data can't be loaded, or its code fails.
    """

    def __init__(
        self,
        specs: Sequence[TaskSpec],
        config: EvaluationConfig,
        lm: Any,
        *,
        num_documents: int | None = None,
        skip: int = 0,
        seed: int = 0,
        comparable: bool = True,
        few: int | None = None,
    ) -> None:
        self.specs = tuple(specs)
        with quiet(), seeded():
            self._set = load_tasks(specs, config.include_path)
            self._tasks, self._groups = self._set.tasks, self._set.groups
            self._samples = self._choose(num_documents, skip, seed, few)
            for name in self._tasks:
                self._build_requests(name, config, lm)
            self._documents = {
                name: list(task.doc_iterator(rank=0, world_size=1, samples=self._samples[name]))
                for name, task in self._tasks.items()
            }
            keys = {name: self._given_keys(name) for name in self._tasks}
        self._scoring = Scoring(self._set, keys, self._documents)
        self._metrics = {
            spec.task: self._scoring.choose(spec, comparable=comparable and spec.weight > 0)
            for spec in self.specs
        }

    @property
    def num_documents(self) -> int:
        """The number of documents in one evaluation."""
        return sum(len(documents) for documents in self._documents.values())

    @property
    def task_names(self) -> set[str]:
        """All tasks, including those of groups and tags."""
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

    def members(self, name: str) -> tuple[str, ...]:
        """The tasks that a requested name stands for."""
        return self._set.members[name]

    def is_lower_better(self, name: str) -> bool:
        """Whether less is better in the metric of a requested task."""
        return self._scoring.is_lower_better(name, self._metrics[name])

    def instances(self, task: str) -> list[Any]:
        """lm-eval's requests of one task."""
        return list(self._tasks[task].instances)

    def documents(self, task: str) -> list[Any]:
        """The documents of one task that are answered."""
        return [document for _, document in self._documents[task]]

    def reference(self, task: str, instance: Any) -> str:
        """The reference answer of a request's document, as it follows its context in a few-shot
        example; empty unless it is a text."""
        try:
            found = self._tasks[task].doc_to_target(instance.doc)
            delimiter = self._tasks[task].config.target_delimiter
        except Exception:  # a task's own function; the request without an answer is still useful
            return ""
        if not isinstance(found, str) or not found:
            return ""
        is_apart = instance.args[0][-1:].isspace() or found[0].isspace()
        return found if is_apart else f"{delimiter}{found}"

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

    def check_requests(self, lm: Any) -> None:
        """Raises a `UsageError` for a request that the model can't answer; nothing is run."""
        with quiet():
            check_requests(self._asked(), lm)

    def run(self, lm: Any) -> dict[str, dict[str, Any]]:
        """Answers every request and aggregates: task or group → lm-eval's metrics.

        Args:
            lm: answers the requests; any `lm_eval.api.model.LM`.

        Returns:
            Like lm-eval's `results`: `{"task": {"acc,none": 0.5, "acc_stderr,none": 0.01, …}}`. A
            task (not a group) also has "values": key of a metric → `Score.values`.

        Raises:
            TaskError: a task's own code can't judge an answer.
        """
        with seeded():  # so that tasks that sample start in the same state for every recipe
            return self._answered(lm)

    def requests(self) -> dict[str, list[Any]]:
        """Kind of request → lm-eval's instances, each repeated as often as it must be answered."""
        found: dict[str, list[Any]] = defaultdict(list)
        for task in self._tasks.values():
            for instance in task.instances:
                found[instance.request_type].extend([instance] * instance.repeats)
        return dict(found)

    def scores(self, results: Results) -> tuple[Score, ...]:
        """The requested scores, one for each spec, from what `run` returned.

        Raises:
            FloatingPointError: one that counts is not a finite number.
        """
        scores = []
        for spec in self.specs:
            key = self._metrics[spec.task]
            score = self._scoring.score(spec.task, key, results, spec.weight)
            if score.counts and not math.isfinite(score.value):
                raise FloatingPointError(f"{key} of {spec.task} is not a finite number")
            scores.append(score)
        return tuple(scores)

    def all_scores(self, results: Results) -> tuple[Score, ...]:
        """Every metric of everything requested, and of the tasks and groups in it.

        The metric that `scores` uses comes first. A value may not be finite.
        """
        found: dict[tuple[str, str], Score] = {}
        for spec in self.specs:
            inside = self._scoring.inside(spec.task)
            every = [(name, key) for name in inside for key in self._scoring.known(name)]
            for name, key in [(spec.task, self._metrics[spec.task]), *every]:
                if (name, key) not in found:
                    found[name, key] = self._scoring.score(name, key, results, spec.weight)
        return tuple(found.values())

    def _choose(
        self, num_documents: int | None, skip: int, seed: int, few: int | None
    ) -> dict[str, set[int] | None]:
        """task → indices of the documents that are answered; None for all of them."""
        documents = {name: task.eval_docs for name, task in self._tasks.items()}
        sizes = {name: len(found) for name, found in documents.items()}
        allowed = {name: limited(size, self._set.limits[name]) for name, size in sizes.items()}
        chosen: dict[str, set[int] | None]
        if skip and num_documents is not None:
            chosen = {**choose_after(allowed, skip, num_documents, seed)}
        else:
            chosen = choose_documents(allowed, num_documents, seed)
        for name, size in allowed.items():
            if skip and chosen[name] == set():  # lm-eval would take all of them
                raise UsageError(
                    f"The task {name} has no documents left besides the {skip} that are scored: "
                    "score fewer (evaluation.rungs), or name other tasks or a text."
                )
            if chosen[name] is None and size < sizes[name]:
                chosen[name] = set(range(size))
            if few is not None:
                indices = chosen[name]
                every = range(size) if indices is None else indices
                chosen[name] = telling(documents[name], every, few)
        return chosen

    def _build_requests(self, name: str, config: EvaluationConfig, lm: Any) -> None:
        has_template = config.apply_chat_template
        try:
            self._tasks[name].build_all_requests(
                samples=self._samples[name],
                rank=0,
                world_size=1,
                system_instruction=config.system_instruction,
                apply_chat_template=has_template,
                fewshot_as_multiturn=config.fewshot_as_multiturn,
                chat_template=lm.apply_chat_template if has_template else None,
                tokenizer_name=lm.tokenizer_name if has_template else "",
            )
        except Exception as error:
            raise code_failed(name, "make its requests", error) from error

    def _asked(self) -> Iterator[Asked]:
        """The requests with their tasks and document indices."""
        for name, task in self._tasks.items():
            chosen = self._samples[name]
            places = None if chosen is None else sorted(chosen)
            for instance in task.instances:
                number = instance.doc_id
                yield Asked(name, number if places is None else places[number], instance)

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
        results: dict[str, dict[str, Any]] = {}
        for name, task in self._tasks.items():
            try:
                results[name] = metrics.task_metrics(name, task, self._documents[name])
            except Exception as error:
                raise code_failed(name, "judge an answer", error) from error
        for group in metrics.bottom_up(self._groups):
            results[group.name] = group.aggregate(results)
        return results

    def _given_keys(self, name: str) -> list[str]:
        try:
            return metrics.given_keys(self._tasks[name], self._documents[name])
        except Exception as error:
            raise code_failed(name, "judge an answer", error) from error


def open_workloads(
    config: EvaluationConfig,
    lm: Any,
    *,
    seed: int,
    comparable: bool = True,
    few: int | None = None,
) -> dict[Documents, Workload]:
    """ "search" and, if there is one, "holdout" → its workload.

    Args:
        config: of the evaluations.
        lm: as for `Workload`.
        seed: for the choice of documents.
        comparable: refuse metrics that can't be part of an accuracy.
        few: use only this many documents of each task.

    Raises:
        ModelError: the tokenizer lacks what lm-eval needs.
        UsageError: as for `Workload`, the holdout has a task of the search, or the model can't
            answer a request.
    """
    lm.check_tokenizer(has_chat=config.apply_chat_template)
    rung = config.rungs[-1] if config.rungs else None
    search = Workload(
        config.tasks, config, lm, num_documents=rung, seed=seed, comparable=comparable, few=few
    )
    found: dict[Documents, Workload] = {"search": search}
    if config.holdout is not None:
        holdout = Workload(config.holdout.tasks, config, lm, comparable=comparable, few=few)
        seen = search.task_names & holdout.task_names
        if seen:
            raise UsageError(f"The task {min(seen)} is part of the search, so it is no holdout.")
        found["holdout"] = holdout
    for workload in found.values():
        workload.check_requests(lm)
    return found
