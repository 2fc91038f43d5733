"""Evaluation on this machine: in this process, or in a few worker processes.

An executor takes jobs and gives outcomes in the order in which they end. It knows nothing of
searches and archives, so the same search runs over any of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor as PoolExecutor
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from gptailor.archive import Outcome
from gptailor.config import Config
from gptailor.errors import StoppedEarly
from gptailor.evaluation.similarity import Similarity
from gptailor.models.family import Family
from gptailor.recipe import Recipe

if TYPE_CHECKING:
    from gptailor.evaluation.evaluator import Documents, Evaluator

T = TypeVar("T")
Job = tuple[Recipe, "Documents"]


@dataclass(frozen=True)
class WorkloadInfo:
    """What a search must know of the documents.

    Attributes:
        num_documents: "search" and, if there is one, "holdout" → documents of one evaluation.
        digest: changes when tasks or documents do.
    """

    num_documents: dict[str, int]
    digest: str


class Executor(Protocol):
    """Whatever can evaluate recipes."""

    def workload(self) -> WorkloadInfo:
        """What will be evaluated."""
        ...

    def similarity(self, model: str) -> Similarity:
        """Measures the layers of one dense candidate."""
        ...

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """Evaluates all jobs: (index of the job, outcome), in the order in which they end."""
        ...

    def close(self) -> None:
        """Ends the workers."""
        ...


class InProcess:
    """One worker: this process."""

    def __init__(self, config: Config, family: Family, num_workers: int = 1) -> None:
        from gptailor.evaluation.evaluator import Evaluator

        self._config = config
        self.evaluator: Evaluator = Evaluator(
            family, config.evaluation, seed=config.search.seed, workers=num_workers
        )

    def workload(self) -> WorkloadInfo:
        """What will be evaluated."""
        workloads = self.evaluator.workloads
        digest = "-".join(workload.digest for workload in workloads.values())
        return WorkloadInfo({n: w.num_documents for n, w in workloads.items()}, digest)

    def similarity(self, model: str) -> Similarity:
        """Measures the layers of one dense candidate."""
        return self.evaluator.similarity(model, self._config.space.dtype)

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """Evaluates the jobs in their order."""
        for index, (recipe, documents) in enumerate(jobs):
            yield index, self.evaluator.evaluate(recipe, documents)

    def close(self) -> None:
        """Nothing has to be ended."""


class LocalPool:
    """Several worker processes on this machine, each with the cores that are its share.

    Raises:
        StoppedEarly: a worker died (killed, or out of memory); what was evaluated is kept.
    """

    def __init__(self, config: Config, num_workers: int) -> None:
        threads = max(len(os.sched_getaffinity(0)) // num_workers, 1)
        self._pool: PoolExecutor = ProcessPoolExecutor(
            num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(config, threads, num_workers),
        )

    def workload(self) -> WorkloadInfo:
        """What will be evaluated."""
        return self._result(self._pool.submit(_workload))

    def similarity(self, model: str) -> Similarity:
        """Measures the layers of one dense candidate."""
        return self._result(self._pool.submit(_similarity, model))

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """Evaluates the jobs side by side."""
        futures = {self._pool.submit(_evaluate, job): i for i, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], self._result(future)
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Ends the workers at once; what they were doing is lost (what was done is recorded)."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()

    @staticmethod
    def _result(future: Future[T]) -> T:
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise StoppedEarly(
                "A worker process died (killed, or out of memory): everything that was evaluated "
                "is kept, and the same command with --resume continues."
            ) from error


_worker: InProcess | Exception
"""The worker of this process, or why there is none; set once, when the pool starts it."""


def _start_worker(config: Config, threads: int, num_workers: int) -> None:
    """Never raises: an exception here would break the pool, and its reason would be lost."""
    global _worker  # noqa: PLW0603  (a pool's process has no other place for its state)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    import torch

    torch.set_num_threads(threads)
    try:
        _worker = InProcess(config, Family(config.models, config.base), num_workers)
    except Exception as error:
        _worker = error


def _started() -> InProcess:
    if isinstance(_worker, Exception):
        raise _worker
    return _worker


def _workload() -> WorkloadInfo:
    return _started().workload()


def _similarity(model: str) -> Similarity:
    return _started().similarity(model)


def _evaluate(job: Job) -> Outcome:
    recipe, documents = job
    return _started().evaluator.evaluate(recipe, documents)


def open_executor(config: Config, family: Family, num_workers: int) -> Executor:
    """One process for one worker, a pool for more."""
    if num_workers == 1:
        return InProcess(config, family)
    return LocalPool(config, num_workers)
