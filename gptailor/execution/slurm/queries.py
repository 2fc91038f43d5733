"""Queries Slurm about jobs and the site, through the programs that every site has.

Only `cancel` changes anything. All programs run in the user's environment with a limit of half a
minute; a missing or unresponsive Slurm is reported as a result, not as a crash.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from gptailor.errors import UsageError, plain, unknown
from gptailor.execution.slurm.supervisor import known_mpi_types

OVER = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL",
    "DEADLINE", "PREEMPTED", "REVOKED",
)  # fmt: skip
"""States of a job that will not run again, unless the queue still has it."""

_ANSWER_S = 30.0
_SLURM_ID = re.compile(r"\d+(_\d+)?")


@dataclass(frozen=True)
class SlurmJob:
    """A job or an element of a job array, according to Slurm.

    Attributes:
        job_id: as in its record, "NUMBER" or "NUMBER_ELEMENT".
        state: Slurm's state, for example "PENDING", "RUNNING", "NODE_FAIL".
        reason: Slurm's reason why it waits or ended; empty if there is none.
        exit_code: of the batch script according to the accounting, which stores 143 as 15; None
            unless the script exited on its own.
        past: states of its earlier turns, for example ("PREEMPTED", "NODE_FAIL").
        nodes: in Slurm's notation, for example "n[1-2]".
        time_left_s: until the time limit; None unless it is running with one.
        begins_at: Slurm's estimate of its start, for example "2026-11-22T07:24:02".
        is_queued: it is waiting, running or ending; otherwise it is over.
    """

    job_id: str
    state: str
    reason: str = ""
    exit_code: int | None = None
    past: tuple[str, ...] = ()
    nodes: str = ""
    time_left_s: int | None = None
    begins_at: str = ""
    is_queued: bool = True


def is_here() -> bool:
    """Whether this machine has Slurm's programs."""
    return shutil.which("sbatch") is not None


def jobs(job_ids: Iterable[str]) -> dict[str, SlurmJob]:
    """The jobs that Slurm knows; the others are absent. Empty without Slurm.

    Args:
        job_ids: as in records; those that are not Slurm job ids are skipped.
    """
    wanted = [job_id for job_id in job_ids if _SLURM_ID.fullmatch(job_id)]
    if not wanted:
        return {}
    past = _accounted(wanted)
    queued = _queued(wanted)
    found: dict[str, SlurmJob] = {}
    for job_id in wanted:
        turns = past.get(job_id, [])
        now = queued.get(job_id)
        if now is not None:
            # the accounting also has the current turn, unless it has just begun or ended
            known = [t.state for t in turns]
            if known and known[-1] in (now.state, "PENDING", "RUNNING"):
                known.pop()
            found[job_id] = _with_past(now, known)
        elif turns:
            found[job_id] = _with_past(turns[-1], [t.state for t in turns[:-1]])
    return found


def queued(job_ids: Iterable[str]) -> list[str]:
    """Those of the jobs that are waiting, running or ending."""
    wanted = [job_id for job_id in job_ids if _SLURM_ID.fullmatch(job_id)]
    known = _queued(wanted) if wanted else {}
    return [job_id for job_id in wanted if job_id in known]


def cancel(job_ids: Sequence[str], wait_s: float) -> list[str]:
    """Cancels jobs and waits until they are gone; returns those still there after `wait_s`.

    Raises:
        UsageError: Slurm refuses; the message has its reason.
    """
    if not job_ids:
        return []
    done = _run(["scancel", *job_ids])
    until = time.monotonic() + wait_s
    left = queued(job_ids)
    if done.returncode != 0 and left:
        raise UsageError(f"Slurm refuses to cancel {', '.join(left)}: {_reason(done)}.")
    while left and time.monotonic() < until:
        time.sleep(0.5)
        left = queued(left)
    return left


def check_partition(names: str | None, nodes: int, cpus: int, time_min: int) -> None:
    """Raises a `UsageError` for partitions that Slurm does not have or that are too small.

    Many sites accept a job that is too large or too long for its partition and let it wait forever.

    Args:
        names: as for sbatch, "a,b" for two partitions; None for the user's or the site's default.
        nodes: how many nodes a job requests.
        cpus: how many cores a job requests on each node.
        time_min: the time limit that a job requests, in minutes.
    """
    done = _run(["sinfo", "--noheader", "--all", "--format=%P|%l|%D|%c"])
    if done.returncode != 0:
        raise UsageError(f"Slurm does not answer on this machine: {_reason(done)}.")
    known: dict[str, _Partition] = {}
    default = None
    for line in done.stdout.splitlines():
        name, limit, size, each = (*line.strip().split("|"), "", "", "")[:4]
        if name.endswith("*"):
            default = name = name[:-1]
        # "64+" for nodes that differ: the smallest has 64
        most = int(each) if each.isdecimal() else None
        known[name] = _Partition(int(size) if size.isdecimal() else 0, most, limit)
    names = names or os.environ.get("SBATCH_PARTITION") or default
    wanted = names.split(",") if names else []
    for name in wanted:
        if name not in known:
            raise unknown("partition", name, sorted(known))
    chosen = [known[name] for name in wanted]
    what = f"The partition {names}"
    if chosen and all(p.nodes < nodes for p in chosen):
        raise UsageError(
            f"{what} has {max(p.nodes for p in chosen)} nodes, but {nodes} are requested: use "
            "fewer --nodes, or another --partition."
        )
    if chosen and all(p.cpus is not None and p.cpus < cpus for p in chosen):
        raise UsageError(
            f"{what} has nodes of {max(p.cpus or 0 for p in chosen)} cores, but {cpus} are "
            "requested, including those of the rank that searches: use fewer --cpus-per-worker."
        )
    limits = [_seconds(p.limit) for p in chosen]
    if chosen and all(limit is not None and limit < time_min * 60 for limit in limits):
        raise UsageError(
            f"{what} allows {chosen[0].limit}, less than the requested {time_min} minutes: use a "
            "shorter --time (the job requeues itself), or another --partition."
        )


