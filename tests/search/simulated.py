"""An executor whose time is simulated: the real scheduler and search, no model."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from gptailor.evaluation.forward_dtype import Ability
from gptailor.evaluation.outcome import Cost, Outcome
from gptailor.evaluation.similarity import Similarity
from gptailor.execution.executor import EvaluationJob, Finished, Job, WorkloadInfo
from gptailor.models.ends import Ends
from tests.search.helpers import MODELS


def similarity(num_layers: int, shift: float) -> Similarity:
    """Later layers change less."""
    influence = tuple(1.0 / (i + 1 + shift) for i in range(num_layers))
    angular = tuple(
        tuple(abs(i - j) / (num_layers + 1) for j in range(num_layers + 1))
        for i in range(num_layers + 1)
    )
    return Similarity(influence, angular)


def family_of(num_layers: int, ends: Ends | None = None) -> Any:
    """The parts of a family that a search uses, without files."""
    return SimpleNamespace(
        num_layers=num_layers,
        parameters=lambda layers=(), rows=None: 100 * len(layers or range(num_layers)),
        ends=ends or Ends.equal(list(MODELS), "base"),
        uneven=frozenset(),
    )


class Unloaded:
    """The part of an executor that starts workers, for workers without models and documents."""

    num_workers: int

    def abilities(self) -> Sequence[Ability]:
        return [Ability("simulated", "cpu", (), 2**30)] * self.num_workers

    def load(self, dtype: str) -> None:
        pass

    def words(self) -> dict[int, str]:
        return {}

    def workload(self) -> WorkloadInfo:
        return WorkloadInfo({"search": 1}, "simulated")


class Simulated(Unloaded):
    """Workers that take `seconds(job)` for a job and score it with `score(job)`."""

    def __init__(
        self,
        num_workers: int,
        num_layers: int,
        score: Callable[[EvaluationJob], float | None],
        seconds: Callable[[EvaluationJob], float],
    ) -> None:
        self.num_workers = num_workers
        self.clock = 0.0
        self.busy_s = 0.0
        self.log: list[tuple[float, int, Job]] = []
        self._num_layers = num_layers
        self._score = score
        self._seconds = seconds
        self._queue: list[tuple[float, int, Job, float]] = []

    def free(self) -> Sequence[int]:
        busy = {worker for _, worker, *_ in self._queue}
        return [worker for worker in range(self.num_workers) if worker not in busy]

    def start(self, worker: int, job: Job) -> None:
        assert worker in self.free()
        seconds = self._seconds(job) if isinstance(job, EvaluationJob) else 1.0
        self.busy_s += seconds
        self.log.append((self.clock, worker, job))
        heapq.heappush(self._queue, (self.clock + seconds, worker, job, self.clock))

    def finished(self, timeout_s: float) -> list[Finished]:
        if not self._queue or self._queue[0][0] > self.clock + timeout_s:
            self.clock += timeout_s
            return []
        ends, worker, job, began = heapq.heappop(self._queue)
        self.clock = ends
        if not isinstance(job, EvaluationJob):
            return [Finished(worker, job, similarity(self._num_layers, worker))]
        score = self._score(job)
        cost = Cost(seconds=ends - began)
        if score is None:
            return [Finished(worker, job, Outcome("failed", None, (), "it broke", cost))]
        return [Finished(worker, job, Outcome("ok", score, (), "", cost))]

    def now(self) -> float:
        return self.clock

    def close(self) -> None:
        pass
