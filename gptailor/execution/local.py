"""What a worker does, wherever it runs; and evaluation in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from gptailor.archive import Outcome
from gptailor.config import Config
from gptailor.evaluation.forward_dtype import Ability, find_ability
from gptailor.evaluation.similarity import Similarity
from gptailor.execution.executor import (
    EvaluationJob,
    Executor,
    Finished,
    Job,
    SimilarityJob,
    WorkloadInfo,
)
from gptailor.execution.node_files import open_candidates
from gptailor.models.family import Family
from gptailor.patience import Say

if TYPE_CHECKING:
    from gptailor.evaluation.evaluator import Evaluator


class Worker:
    """What one worker does, wherever it runs: it lives as long as its models stay in memory.

    Args:
        config: models, tasks, device.
        family: the opened candidates.
        num_workers: how many share the device.
        says: is told what is loaded.

    Attributes:
        beat: called in the midst of a job, between two forward passes.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        num_workers: int = 1,
        says: Say = lambda text: None,
    ) -> None:
        says("loading libraries")
        from gptailor.evaluation.evaluator import Evaluator

        self._config = config
        self.evaluator: Evaluator = Evaluator(
            family, config.evaluation, seed=config.search.seed, workers=num_workers, says=says
        )
        self.beat: Callable[[], None] = lambda: None
        self.evaluator.lm.model.register_forward_hook(lambda *_: self.beat())
        self._how_far: Callable[[], str] = lambda: ""
        self._usual: dict[str, int] = {}  # tokens of an evaluation on these documents

    def workload(self) -> WorkloadInfo:
        """What will be evaluated."""
        workloads = self.evaluator.workloads
        digest = "-".join(workload.digest for workload in workloads.values())
        return WorkloadInfo({n: w.num_documents for n, w in workloads.items()}, digest)

    def do(self, job: Job) -> Outcome | Similarity:
        """Does a job; raises like `Evaluator`."""
        try:
            if isinstance(job, SimilarityJob):
                return self.evaluator.similarity(job.model, self._config.space.dtype, self._counts)
            return self._evaluate(job)
        finally:
            self._how_far = lambda: ""

    def words(self) -> str:
        """How far the job is; empty if nobody knows. May be called from another thread."""
        return self._how_far()

    def _evaluate(self, job: EvaluationJob) -> Outcome:
        lm, before = self.evaluator.lm, self.evaluator.lm.num_tokens
        usual = self._usual.get(job.documents)
        of = "" if usual is None else f" of about {usual:,}"
        self._how_far = lambda: f"{lm.num_tokens - before:,}{of} tokens"
        outcome = self.evaluator.evaluate(job.recipe, job.documents)
        if outcome.status == "ok":
            self._usual[job.documents] = outcome.cost.num_tokens
        return outcome

    def _counts(self, done: int, of: int) -> None:
        self._how_far = lambda: f"{done} of {of} contexts"


class InProcess:
    """One worker: this process."""

    num_workers = 1

    def __init__(self, config: Config) -> None:
        self._config = config
        self._opened: Worker | None = None
        self._loads = ""
        self._job: Job | None = None

    def abilities(self) -> Sequence[Ability]:
        """What this machine can do."""
        return [find_ability(self._config.evaluation.device)]

    def load(self, dtype: str) -> None:
        """Loads candidates and tasks."""
        config = self._config.computed_in(dtype)
        family = open_candidates(config, says=self._say)
        self._opened = Worker(config, family, says=self._say)

    def _say(self, text: str) -> None:
        self._loads = text

    def words(self) -> Mapping[int, str]:
        """What the worker says of its work."""
        text = self._loads if self._opened is None else self._opened.words()
        return {0: text} if text else {}

    @property
    def _worker(self) -> Worker:
        assert self._opened is not None, "load comes first"
        return self._opened

    def workload(self) -> WorkloadInfo:
        """What will be evaluated."""
        return self._worker.workload()

    def free(self) -> Sequence[int]:
        """The worker, unless it has a job."""
        return [0] if self._job is None else []

    def start(self, worker: int, job: Job) -> None:
        """Takes a job; it is done in `finished`."""
        assert worker == 0
        assert self._job is None
        self._job = job

    def finished(self, timeout_s: float) -> list[Finished]:
        """Does the job; the time limit is not kept, as there is nobody who could look at it."""
        del timeout_s
        if self._job is None:
            return []
        job, self._job = self._job, None
        return [Finished(0, job, self._worker.do(job))]

    def now(self) -> float:
        """Seconds of the machine's monotonic clock."""
        return time.monotonic()

    def close(self) -> None:
        """Nothing has to be ended."""


def without_process_locks() -> None:
    """Gives tqdm, which most libraries use, a lock within this process, which is one of ours.

    By itself it makes a semaphore of the system for each process that shows a bar. A worker that is
    ended while it works, or killed, leaves that behind, and Python warns of it on everybody's
    standard error when the search ends.
    """
    import tqdm

    tqdm.tqdm.set_lock(threading.RLock())


def open_executor(config: Config, num_workers: int) -> Executor:
    """One process for one worker, a pool for more."""
    if num_workers == 1:
        return InProcess(config)
    from gptailor.execution.pool import LocalPool

    return LocalPool(config, num_workers)
