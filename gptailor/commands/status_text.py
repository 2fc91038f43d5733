"""The status of a run as text and as JSON."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptailor.errors import plain
from gptailor.patience import duration
from gptailor.run.pareto import SMALL

if TYPE_CHECKING:
    from gptailor.execution.slurm.status import JobStatus, RunStatus
    from gptailor.run.job_record import WorkerRecord

MAX_WORKERS = 16
"""At most this many workers of a job are listed, longest-running evaluations first."""

MAX_OVER = 8
"""At most this many finished jobs are listed, the most recent ones."""

MAX_FAILURES = 8


def status_json(status: RunStatus) -> dict[str, Any]:
    """The whole status as JSON objects."""
    jobs = []
    for job in status.jobs:
        data = dataclasses.asdict(job)
        jobs.append({**data, "runs": job.runs})
    return {**dataclasses.asdict(status), "jobs": jobs, "is_complete": status.is_complete}


def status_text(status: RunStatus) -> str:
    """The status as text: a summary line, the jobs, their workers, failures."""
    lines = [_head(status)]
    if status.evaluated.note:
        lines.append(status.evaluated.note)
    if status.jobs:
        over = [job for job in status.jobs if not job.is_live]
        hidden = over[:-MAX_OVER]
        lines += ["", *_table(_job_rows([job for job in status.jobs if job not in hidden]))]
        if hidden:
            lines.append(f"… and {len(hidden)} earlier ones (--json shows all)")
    else:
        lines.append("This run has no known jobs.")
    for job in status.jobs:
        if job.runs and job.record.workers:
            lines += ["", *_workers(job)]
    failures = [(f, j) for j in status.jobs for f in j.record.failures]
    if failures:
        lines += ["", "failed"]
        lines += _table(
            [
                (f"  {plain(f.point, 20)}", plain(f.reason, 90), plain(f.log, 120))
                for f, _ in failures[-MAX_FAILURES:]
            ]
        )
    return "\n".join(lines)


def _head(status: RunStatus) -> str:
    evaluated = status.evaluated
    total = f" of {evaluated.total}" if evaluated.total else ""
    parts = [f"{status.run_folder}: {evaluated.done}{total} evaluations"]
    if evaluated.failed:
        parts.append(f"{evaluated.failed} failed")
    if evaluated.infeasible:
        parts.append(f"{evaluated.infeasible} infeasible")
    if evaluated.holdout:
        parts.append(f"{evaluated.holdout} on the holdout")
    if evaluated.best is not None:
        parts.append(f"best at ≤ {100 * SMALL:.0f} % of the layers: {evaluated.best:.3f}")
    if status.evaluations_per_hour:
        parts.append(f"{status.evaluations_per_hour:.0f} per hour")
    if status.is_complete:
        parts.append("complete")
    elif status.time_left_s is not None:
        parts.append(f"about {duration(status.time_left_s)} left")
    return " · ".join(parts)


def _job_rows(jobs: Sequence[JobStatus]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("job", "state", "island", "workers", "new", "per hour", "limit in", "")
    ]
    for job in jobs:
        record = job.record
        busy = sum(worker.job is not None for worker in record.workers)
        rate = record.evaluations_per_hour
        state = job.state if not job.exit_code else f"{job.state} ({job.exit_code})"
        notes = [job.note] if job.note else []
        if job.past:
            notes.append(f"before: {', '.join(job.past)}")
        rows.append(
            (
                record.job_id,
                state,
                "" if record.island is None else str(record.island),
                f"{busy}/{len(record.workers)} busy" if job.runs and record.workers else "",
                str(record.evaluations_new),
                f"{rate:.0f}" if rate and job.runs else "",
                duration(job.time_left_s) if job.time_left_s is not None else "",
                plain("; ".join(notes), 160),
            )
        )
    if all(row[2] == "" for row in rows[1:]):
        rows = [(*row[:2], *row[3:]) for row in rows]
    return rows


def _workers(job: JobStatus) -> list[str]:
    now = time.time()
    workers = sorted(job.record.workers, key=lambda w: (w.job is None, w.since or now, w.rank))
    rows: list[tuple[str, ...]] = [("  rank", "host", "device", "does", "for")]
    for worker in workers[:MAX_WORKERS]:
        rows.append(
            (
                f"  {worker.rank}",
                plain(worker.host, 40),
                plain(worker.device, 40),
                _does(worker),
                duration(max(now - worker.since, 0.0)) if worker.since else "",
            )
        )
    lines = [f"workers of {job.record.job_id}", *_table(rows)]
    if len(workers) > MAX_WORKERS:
        lines.append(f"  … and {len(workers) - MAX_WORKERS} more (--json shows all)")
    return lines


def _does(worker: WorkerRecord) -> str:
    if worker.job is not None:
        return plain(worker.job, 60)
    return "waits" if worker.device else "starts"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
