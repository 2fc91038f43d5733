"""Fills a job's record while a search runs: what workers do, how fast it goes, what failed."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from gptailor.errors import Requeue, StoppedEarly, exit_code_of
from gptailor.execution.executor import job_name
from gptailor.execution.slurm.exit_code_file import gained
from gptailor.execution.stop import Stop
from gptailor.run.island_folder import FOLDER
from gptailor.run.job_record import (
    JobRecord,
    JobRecorder,
    JobState,
    WorkerRecord,
    job_id_here,
    read,
)

if TYPE_CHECKING:
    from gptailor.execution.mpi.crew import Member
    from gptailor.search.run import Run

WINDOW_S = 900.0
"""Evaluations per hour are those of the last quarter of an hour."""

_SAMPLE_S = 10.0

TICK_S = 1.0
"""With thousands of workers a look at all of them takes a while."""


class JobMonitor:
    """The record of this job; as a context it writes the last word.

    Args:
        stop: a request to stop.
        total: evaluations that there will be.
        run_folder: whose `jobs/` the record is in.
        island: which of the islands this job works on; None without islands.
    """

    def __init__(
        self, stop: Stop, total: int, run_folder: str | Path, island: int | None = None
    ) -> None:
        self._stop = stop
        self._run_folder = run_folder
        self._logs_in = "" if island is None else f"{FOLDER}/{island}/"
        self._first = JobRecord(
            job_id=job_id_here(),
            island=island,
            evaluations_total=total,
            ends_at=stop.job_ends_at,
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            results=gained() or 0,
        )
        self._recorder: JobRecorder | None = None
        self._members: Sequence[Member] = ()
        self._rates: deque[tuple[float, int]] = deque()
        self._num_failures = 0
        self._ticked_at = float("-inf")
        self._run: Run | None = None
        self._lock = threading.Lock()

    def begin(self, *, log: str = "", members: Sequence[Member] = ()) -> None:
        """Makes the file, if that is not done yet.

        Args:
            log: what a person reads first, seen from the folder of the search (of the island).
            members: the ranks that evaluate, in the order of the workers; empty without MPI.
        """
        self._members = members or self._members
        if self._recorder is None:
            idle = self._num_idle(read(self._run_folder, self._first.job_id))
            self._recorder = JobRecorder(self._run_folder, replace(self._first, idle_turns=idle))
        nodes = [member.hello.place.node for member in self._members]
        hosts = dict.fromkeys((self._recorder.record.host, *nodes))
        changes = {"log": f"{self._logs_in}{log}"} if log else {}
        self._recorder.update(hosts=tuple(hosts), **changes)

    def loading(self, words: Mapping[int, str]) -> None:
        """Notes what workers say that load candidates and tasks; may be called from a thread."""
        if self._recorder is None or not self._members:
            return
        with self._lock:
            records = [
                WorkerRecord(m.hello.rank, m.hello.place.node, m.hello.pid, job=words.get(worker))
                for worker, m in enumerate(self._members)
            ]
            self._recorder.update(workers=tuple(records))

    def tick(self, run: Run) -> None:
        """Notes how far a search is; may be called from a thread, too."""
        if self._lock.acquire(blocking=False):  # else somebody is at it
            try:
                self._tick(run)
            finally:
                self._lock.release()

    def _tick(self, run: Run) -> None:
        state: JobState = "draining" if self._stop.is_set() else "running"
        now = run.executor.now()
        self._run = run
        if self._recorder is None or (
            now - self._ticked_at < TICK_S and self._recorder.record.state == state
        ):
            return
        self._ticked_at = now
        self._look(self._recorder, run, state)

    def _look(self, recorder: JobRecorder, run: Run, state: JobState) -> None:
        progress = run.progress
        new = progress.done - progress.reused - progress.elsewhere
        in_turn = gained()
        recorder.update(
            state=state,
            workers=self._workers(run),
            evaluations_done=progress.done,
            evaluations_new=new,
            results=run.recorder.num_gained if in_turn is None else in_turn,
            evaluations_per_hour=self._per_hour(run.executor.now(), new),
        )
        for worker, point, reason in run.recorder.failures[self._num_failures :]:
            log = f"{self._logs_in}{self._members[worker].log}" if self._members else ""
            recorder.failed(point, reason, log)
        self._num_failures = len(run.recorder.failures)

    def __enter__(self) -> JobMonitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Writes the last word.

        Raises:
            StoppedEarly: in place of a `Requeue` for the second time without any result: the next
                turn would be as short as this one.
        """
        if self._recorder is None:
            return
        if self._run is not None:
            with self._lock:
                self._look(self._recorder, self._run, self._recorder.record.state)
        record = self._recorder.record
        if isinstance(value, Requeue) and record.results == 0 and record.idle_turns > 0:
            error = StoppedEarly(
                f"Job {self._first.job_id} was stopped before its time limit twice in a row "
                "before the archive gained anything: give it more time, or a signal nearer to its "
                "end."
            )
            self._recorder.end(exit_code_of(error))
            raise error from value
        self._recorder.end(exit_code_of(value))

    def _num_idle(self, before: JobRecord | None) -> int:
        """How many turns right before this one asked for a requeue and had no result.

        Args:
            before: what the program before this one left: of an earlier turn, or of an earlier step
                of this turn, which was killed.
        """
        if before is None:
            return 0
        if before.exit_code == Requeue.exit_code:
            return before.idle_turns + 1 if before.results == 0 else 0
        return before.idle_turns if before.restarts == self._first.restarts else 0

    def _workers(self, run: Run) -> tuple[WorkerRecord, ...]:
        ago = time.time() - run.executor.now()  # from the executor's clock to Unix time
        running, words = dict(run.scheduler.running), run.executor.words()
        records = []
        for worker in range(run.executor.num_workers):
            now = running.get(worker)
            name = None if now is None else job_name(now.job)
            if name is not None and worker in words:
                name = f"{name}: {words[worker]}"
            since = None if now is None else ago + now.began
            if not self._members:
                records.append(WorkerRecord(worker, job=name, since=since))
                continue
            member = self._members[worker]
            records.append(
                WorkerRecord(
                    member.hello.rank,
                    member.hello.place.node,
                    member.hello.pid,
                    member.device,
                    name,
                    since or (ago + member.since if member.device else None),
                )
            )
        return tuple(records)

    def _per_hour(self, now: float, new: int) -> float | None:
        rates = self._rates
        if not rates or now - rates[-1][0] >= _SAMPLE_S:
            rates.append((now, new))
        while now - rates[0][0] > WINDOW_S:
            rates.popleft()
        began, before = rates[0]
        return None if new == before else (new - before) / max(now - began, 1e-3) * 3600
