"""Submits a search as Slurm jobs: the request, and the batch script that submitit makes from it.

submitit submits, once, a small object that runs the same `srun` line under the same supervisor as
`slurm/search.sh`. Its own way of continuing after a time limit is not used: it pickles the state of
a run, counts time limits and ignores preemption, while a search only needs to be started again.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptailor.errors import UsageError, plain
from gptailor.execution.slurm.supervisor import Supervisor
from gptailor.run.layout import JOBS, LOGS

OURS = (
    "array", "chdir", "cpus-per-task", "distribution", "error", "gpus-per-node", "job-name",
    "mem", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "signal", "time", "wrap",
)  # fmt: skip
"""Options of sbatch that `launch` sets from its own options."""

_NAMED = ("account", "constraint", "mem", "partition", "qos")
_MAX_SIGNAL_S = 65535


@dataclass(frozen=True)
class JobRequest:
    """The Slurm resources and options for each job of a search.

    Attributes:
        config: the `search.yaml`.
        run_folder: its output.
        overrides: `key.path=value`.
        nodes: of each job.
        gpus_per_node: 0 for a search on CPUs.
        time_min: time limit of a job in minutes; the job is requeued until the search is done.
        workers_per_node: ranks of a node that evaluate; default: one per `gpus_per_worker` GPUs.
        gpus_per_worker: more than one for models that don't fit on one GPU.
        cpus_per_worker: cores of each rank.
        mem: memory of a node, in Slurm's notation.
        partition, account, constraint, qos: as in sbatch.
        setup: shell lines at the beginning of the batch script.
        slurm: further options of sbatch, each with its value or True.
        islands: how many jobs work on the search, each with a population of its own.
        mpi: the MPI type for srun.
        signal_before_s: how many seconds before the time limit a search is asked to stop.
        max_requeues: of each job, including preemptions.
        program: the command that starts gptailor on a compute node.
        options: further arguments of `gptailor search`.
    """

    config: Path
    run_folder: Path
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int = 0
    time_min: int = 60
    workers_per_node: int | None = None
    gpus_per_worker: int = 1
    cpus_per_worker: int = 4
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    qos: str | None = None
    setup: tuple[str, ...] = ()
    slurm: tuple[tuple[str, str | bool], ...] = ()
    islands: int | None = None
    mpi: str = "pmix"
    signal_before_s: int = 300
    max_requeues: int = 100
    program: tuple[str, ...] = (sys.executable, "-m", "gptailor.cli")
    options: tuple[str, ...] = ()

    @property
    def workers(self) -> int:
        """Ranks of a node that evaluate."""
        if self.workers_per_node is not None:
            return self.workers_per_node
        return self.gpus_per_node // self.gpus_per_worker

    @property
    def num_ranks(self) -> int:
        """Ranks of each job: those that evaluate, and the one that searches."""
        return self.nodes * self.workers + 1

    def check(self) -> None:
        """Raises a `UsageError` for an impossible request, without asking Slurm."""
        if self.workers < 1 and self.gpus_per_node:
            raise UsageError(
                f"A worker of {self.gpus_per_worker} GPUs does not fit on a node of "
                f"{self.gpus_per_node}: use a smaller --gpus-per-worker."
            )
        if self.workers < 1:
            raise UsageError(
                "Without GPUs, the number of ranks per node is unknown: set "
                "--gpus-per-node or --workers-per-node."
            )
        if 0 < self.gpus_per_node < self.workers * self.gpus_per_worker:
            raise UsageError(
                f"{self.workers} workers of {self.gpus_per_worker} GPUs need more than the "
                f"{self.gpus_per_node} GPUs of a node."
            )
        if not 0 < self.signal_before_s <= min(_MAX_SIGNAL_S, self.time_min * 60 - 60):
            raise UsageError(
                f"--signal-before {self.signal_before_s} leaves no time to search in a job of "
                f"{self.time_min} minutes: use a longer --time, or a --signal-before of slightly "
                "more seconds than the longest evaluation takes."
            )
        for key, value in self.slurm:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
                raise UsageError(f"--slurm {plain(key, 40)}: this is not an option of sbatch.")
            if key in OURS:
                raise UsageError(
                    f"--slurm {key}: this is set by launch's own options, see `gptailor launch -h`."
                )
            if key in _NAMED:
                raise UsageError(f"--slurm {key}={value}: use --{key} {value}.")
        texts = [*self.setup, *(str(v) for _, v in self.slurm), str(self.run_folder)]
        texts += [value for name in _NAMED if (value := getattr(self, name)) is not None]
        texts += [str(self.config), *self.overrides, *self.program, *self.options, self.mpi]
        for text in texts:
            if not text.replace("\t", " ").isprintable():
                raise UsageError(f"{plain(text, 60)!r}: this must be one line of a batch script.")
        if "%" in str(self.run_folder):
            raise UsageError(f"{self.run_folder}: Slurm replaces % in the name of a log.")

    def command(self, island: int | str | None = None) -> list[str]:
        """The `srun` line of a job, or of one island's job."""
        search = ["search", str(self.config), *self.overrides, "--resume", "--executor", "mpi"]
        if island is not None:
            search += ["--island", f"{island}/{self.islands}"]
        search += self.options
        return [
            "srun",
            f"--mpi={self.mpi}",
            "--kill-on-bad-exit=1",
            f"--ntasks={self.num_ranks}",
            "--distribution=cyclic",
            f"--cpus-per-task={self.cpus_per_worker}",
            *self.program,
            *search,
        ]

    def parameters(self, num_jobs: int) -> dict[str, Any]:
        """The parameters of submitit's Slurm executor, for one job or an array of several."""
        log = "job-%A_%a.log" if num_jobs > 1 else "job-%j.log"
        # one log for all turns of a job, next to those of the ranks
        more: dict[str, Any] = {"requeue": True, "output": str(self.run_folder / LOGS / log)}
        more.update(self.slurm)
        if "no-requeue" in more:
            del more["requeue"]
        line = shlex.join(self.command(None if self.islands is None else "I"))
        chosen = {
            "job_name": f"gptailor-{self.run_folder.name}",
            "nodes": self.nodes,
            # one task more than there are workers: the first node also has the rank that searches,
            # and only a uniform allocation puts the same number of workers on each node
            "ntasks_per_node": self.workers + 1,
            "cpus_per_task": self.cpus_per_worker,
            "gpus_per_node": self.gpus_per_node or None,
            "time": self.time_min,
            "mem": self.mem,
            "partition": self.partition,
            "account": self.account,
            "constraint": self.constraint,
            "qos": self.qos,
            # srun would apply the variable to the step, and complain
            "setup": [*self.setup, "unset SLURM_NTASKS_PER_NODE", f"# the program: {line}"],
            "signal_delay_s": self.signal_before_s,
            "use_srun": False,
            "stderr_to_stdout": True,
            "additional_parameters": more,
        }
        # submitit sets a wckey of its own, which sites that use wckeys would refuse
        return {**{k: v for k, v in chosen.items() if v is not None}, "wckey": None}

    @property
    def submitit_folder(self) -> Path:
        """The folder of submitit's scripts and pickles."""
        return self.run_folder / JOBS / "submitit"


