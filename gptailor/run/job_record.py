"""Job records: one small status file for each job of a run, for `status` and `cancel`.

`RUN/jobs/JOBID.json` is rewritten atomically by the job's first rank, and read by others without
any lock. It is only informative: the archive is the truth about evaluations, and Slurm about
whether a job is alive. So a record that can't be written never ends a search, and files in the
folder that are not records are skipped.

Records are checked here and not by pydantic, whose import takes as long as everything else that
`status` imports (0.12 s).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from gptailor.files import write_whole
from gptailor.run.layout import JOBS

SCHEMA = "gptailor/job/1"

JobState = Literal["submitted", "starting", "running", "draining", "ended"]
"""In this order; "draining": asked to stop, starts nothing new."""

INTERVAL_S = 2.0
"""Shortest time between two writes of a record, unless the job's state changes."""

MAX_FAILURES = 20
"""How many of the last failures a record lists; their total is in `evaluations_failed`."""

_MAX_BYTES = 16 * 2**20
"""A larger file is not a record (4,096 workers take about 1 MB)."""


@dataclass(frozen=True)
class WorkerRecord:
    """A worker of a job.

    Attributes:
        rank: its MPI rank, or the worker's number without MPI.
        host: where it runs.
        pid: its process there.
        device: "cpu", "cuda:0", …
        job: its current job, for example a recipe's point; None while it is idle.
        since: Unix time in seconds at which it began that job, or became free.
    """

    rank: int
    host: str = ""
    pid: int = 0
    device: str = ""
    job: str | None = None
    since: float | None = None


@dataclass(frozen=True)
class FailureRecord:
    """An evaluation that failed: the recipe's point, the reason's last line, the log to look at."""

    point: str
    reason: str
    log: str = ""


