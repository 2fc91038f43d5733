"""The progress of a run and the state of its jobs, observed without disturbing anything.

There are three sources. The archive has what was evaluated; Slurm knows which jobs are alive; each
job's record has what the job is doing while it is alive. Where a record and Slurm disagree, Slurm
is right, and the disagreement is reported. Nothing is written, and the only lock is SQLite's own
during one query.
"""

from __future__ import annotations

import os
import pwd
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptailor.errors import UsageError
from gptailor.execution.slurm import queries as slurm
from gptailor.run.archive import count_undisturbed
from gptailor.run.job_record import JobRecord, read_all
from gptailor.run.layout import ARCHIVE, ISLANDS
from gptailor.run.pareto import most_small_layers

STALE_S = 120.0
"""A job silent for this long is reported as such; records are rewritten every few seconds."""


@dataclass(frozen=True)
class Evaluated:
    """What a run has evaluated.

    Attributes:
        done: recipes evaluated on the search's documents, with and without scores.
        infeasible: how many of these are infeasible.
        failed: how many of these failed.
        holdout: recipes evaluated on the holdout's documents.
        total: how many evaluations the run should have; 0 if unknown.
        best: the best accuracy with at most 75 % of the layers, as in the search's progress; None
            if there is none yet.
        note: why the numbers are not the archive's, in one sentence; empty if they are.
    """

    done: int = 0
    infeasible: int = 0
    failed: int = 0
    holdout: int = 0
    total: int = 0
    best: float | None = None
    note: str = ""


@dataclass(frozen=True)
class JobStatus:
    """A job of a run.

    Attributes:
        record: the record that the job writes.
        state: Slurm's state for a job that Slurm knows; else RUNNING, ENDED or LOST.
        is_live: it is waiting, running or ending.
        exit_code: of a job that is over.
        past: states of its earlier turns.
        time_left_s: until its time limit; None if there is none, or it is not running.
        note: anything odd or worth knowing, in one sentence; often empty.
    """

    record: JobRecord
    state: str
    is_live: bool
    exit_code: int | None = None
    past: tuple[str, ...] = ()
    time_left_s: float | None = None
    note: str = ""

    @property
    def runs(self) -> bool:
        """Whether it is evaluating."""
        return self.is_live and self.state == "RUNNING"


@dataclass(frozen=True)
class RunStatus:
    """A run.

    Attributes:
        run_folder: as given by the caller.
        evaluated: what was evaluated so far.
        jobs: all jobs of the run, the earliest first.
        evaluations_per_hour: of all running jobs together; None if not known yet.
        time_left_s: until the last evaluation, at that rate; None if unknown.
    """

    run_folder: str
    evaluated: Evaluated
    jobs: tuple[JobStatus, ...]
    evaluations_per_hour: float | None
    time_left_s: float | None

    @property
    def is_complete(self) -> bool:
        """Whether all requested evaluations are done."""
        return 0 < self.evaluated.total <= self.evaluated.done


def look_at(run_folder: str | Path) -> RunStatus:
    """Finds the status of a run.

    Raises:
        UsageError: the folder holds no run.
    """
    run = Path(run_folder)
    records = read_all(run)
    if not records and not (run / ARCHIVE).is_file() and not (run / ISLANDS).is_dir():
        raise UsageError(f"{run} holds no run: there is no archive, and no job was submitted.")
    jobs = job_states(records)
    evaluated = _evaluated(run, records)
    rates = [j.record.evaluations_per_hour for j in jobs if j.runs]
    known = [rate for rate in rates if rate]
    per_hour = sum(known) if known else None
    left = max(evaluated.total - evaluated.done, 0)
    return RunStatus(
        str(run), evaluated, tuple(jobs), per_hour, left / per_hour * 3600 if per_hour else None
    )


def job_states(records: Sequence[JobRecord]) -> list[JobStatus]:
    """The states of the jobs that wrote these records."""
    known = slurm.jobs(record.job_id for record in records)
    return [
        _of_slurm(record, known[record.job_id])
        if record.job_id in known
        else _without_slurm(record)
        for record in records
    ]


def process_lives(record: JobRecord) -> bool | None:
    """Whether the process that wrote a record is alive; None if it is on another machine."""
    if record.host != socket.gethostname() or not record.pid:
        return None
    try:
        fields = Path(f"/proc/{record.pid}/stat").read_text().rpartition(")")[2].split()
        boot = next(
            int(line.split()[1])
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime ")
        )
    except (OSError, StopIteration, ValueError):
        return False
    if fields[0] == "Z":
        return False
    began = boot + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    # a process that started after the record is another one that reuses the pid
    return record.started_at is None or began <= record.started_at + 2


