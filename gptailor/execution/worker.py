"""A worker that does jobs, wherever it runs: in this process, in a pool, or as a rank."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from gptailor.config import Config
from gptailor.errors import ModelError, UsageError
from gptailor.evaluation.outcome import Outcome
from gptailor.evaluation.similarity import Similarity
from gptailor.execution.executor import EvaluationJob, Job, SimilarityJob, WorkloadInfo
from gptailor.models.family import Family
from gptailor.patience import Say
from gptailor.recipe import Repair, dense_recipe

if TYPE_CHECKING:
    from gptailor.evaluation.evaluator import Evaluator


class Worker:
    """A worker, which keeps its models in memory as long as it lives.

    Args:
        config: models, tasks, device.
        family: the opened candidates.
        num_workers: how many share the device.
        says: called with what is being loaded.

    Attributes:
        beat: called during a job, after each forward pass.
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
        self._usual: dict[str, int] = {}  # documents → tokens of the last evaluation on them

    def workload(self) -> WorkloadInfo:
        """What will be evaluated."""
        from gptailor.evaluation.repair.settings import front_repair, is_automatic, planned_repair

        workloads = self.evaluator.workloads
        digest = "-".join(workload.digest for workload in workloads.values())
        counts = {str(name): workload.num_documents for name, workload in workloads.items()}
        try:
            repair = self._with_digest(planned_repair(self._config))
            if repair is not None and not self._config.has_refit:  # else it has been repaired
                self._check_architecture(repair)
            front = self._with_digest(front_repair(self._config))
        except (UsageError, ModelError) as error:
            if not is_automatic(self._config):
                raise
            return WorkloadInfo(counts, digest, why_no_repair=str(error))
        for found in (repair, front):
            if found is not None:
                digest = f"{digest}-{found.calibration.digest}"
        return WorkloadInfo(counts, digest, repair, front)

    def _with_digest(self, planned: Repair | None) -> Repair | None:
        """A planned repair with the digest of what it reads; raises if there is nothing to read."""
        if planned is None:
            return None
        reading = self.evaluator.repairs.reading(planned.calibration)
        calibration = replace(planned.calibration, digest=reading.digest)
        return replace(planned, calibration=calibration)

    def _check_architecture(self, repair: Repair) -> None:
        """Raises a `ModelError` if the candidates can't be repaired."""
        config, num_layers = self._config, self.evaluator.family.num_layers
        base = config.base
        whole = dense_recipe(config.models, base, base, num_layers, config.space.dtype)
        repairs = self.evaluator.repairs
        repairs.check(whole, repairs.reading(repair.calibration))

    def do(self, job: Job) -> Outcome | Similarity:
        """Does a job; raises like `Evaluator`."""
        try:
            if isinstance(job, SimilarityJob):
                return self.evaluator.similarity(job.model, self._config.space.dtype, self._counts)
            return self._evaluate(job)
        finally:
            self._how_far = lambda: ""

    def words(self) -> str:
        """The job's progress; empty if unknown. May be called from another thread."""
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


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Loads libraries and models without the garbage collector, which ignores them afterwards, too.

    They create a million objects that live as long as the process. Searching these for garbage,
    again and again, took a fifth of the time in which a worker starts. Only for processes of our
    own: `gc.freeze` applies to every object of the process.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def without_process_locks() -> None:
    """Gives tqdm, which most libraries use, a lock within this worker process.

    By default tqdm makes a system semaphore in each process that shows a bar. A worker that is
    terminated or killed leaves it behind, and Python warns about it on standard error when the
    search ends.
    """
    import tqdm

    tqdm.tqdm.set_lock(threading.RLock())