@dataclass(frozen=True)
class JobRecord:
    """A job of a run: of Slurm (or one element of an array), or a program started by hand.

    Attributes:
        job_id: Slurm's number, "NUMBER_ELEMENT" in an array, or "local-HOST-PID".
        state: how far it is, as reported by the job.
        island: the island it works on, from 0; None without islands.
        exit_code: of a job that ended.
        started_at: Unix time in seconds; None until it runs.
        updated_at: Unix time in seconds of the last rewrite, by the clock of the job's host.
        ends_at: Unix time in seconds at which Slurm kills it; None if unknown.
        host: of the process that writes this record.
        pid: of that process.
        hosts: on which its ranks run.
        workers: what each of them is doing.
        evaluations_done: recipes that count, those found in the archive included.
        evaluations_new: recipes that this job evaluated.
        evaluations_failed: how many of the new ones have no score.
        results: what it added to the archive in this turn, however often its step was started:
            evaluations, those on the holdout included, and measured candidates.
        idle_turns: turns right before this one that asked for a requeue without any result.
        evaluations_total: what the run was asked for.
        evaluations_per_hour: recent rate of this job; None until known.
        failures: the last few.
        log: the log to read first; relative to the run folder, or absolute.
        restarts: how often Slurm has requeued it.
    """

    job_id: str
    state: JobState = "starting"
    island: int | None = None
    exit_code: int | None = None
    started_at: float | None = None
    updated_at: float = 0.0
    ends_at: float | None = None
    host: str = ""
    pid: int = 0
    hosts: tuple[str, ...] = ()
    workers: tuple[WorkerRecord, ...] = ()
    evaluations_done: int = 0
    evaluations_new: int = 0
    evaluations_failed: int = 0
    results: int = 0
    idle_turns: int = 0
    evaluations_total: int = 0
    evaluations_per_hour: float | None = None
    failures: tuple[FailureRecord, ...] = ()
    log: str = ""
    restarts: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The record as written to the file, `schema` included."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: object) -> JobRecord:
        """Reads what `to_dict` returned; ignores keys of later versions.

        Raises:
            ValueError: this is not a record.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"not of schema {SCHEMA}")
        values = dict(data)
        values["workers"] = tuple(_record(WorkerRecord, w) for w in _listed(data, "workers"))
        values["failures"] = tuple(_record(FailureRecord, f) for f in _listed(data, "failures"))
        values["hosts"] = tuple(map(str, _listed(data, "hosts")))
        record: JobRecord = _record(cls, values)
        if record.state not in get_args(JobState):
            raise ValueError(f"unknown state {record.state!r}")
        return record

    def write(self, run_folder: str | Path) -> bool:
        """Writes the record atomically; returns False if that is not possible.

        Side effect: makes `jobs/` in the run folder if it is missing.
        """
        path = path_of(run_folder, self.job_id)
        try:
            write_whole(path, json.dumps(self.to_dict()).encode() + b"\n")
        except OSError:  # a full disk or quota: the archive raises the error if necessary
            return False
        return True


class JobRecorder:
    """Keeps a job's record and rewrites its file, but not too often.

    Args:
        run_folder: the record goes into its `jobs/`.
        record: the first one; its times, host and process are filled in.
        now: a monotonic clock in seconds, like `Executor.now`; paces the writing.
    """

    def __init__(
        self,
        run_folder: str | Path,
        record: JobRecord,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = Path(run_folder)
        self._now = now
        self._written_at = float("-inf")
        self.record = dataclasses.replace(
            record,
            started_at=time.time() if record.started_at is None else record.started_at,
            host=record.host or socket.gethostname(),
            pid=record.pid or os.getpid(),
        )
        self.flush()

    def update(self, **changes: Any) -> None:
        """Updates the record; writes it at once if the state changed, else when it is due.

        Args:
            changes: attributes of `JobRecord`.
        """
        state = self.record.state
        self.record = dataclasses.replace(self.record, **changes)
        if self.record.state != state or self._now() - self._written_at >= INTERVAL_S:
            self.flush()

    def failed(self, point: str, reason: str, log: str = "") -> None:
        """Counts an evaluation that failed; keeps the last line of `reason`."""
        lines = reason.strip().splitlines() or [""]
        failure = FailureRecord(point, lines[-1][:300], log)
        self.update(
            evaluations_failed=self.record.evaluations_failed + 1,
            failures=(*self.record.failures, failure)[-MAX_FAILURES:],
        )

    def end(self, exit_code: int) -> None:
        """Records the end of the job."""
        idle = tuple(dataclasses.replace(w, job=None) for w in self.record.workers)
        self.update(state="ended", exit_code=exit_code, workers=idle)

    def flush(self) -> bool:
        """Writes the record now; returns False if that is not possible."""
        self._written_at = self._now()
        self.record = dataclasses.replace(self.record, updated_at=time.time())
        return self.record.write(self._folder)


def read_all(run_folder: str | Path) -> list[JobRecord]:
    """The records of a run, earliest job first; skips files that are not whole records."""
    records = []
    with contextlib.suppress(OSError):
        for path in (Path(run_folder) / JOBS).glob("*.json"):
            record = _read(path)
            if record is not None:
                records.append(record)
    return sorted(records, key=lambda r: (r.started_at or r.updated_at, r.job_id))


def read(run_folder: str | Path, job_id: str) -> JobRecord | None:
    """The record of a job; None if there is no whole one."""
    return _read(path_of(run_folder, job_id))


def path_of(run_folder: str | Path, job_id: str) -> Path:
    """The path of a job's record."""
    return Path(run_folder) / JOBS / f"{job_id}.json"


def job_id_here(environ: Mapping[str, str] = os.environ) -> str:
    """The job that this process belongs to; "local-HOST-PID" outside of Slurm."""
    array, element = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if array and element:
        return f"{array}_{element}"
    return environ.get("SLURM_JOB_ID") or f"local-{socket.gethostname()}-{os.getpid()}"


def _read(path: Path) -> JobRecord | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
        record = JobRecord.from_dict(json.loads(data))
    except (OSError, ValueError, RecursionError):
        return None
    return record if path.stem == record.job_id else None


def _listed(data: Mapping[str, object], key: str) -> list[Any]:
    value = data.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key} is not a list")
    return value


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "None": (type(None),),
    "JobState": (str,),
}


def _record(kind: type[Any], data: object) -> Any:
    """Makes an object of one of the classes above; checks each value against its annotation."""
    if not isinstance(data, dict):
        raise ValueError(f"no {kind.__name__}")
    values = {}
    for attribute in dataclasses.fields(kind):
        if attribute.name not in data:
            continue
        value, names = data[attribute.name], str(attribute.type).split(" | ")
        if not names[0].startswith("tuple"):
            known = tuple(t for name in names for t in _KINDS[name])
            if isinstance(value, bool) or not isinstance(value, known):
                raise ValueError(f"{attribute.name} is {value!r}")
        values[attribute.name] = value
    try:
        return kind(**values)
    except TypeError as error:  # a key without a default is missing
        raise ValueError(str(error)) from error