class SearchJob:
    """The function that submitit runs in a job's batch shell.

    Args:
        command: the `srun` line.
        max_requeues: of the job.
    """

    def __init__(self, command: Sequence[str], max_requeues: int) -> None:
        self.command = list(command)
        self.max_requeues = max_requeues

    def __call__(self) -> None:
        """Returns if the search is done; otherwise exits with its exit code.

        submitit does not catch an exit and turn it into a result. Its signal handlers are replaced
        by the supervisor's.
        """
        code = Supervisor(self.command, max_requeues=self.max_requeues).run()
        if code != 0:
            raise SystemExit(code)


def script(request: JobRequest, num_jobs: int) -> str:
    """The batch script that `submit` will pass to sbatch; runs and writes nothing.

    submitit has no public function for this; a test watches its version.
    """
    from submitit.slurm import slurm

    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit "
    text: str = slurm._make_sbatch_string(
        command + shlex.quote(str(request.submitit_folder)),
        request.submitit_folder,
        map_count=num_jobs if num_jobs > 1 else None,
        **request.parameters(num_jobs),
    )
    return text


def submit(request: JobRequest, islands: Sequence[int | None]) -> list[str]:
    """Submits a job for each island, as one array if there are several.

    Args:
        request: resources and options.
        islands: their numbers; [None] for a search without islands.

    Returns:
        Ids of the jobs, "NUMBER" or "NUMBER_ELEMENT", in the order of the islands.

    Raises:
        UsageError: Slurm refuses; the message has its reason.

    Side effects: writes below `jobs/` and makes `logs/` in the run folder.
    """
    import submitit

    (request.run_folder / LOGS).mkdir(parents=True, exist_ok=True)
    executor = submitit.SlurmExecutor(request.submitit_folder)
    executor.update_parameters(**request.parameters(len(islands)))
    functions = [SearchJob(request.command(island), request.max_requeues) for island in islands]
    try:
        # submitit both prints and raises sbatch's complaints
        with _outside_of_a_job(), contextlib.redirect_stderr(io.StringIO()):
            submitted = executor.submit_array(functions)
    except RuntimeError as error:  # submitit's, with what sbatch wrote
        lines = str(error).splitlines() or [str(error)]
        complaints = [line for line in lines if "error:" in line] or lines[:1]
        reason = re.sub(r"^sbatch: (error: )?(Batch job submission failed: )?", "", complaints[-1])
        raise UsageError(f"Slurm refuses the job: {plain(reason).rstrip('.')}.") from error
    return [str(job.job_id) for job in submitted]


@contextlib.contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Hides the job that this process runs in: sbatch would pass its variables on."""
    kept = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith("SLURM_") and name not in ("SLURM_CONF", "SLURM_CLUSTERS")
    }
    try:
        yield
    finally:
        os.environ.update(kept)


def parse_slurm(texts: Sequence[str]) -> tuple[tuple[str, str | bool], ...]:
    """Parses sbatch options "key=value", or "key" without a value, each with or without "--"."""
    options: dict[str, str | bool] = {}
    for text in texts:
        key, equals, value = text.removeprefix("--").partition("=")
        options[key.replace("_", "-")] = value if equals else True
    return tuple(options.items())