@dataclass(frozen=True)
class _Partition:
    nodes: int
    cpus: int | None
    limit: str


def check_mpi(kind: str) -> None:
    """Raises a `UsageError` for an MPI type that `srun --mpi` does not have."""
    known = known_mpi_types()
    if known and kind not in known:
        raise unknown("type of MPI", kind, known, "--mpi or MPI_TYPE")


def parse_minutes(text: str) -> int:
    """Parses a time limit in Slurm's formats into minutes, rounded up.

    The formats are minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes
    and days-hours:minutes:seconds.

    Raises:
        UsageError: the text has none of these formats, or the time is zero.
    """
    match = re.fullmatch(r"(?:(\d{1,5})-)?(\d{1,7})(?::(\d{1,3}))?(?::(\d{1,3}))?", text.strip())
    if match is None:
        raise UsageError(
            f"{plain(text, 40)!r} is not a time: write minutes, hours:minutes:seconds or "
            "days-hours:minutes:seconds, like 90, 1:30:00 or 2-00:00:00."
        )
    days, first, second, third = (None if g is None else int(g) for g in match.groups())
    if days is not None:
        seconds = ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    elif third is not None:
        seconds = ((first or 0) * 60 + (second or 0)) * 60 + third
    else:
        seconds = (first or 0) * 60 + (second or 0)
    if seconds <= 0:
        raise UsageError(f"The time {text!r} is zero.")
    return -(-seconds // 60)


def _queued(job_ids: Collection[str]) -> dict[str, SlurmJob]:
    """The jobs that are in the queue.

    A finished job stays in the queue for some minutes; it counts as over.
    """
    numbers = sorted({job_id.partition("_")[0] for job_id in job_ids})
    # squeue fails for a single unknown job, and then prints nothing
    done = _run(
        ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(numbers)}",
         "--format=%i|%T|%r|%N|%L|%S"]
    )  # fmt: skip
    found = {}
    for line in done.stdout.splitlines():
        job_id, _, rest = line.strip().partition("|")
        fields = rest.split("|")
        if job_id not in job_ids or len(fields) != 5 or fields[0] in OVER:
            continue
        state, reason, nodes, left, begins = fields
        found[job_id] = SlurmJob(
            job_id,
            state,
            "" if reason == "None" else reason,
            nodes=nodes,
            time_left_s=_seconds(left) if state == "RUNNING" else None,
            begins_at=begins if state == "PENDING" and begins[:1].isdigit() else "",
        )
    return found


def _accounted(job_ids: Collection[str]) -> dict[str, list[SlurmJob]]:
    """The turns of each job that the accounting has, the latest last."""
    numbers = sorted({job_id.partition("_")[0] for job_id in job_ids})
    done = _run(
        ["sacct", "--noheader", "--allocations", "--parsable2", "--duplicates",
         f"--jobs={','.join(numbers)}", "--format=JobID,State,ExitCode,NodeList"]
    )  # fmt: skip
    turns: dict[str, list[SlurmJob]] = {}
    for line in done.stdout.splitlines():
        fields = line.split("|")
        if len(fields) != 4 or fields[0] not in job_ids:
            continue
        job_id, words, code, nodes = fields
        state, _, reason = words.partition(" ")  # "CANCELLED by 0"
        status, _, signal = code.partition(":")
        is_over = state in ("COMPLETED", "FAILED") and status.isdigit() and signal in ("", "0")
        turns.setdefault(job_id, []).append(
            SlurmJob(
                job_id, state, reason, int(status) if is_over else None,
                nodes="" if nodes.startswith("None") else nodes, is_queued=False,
            )
        )  # fmt: skip
    return turns


def _with_past(job: SlurmJob, past: Sequence[str]) -> SlurmJob:
    return SlurmJob(**{**job.__dict__, "past": tuple(past)})


def _seconds(text: str) -> int | None:
    """Seconds of Slurm's "1-02:03:04", "02:03:04" or "3:04"; None for UNLIMITED and the like."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or (dash and not days.isdigit()):
        return None
    total = 0
    for part in parts:
        total = total * 60 + int(part)
    return total + int(days or 0) * 86400


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a program; a missing or hanging program gives an exit code of its own."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    except (OSError, subprocess.TimeoutExpired):
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]} does not answer")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return plain(lines[0] if lines else f"exit code {done.returncode}").rstrip(".")
