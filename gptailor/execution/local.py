"""Evaluation on this machine: in this process, or in a pool of processes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from gptailor.config import Config
from gptailor.evaluation.forward_dtype import Ability, find_ability
from gptailor.execution.executor import (
    Executor,
    Finished,
    Job,
    WorkloadInfo,
)
from gptailor.execution.node.files import open_candidates
from gptailor.execution.worker import Worker


class InProcess:
    """An executor with one worker, this process.

    Args:
        config: the search.
        io, stage: as for `open_candidates`.
    """

    num_workers = 1

    def __init__(self, config: Config, *, io: str | None = None, stage: str | None = None) -> None:
        self._config = config
        self._io, self._stage = io, stage
        self._opened: Worker | None = None
        self._info: WorkloadInfo | None = None
        self._loads = ""
        self._job: Job | None = None

    def abilities(self) -> Sequence[Ability]:
        """What this machine can do."""
        return [find_ability(self._config.evaluation.device)]

    def load(self, dtype: str) -> None:
        """Loads candidates and tasks."""
        config = self._config.computed_in(dtype)
        family = open_candidates(config, io=self._io, stage=self._stage, says=self._say)
        self._opened = Worker(config, family, says=self._say)
        self._info = self._opened.workload()

    def _say(self, text: str) -> None:
        self._loads = text

    def words(self) -> Mapping[int, str]:
        """The worker's progress message."""
        text = self._loads if self._opened is None else self._opened.words()
        return {0: text} if text else {}

    @property
    def _worker(self) -> Worker:
        assert self._opened is not None, "load comes first"
        return self._opened

    def workload(self) -> WorkloadInfo:
        """What will be evaluated."""
        assert self._info is not None, "load comes first"
        return self._info

    def free(self) -> Sequence[int]:
        """The worker, if it has no job."""
        return [0] if self._job is None else []

    def start(self, worker: int, job: Job) -> None:
        """Accepts a job; `finished` runs it."""
        assert worker == 0
        assert self._job is None
        self._job = job

    def finished(self, timeout_s: float) -> list[Finished]:
        """Does the job; ignores the timeout, as nothing else runs in this process meanwhile."""
        del timeout_s
        if self._job is None:
            return []
        job, self._job = self._job, None
        return [Finished(0, job, self._worker.do(job))]

    def now(self) -> float:
        """Seconds of the machine's monotonic clock."""
        return time.monotonic()

    def close(self) -> None:
        """Does nothing, as there is no process to end."""


def open_executor(
    config: Config, num_workers: int, *, io: str | None = None, stage: str | None = None
) -> Executor:
    """One process for one worker, a pool for more; `io` and `stage` as for `open_candidates`."""
    if num_workers == 1:
        return InProcess(config, io=io, stage=stage)
    from gptailor.execution.pool import LocalPool

    return LocalPool(config, num_workers, io=io, stage=stage)
