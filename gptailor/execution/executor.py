"""The interface to whatever evaluates a search's recipes: workers that take one job at a time.

An executor knows nothing about searches and archives, so the same search runs on any of them: this
process, processes of this machine, the ranks of an MPI program, or a simulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gptailor.evaluation.forward_dtype import Ability
from gptailor.evaluation.outcome import Documents, Outcome
from gptailor.evaluation.similarity import Similarity
from gptailor.recipe import Recipe, Repair


@dataclass(frozen=True)
class EvaluationJob:
    """Score a recipe on a set of documents; its result is an `Outcome`."""

    recipe: Recipe
    documents: Documents


@dataclass(frozen=True)
class SimilarityJob:
    """Measure the layers of one dense candidate; its result is a `Similarity`."""

    model: str


Job = EvaluationJob | SimilarityJob


def job_name(job: Job) -> str:
    """A short name of a job, for people."""
    return job.recipe.point if isinstance(job, EvaluationJob) else f"layers of {job.model}"


@dataclass(frozen=True)
class Finished:
    """A job that ended.

    Attributes:
        worker: the worker that did it.
        job: the job.
        result: its result, by the kind of the job.
    """

    worker: int
    job: Job
    result: Outcome | Similarity


@dataclass(frozen=True)
class WorkerInfo:
    """A worker that is a process of its own, perhaps on another host.

    Attributes:
        rank: its MPI rank.
        host: the host that it runs on.
        pid: its process id on that host.
        device: what it computes on; empty until it is ready.
        since: when it began its job or became free, in seconds of the executor's clock; None until
            it is ready.
    """

    rank: int
    host: str
    pid: int
    device: str = ""
    since: float | None = None


@dataclass(frozen=True)
class WorkloadInfo:
    """What a search needs to know about the documents.

    Attributes:
        num_documents: "search" and, if there is one, "holdout" → documents of one evaluation.
        digest: changes when tasks or documents do.
        repair: how all recipes are repaired, perhaps without teachers yet; None for not at all.
        why_no_repair: a sentence, if automatic repairs are not possible.
        front_repair: how the best ones are repaired once the search has ended; None if like all.
    """

    num_documents: dict[str, int]
    digest: str
    repair: Repair | None = None
    front_repair: Repair | None = None
    why_no_repair: str = ""


class Executor(Protocol):
    """Workers, numbered from 0, each with one job at a time.

    Errors that end the whole search (`ResourceError`, `ModelError`, `StoppedEarly`, or unexpected
    errors of a worker) are raised by the method that encounters them.
    """

    @property
    def num_workers(self) -> int:
        """How many workers there are, busy or not."""
        ...

    def workload(self) -> WorkloadInfo:
        """What will be evaluated; waits until a worker has loaded it."""
        ...

    def free(self) -> Sequence[int]:
        """The workers that can start a job now, ascending."""
        ...

    def start(self, worker: int, job: Job) -> None:
        """Gives a job to a free worker."""
        ...

    def finished(self, timeout_s: float) -> list[Finished]:
        """The jobs that ended since the last call; waits up to `timeout_s` for the first.

        Also returns early, with nothing, when a new worker becomes free.
        """
        ...

    def now(self) -> float:
        """Seconds since some fixed moment, by the clock with which this executor waits."""
        ...

    def abilities(self) -> Sequence[Ability]:
        """What each worker's machine can do; available before anything is loaded."""
        ...

    def load(self, dtype: str) -> None:
        """Has the workers load candidates and tasks, to compute in this dtype."""
        ...

    def words(self) -> Mapping[int, str]:
        """The workers' progress messages: "48 of 128 contexts", "loading the base".

        Workers without a message are absent. May be called from any thread.
        """
        ...

    def close(self) -> None:
        """Ends the workers; jobs in progress are lost (finished ones are recorded)."""
        ...
