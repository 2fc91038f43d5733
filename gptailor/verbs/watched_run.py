"""A run as a job's monitor sees it: connects `search` to `execution`, which can't import it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptailor.execution.executor import job_name
from gptailor.execution.job_monitor import SearchState, Work

if TYPE_CHECKING:
    from gptailor.search.run import Run


class WatchedRun:
    """A `Watched` for a run."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def now(self) -> float:
        """Seconds on the executor's clock."""
        return self._run.executor.now()

    def state(self) -> SearchState:
        """How far the run is."""
        run, progress = self._run, self._run.progress
        running, words = dict(run.scheduler.running), run.executor.words()
        work = {}
        for worker, now in running.items():
            name = job_name(now.job)
            if worker in words:
                name = f"{name}: {words[worker]}"
            work[worker] = Work(name, now.began)
        return SearchState(
            num_workers=run.executor.num_workers,
            running=work,
            num_done=progress.done,
            num_new=progress.done - progress.reused - progress.elsewhere,
            num_gained=run.recorder.num_gained,
            failures=run.recorder.failures,
        )
