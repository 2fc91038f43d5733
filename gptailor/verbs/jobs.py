"""The verbs for Slurm jobs: submit them, look at them, end them."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptailor.errors import UsageError
from gptailor.patience import Say, slowly
from gptailor.run.layout import JOBS

if TYPE_CHECKING:
    from gptailor.config import Config
    from gptailor.execution.slurm.status import RunStatus
    from gptailor.execution.slurm.submit import JobRequest

CANCEL_WAIT_S = 90.0
"""Most sites have Slurm kill what is left of a job 30 s after asking it to end."""


@dataclass(frozen=True)
class Launched:
    """What `launch` did, or would do.

    Attributes:
        run_folder: of the search.
        script: the batch script.
        job_ids: of the jobs, in the order of the islands; empty after a dry run.
        islands: their numbers; empty without islands.
        num_ranks: of each job.
    """

    run_folder: Path
    script: str
    job_ids: tuple[str, ...]
    islands: tuple[int, ...]
    num_ranks: int


@dataclass(frozen=True)
class Cancelled:
    """What `cancel` did.

    Attributes:
        ended: jobs that are gone now.
        left: jobs that were asked to end and are not gone yet.
        elsewhere: runs on other machines, as (job, machine): they can only be ended there.
    """

    ended: tuple[str, ...]
    left: tuple[str, ...]
    elsewhere: tuple[tuple[str, str], ...]


def launch(
    config: str | Path,
    *,
    time: str,
    overrides: Sequence[str] = (),
    nodes: int = 1,
    gpus_per_node: int = 0,
    workers_per_node: int | None = None,
    gpus_per_worker: int = 1,
    cpus_per_worker: int = 4,
    mem: str | None = None,
    partition: str | None = None,
    account: str | None = None,
    constraint: str | None = None,
    qos: str | None = None,
    setup: Sequence[str] = (),
    slurm: Sequence[str] = (),
    islands: int | None = None,
    mpi: str | None = None,
    signal_before_s: int = 300,
    max_requeues: int = 100,
    io: str | None = None,
    stage: str | None = None,
    log_json: bool = False,
    dry_run: bool = False,
    note: Say = lambda text: None,
) -> Launched:
    """Submits a search to Slurm, as one job or as one for each island.

    Everything that can be checked on the login node is checked first. If the run is already in
    progress, only islands without a job are submitted.

    Args:
        config: a `search.yaml`.
        time: limit of a job, as Slurm writes it: "90", "1:30:00", "2-00:00:00".
        slurm: further options of sbatch, "key=value".
        mpi: type of MPI for srun; default: MPI_TYPE of the environment, or "pmix".
        io: how weights are read: auto, mmap, pread or direct.
        stage: a folder of the nodes' own disks for copies of the candidates.
        log_json: write the ranks' logs as JSON lines, too.
        dry_run: makes the batch script only; checks neither Slurm nor the models.
        note: takes a line for what takes long.
        overrides, nodes and the others: as in `JobRequest`.

    Raises:
        UsageError: something is wrong, Slurm is missing or refuses, or the run is in progress.
        ResourceError: the run folder can't be written.
    """
    from gptailor.config import read_config
    from gptailor.execution.slurm import queries as cluster
    from gptailor.execution.slurm.submit import JobRequest, parse_slurm, script, submit

    parsed = read_config(config, overrides)
    output = Path(parsed.output).absolute()
    program = shlex.split(os.environ.get("GPTAILOR", ""))
    options = [f"--io={io}"] if io is not None else []
    options += [f"--stage={stage}"] if stage is not None else []
    options += ["--log-json"] if log_json else []
    asked = JobRequest(
        config=Path(config).absolute(),
        run_folder=output,
        overrides=tuple(overrides),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time_min=cluster.parse_minutes(time),
        workers_per_node=workers_per_node,
        gpus_per_worker=gpus_per_worker,
        cpus_per_worker=cpus_per_worker,
        mem=mem,
        partition=partition,
        account=account,
        constraint=constraint,
        qos=qos,
        setup=tuple(setup),
        slurm=parse_slurm(slurm),
        islands=islands,
        mpi=mpi or os.environ.get("MPI_TYPE") or "pmix",
        signal_before_s=signal_before_s,
        max_requeues=max_requeues,
        options=tuple(options),
        **({"program": tuple(program)} if program else {}),
    )
    asked.check()
    numbers: list[int | None] = [None] if islands is None else list(range(islands))
    if dry_run:
        return Launched(output, script(asked, len(numbers)), (), _given(numbers), asked.num_ranks)
    with slowly("Asking Slurm", note):
        _check_cluster(asked)
        numbers = _without_job(output, numbers)
    with slowly("Checking the search", note):
        _check_search(parsed, output, has_islands=islands is not None)
    _check_writable(output)
    job_ids = submit(asked, numbers)
    _note_submitted(output, job_ids, numbers, parsed.search.evaluations)
    text = script(asked, len(numbers))
    return Launched(output, text, tuple(job_ids), _given(numbers), asked.num_ranks)


def status(run: str | Path) -> RunStatus:
    """Returns how far a run is and what its jobs are doing, without disturbing it.

    Raises:
        UsageError: the folder holds no run.
    """
    from gptailor.execution.slurm.status import look_at

    return look_at(run)


def cancel(
    run: str | Path, *, wait_s: float = CANCEL_WAIT_S, note: Say = lambda text: None
) -> Cancelled:
    """Ends the jobs of a run and waits until they are gone; `search --resume` continues it.

    `note` takes a line about the jobs that are waited for.

    Raises:
        UsageError: the folder holds no run, or Slurm refuses.
    """
    from gptailor.execution.slurm import queries as cluster
    from gptailor.execution.slurm.status import look_at, process_lives

    live = [job.record for job in look_at(run).jobs if job.is_live]
    here = [r for r in live if r.job_id.startswith("local-") and process_lives(r)]
    there = [r for r in live if r.job_id.startswith("local-") and r not in here]
    for record in here:
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGTERM)
    until = time.monotonic() + wait_s
    of_slurm = [r.job_id for r in live if not r.job_id.startswith("local-")]
    with slowly(f"Waiting for {', '.join(r.job_id for r in live)} to end", note):
        left = cluster.cancel(cluster.queued(of_slurm), wait_s)
        while (still := [r for r in here if process_lives(r)]) and time.monotonic() < until:
            time.sleep(0.2)
    left += [r.job_id for r in still]
    ended = [j for j in [*of_slurm, *(r.job_id for r in here)] if j not in left]
    return Cancelled(tuple(ended), tuple(left), tuple((r.job_id, r.host) for r in there))


def _check_cluster(asked: JobRequest) -> None:
    from gptailor.execution.slurm import queries as cluster

    if not cluster.is_here():
        raise UsageError(
            "There is no Slurm on this machine (sbatch is not found): log in to the cluster, or "
            "use `gptailor search` or `mpirun -n 4 gptailor search` here."
        )
    cpus = (asked.workers + 1) * asked.cpus_per_worker
    cluster.check_partition(asked.partition, asked.nodes, cpus, asked.time_min)
    cluster.check_mpi(asked.mpi)


def _without_job(output: Path, numbers: Sequence[int | None]) -> list[int | None]:
    """The islands (None: the whole search) that no job is working on."""
    from gptailor.execution.slurm.status import job_states
    from gptailor.run.job_record import read_all

    live = [job.record for job in job_states(read_all(output)) if job.is_live]
    if not live:
        return list(numbers)
    taken = {record.island for record in live}
    left = [number for number in numbers if number not in taken]
    if None in taken or None in numbers or not left:
        ids = ", ".join(record.job_id for record in live)
        raise UsageError(
            f"The run {output} is in progress in job {ids}: `gptailor status` shows how far it is; "
            + (
                "more --islands join it."
                if None not in taken and None not in numbers
                else "`gptailor cancel` ends it."
            )
        )
    return left


def _check_search(parsed: Config, output: Path, *, has_islands: bool) -> None:
    """Raises a `UsageError` for anything that would end the search within its first minute."""
    from gptailor.run.archive import Archive
    from gptailor.run.resume import check_config_file, check_kind
    from gptailor.verbs.checks import check_writable, find_problems

    check_writable(output)  # now, not after the tasks are loaded
    check_kind(output, has_islands=has_islands)
    check_config_file(output, parsed)
    Archive.check_not_in_use(output)
    problems = find_problems(parsed)
    if problems:
        more = f" (and {len(problems) - 1} more: `gptailor check`)" if len(problems) > 1 else ""
        raise UsageError(f"{problems[0].rstrip('.')}{more}.")


def _check_writable(output: Path) -> None:
    from gptailor.errors import ResourceError

    try:
        (output / JOBS).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output / JOBS) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ResourceError(
            f"The run folder {output} can't be written: {error.strerror}."
        ) from error


def _note_submitted(
    output: Path, job_ids: Sequence[str], numbers: Sequence[int | None], total: int
) -> None:
    from time import time as unix_time

    from gptailor.run.job_record import JobRecord, path_of

    for job_id, number in zip(job_ids, numbers, strict=True):
        record = JobRecord(
            job_id,
            state="submitted",
            island=number,
            updated_at=unix_time(),
            evaluations_total=total,
            log=f"logs/job-{job_id}.log",
        )
        if not path_of(output, job_id).exists():  # a quick job has its own record by now
            record.write(output)


def _given(numbers: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(number for number in numbers if number is not None)