def _of_slurm(record: JobRecord, job: slurm.SlurmJob) -> JobStatus:
    has_ended = record.state == "ended"
    note = ""
    if job.is_queued:
        if job.state == "RUNNING":
            note = _silence(record)
            if has_ended:  # in this turn of the job, or in an earlier one
                is_old = record.restarts < len(job.past)
                note = "its search has not begun" if is_old else "its search ended"
        elif job.reason:
            note = job.reason + (f", starts {job.begins_at}" if job.begins_at else "")
        return JobStatus(
            record, job.state, True, past=job.past, time_left_s=job.time_left_s, note=note
        )
    # the accounting subtracts 128 from the exit code of a program that a signal ended
    code = record.exit_code if has_ended and job.exit_code is not None else job.exit_code
    if job.reason.startswith("by "):
        note = f"cancelled by {_user(job.reason[3:])}"
    if not has_ended and record.state != "submitted":
        note = f"it was killed while it was {record.state}"
    elif record.state == "submitted" and job.state != "COMPLETED":
        note = f"it ended before the search began: see {record.log}"
    return JobStatus(record, job.state, False, exit_code=code, past=job.past, note=note)


def _without_slurm(record: JobRecord) -> JobStatus:
    """The status of a job that Slurm does not know, or that is not a Slurm job."""
    if record.state == "ended":
        return JobStatus(record, "ENDED", False, exit_code=record.exit_code)
    lives = process_lives(record) if record.job_id.startswith("local-") else None
    age = time.time() - record.updated_at
    if lives is False:
        return JobStatus(
            record, "LOST", False, note=f"it was killed while it was {record.state}"
        )  # fmt: skip
    if lives or (age < STALE_S and record.state != "submitted"):
        left = None if record.ends_at is None else max(record.ends_at - time.time(), 0.0)
        return JobStatus(record, "RUNNING", True, time_left_s=left, note=_silence(record))
    where = "Slurm no longer knows it" if slurm.is_here() else "there is no Slurm here"
    if record.job_id.startswith("local-"):
        where = f"it is on {record.host}"
    return JobStatus(record, "LOST", False, note=f"{where}, and {_silence(record)}")


def _user(number: str) -> str:
    """The name of a user id."""
    try:
        return pwd.getpwuid(int(number)).pw_name
    except (KeyError, ValueError):
        return f"user {number}"


def _silence(record: JobRecord) -> str:
    age = time.time() - record.updated_at
    if record.state == "submitted":
        return "its search has not begun"
    if age < STALE_S:
        return "" if record.state == "running" else f"it is {record.state}"
    return f"it has said nothing for {age / 60:.0f} min"


def _evaluated(run: Path, records: Sequence[JobRecord]) -> Evaluated:
    latest = max(records, key=lambda r: r.updated_at, default=None)
    total = latest.evaluations_total if latest is not None else 0
    found = _in_journals(run) if (run / ISLANDS).is_dir() else _in_archive(run)
    if found is None:
        done = max((r.evaluations_done for r in records), default=0)
        found = Evaluated(done=done, failed=sum(r.evaluations_failed for r in records))
        if (run / ARCHIVE).exists() or (run / ISLANDS).is_dir():
            found = replace(
                found,
                note="What was evaluated can't be read at the moment (it is being written, or a "
                "killed search left it for the next one to repair): the numbers are the jobs' own.",
            )
    return replace(found, total=found.total or total)


def _in_journals(run: Path) -> Evaluated | None:
    """Counts what all islands have evaluated, each recipe once; None if that can't be read."""
    from gptailor.evaluation.outcome import SEARCH_DOCUMENTS
    from gptailor.run.folder import journals_of, read_run

    if not journals_of(run):  # no island has started yet
        return Evaluated()
    try:
        data = read_run(run)
    except UsageError:
        return None
    search = [e for e in data.evaluations if e.documents == "search"]
    limit = most_small_layers(int(data.family.get("num_layers", 0)))
    alike = [e for e in data.evaluations if e.documents in SEARCH_DOCUMENTS]
    small = [e.outcome.accuracy for e in alike if e.recipe.num_layers <= limit]
    states = [e.outcome.status for e in search]
    return Evaluated(
        done=len(search),
        infeasible=states.count("infeasible"),
        failed=states.count("failed"),
        holdout=sum(e.documents == "holdout" for e in data.evaluations),
        total=int(data.config.get("search", {}).get("evaluations", 0)),
        best=max((accuracy for accuracy in small if accuracy is not None), default=None),
    )


def _in_archive(run: Path) -> Evaluated | None:
    """Counts the archive's evaluations; None if it can't be read without writing to it."""
    counts = count_undisturbed(run)
    if counts is None:
        return None
    return Evaluated(
        done=counts.search,
        infeasible=counts.infeasible,
        failed=counts.failed,
        holdout=counts.holdout,
        total=counts.total,
        best=counts.best_small,
    )
