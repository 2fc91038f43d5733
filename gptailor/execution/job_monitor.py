"""Updates a job's record while a search runs: what workers do, how fast it goes, what failed.

The monitor does not depend on the search: it gets a `Watched`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

from gptailor.errors import Requeue, StoppedEarly, exit_code_of
from gptailor.execution.executor import WorkerInfo
from gptailor.execution.logs import log_path
from gptailor.execution.slurm.exit_code_file import gained
from gptailor.execution.stop import Stop
from gptailor.run.job_record import (
    JobRecord,
    JobRecorder,
    JobState,
    WorkerRecord,
    job_id_here,
    read,
)
from gptailor.run.layout import ISLANDS

WINDOW_S = 900.0
"""Evaluations per hour are measured over the last quarter of an hour."""

_SAMPLE_S = 10.0

TICK_S = 1.0
"""The shortest time between two updates: with thousands of workers, each takes a while."""


@dataclass(frozen=True)
class Work:
    """What a worker is doing.

    Attributes:
        name: of the job, for people, with its progress if known.
        began: in seconds of the executor's clock.
    """

    name: str
    began: float


@dataclass(frozen=True)
class SearchState:
    """The progress of a search.

    Attributes:
        num_workers: of the executor.
        running: worker → what it is doing; idle workers are absent.
        num_done: evaluations that count.
        num_new: how many of these this program evaluated.
        num_gained: how many results this program put into the archive.
        failures: (worker, recipe's point, reason) of each evaluation that failed.
    """

    num_workers: int
    running: Mapping[int, Work]
    num_done: int
    num_new: int
    num_gained: int
    failures: Sequence[tuple[int, str, str]]


class Watched(Protocol):
    """A running search; both methods may be called from any thread."""

    def now(self) -> float:
        """Seconds of the executor's clock."""
        ...

    def state(self) -> SearchState:
        """The search's progress; takes a while with thousands of workers."""
        ...


class JobMonitor:
    """Keeps the record of this job; as a context manager, writes how the job ended.

    Args:
        stop: a request to stop.
        total: the number of evaluations that the search will make.
        run_folder: the run whose `jobs/` has the record.
        island: the island that this job works on; None without islands.
    """

    def __init__(
        self, stop: Stop, total: int, run_folder: str | Path, island: int | None = None
    ) -> None:
        self._stop = stop
        self._run_folder = run_folder
        self._logs_in = "" if island is None else f"{ISLANDS}/{island}/"
        self._first = JobRecord(
            job_id=job_id_here(),
            island=island,
            evaluations_total=total,
            ends_at=stop.job_ends_at,
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            results=gained() or 0,
        )
        self._recorder: JobRecorder | None = None
        self._find_workers: Callable[[], Sequence[WorkerInfo]] = lambda: ()
        self._rates: deque[tuple[float, int]] = deque()
        self._num_failures = 0
        self._ticked_at = float("-inf")
        self._watched: Watched | None = None
        self._lock = threading.Lock()

    def begin(
        self, *, log: str = "", workers: Callable[[], Sequence[WorkerInfo]] | None = None
    ) -> None:
        """Creates the record's file if it doesn't exist yet.

        Args:
            log: the log to read first, relative to the folder of the search (of the island).
            workers: returns the current workers, in order; None without MPI, or to keep what an
                earlier call set.
        """
        self._find_workers = workers or self._find_workers
        if self._recorder is None:
            idle = self._num_idle(read(self._run_folder, self._first.job_id))
            self._recorder = JobRecorder(self._run_folder, replace(self._first, idle_turns=idle))
        nodes = [worker.host for worker in self._find_workers()]
        hosts = dict.fromkeys((self._recorder.record.host, *nodes))
        changes = {"log": f"{self._logs_in}{log}"} if log else {}
        self._recorder.update(hosts=tuple(hosts), **changes)

    def loading(self, words: Mapping[int, str]) -> None:
        """Records the messages of workers that are loading; may be called from a thread."""
        workers = self._find_workers()
        if self._recorder is None or not workers:
            return
        with self._lock:
            records = [
                WorkerRecord(info.rank, info.host, info.pid, job=words.get(worker))
                for worker, info in enumerate(workers)
            ]
            self._recorder.update(workers=tuple(records))

    def tick(self, watched: Watched) -> None:
        """Records the progress of a search; may also be called from a thread."""
        if self._lock.acquire(blocking=False):  # else another thread is doing it
            try:
                self._tick(watched)
            finally:
                self._lock.release()

    def _tick(self, watched: Watched) -> None:
        state: JobState = "draining" if self._stop.is_set() else "running"
        now = watched.now()
        self._watched = watched
        if self._recorder is None or (
            now - self._ticked_at < TICK_S and self._recorder.record.state == state
        ):
            return
        self._ticked_at = now
        self._look(self._recorder, watched, state)

    def _look(self, recorder: JobRecorder, watched: Watched, job_state: JobState) -> None:
        state, workers, now = watched.state(), self._find_workers(), watched.now()
        in_turn = gained()
        recorder.update(
            state=job_state,
            workers=_worker_records(state, workers, time.time() - now),
            evaluations_done=state.num_done,
            evaluations_new=state.num_new,
            results=state.num_gained if in_turn is None else in_turn,
            evaluations_per_hour=self._per_hour(now, state.num_new),
        )
        for worker, point, reason in state.failures[self._num_failures :]:
            log = f"{self._logs_in}{log_path(workers[worker].rank)}" if workers else ""
            recorder.failed(point, reason, log)
        self._num_failures = len(state.failures)

    def __enter__(self) -> JobMonitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Writes how the job ended.

        Raises:
            StoppedEarly: instead of the second `Requeue` in a row without any result: the next turn
                would be as short as this one.
        """
        if self._recorder is None:
            return
        if self._watched is not None:
            with self._lock:
                self._look(self._recorder, self._watched, self._recorder.record.state)
        record = self._recorder.record
        if isinstance(value, Requeue) and record.results == 0 and record.idle_turns > 0:
            error = StoppedEarly(
                f"Job {self._first.job_id} was stopped before its time limit twice in a row "
                "without a new result: give it more time, or a signal closer to its end."
            )
            self._recorder.end(exit_code_of(error))
            raise error from value
        self._recorder.end(exit_code_of(value))

    def _num_idle(self, before: JobRecord | None) -> int:
        """How many turns right before this one asked for a requeue without any result.

        Args:
            before: the record that the previous program left: from an earlier turn, or from an
                earlier step of this turn that was killed.
        """
        if before is None:
            return 0
        if before.exit_code == Requeue.exit_code:
            return before.idle_turns + 1 if before.results == 0 else 0
        return before.idle_turns if before.restarts == self._first.restarts else 0

    def _per_hour(self, now: float, new: int) -> float | None:
        rates = self._rates
        if not rates or now - rates[-1][0] >= _SAMPLE_S:
            rates.append((now, new))
        while now - rates[0][0] > WINDOW_S:
            rates.popleft()
        began, before = rates[0]
        return None if new == before else (new - before) / max(now - began, 1e-3) * 3600


def _worker_records(
    state: SearchState, workers: Sequence[WorkerInfo], ago: float
) -> tuple[WorkerRecord, ...]:
    """A record of what each worker is doing.

    Args:
        state: the search's progress.
        workers: the workers; empty without MPI.
        ago: Unix time minus the executor's clock, in seconds.
    """
    records = []
    for worker in range(state.num_workers):
        now = state.running.get(worker)
        name = None if now is None else now.name
        since = None if now is None else ago + now.began
        if not workers:
            records.append(WorkerRecord(worker, job=name, since=since))
            continue
        info = workers[worker]
        if since is None and info.since is not None:
            since = ago + info.since
        records.append(WorkerRecord(info.rank, info.host, info.pid, info.device, name, since))
    return tuple(records)
