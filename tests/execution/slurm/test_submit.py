"""What `gptailor launch` asks of Slurm. Scripts are compared whole: review any change of them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import pytest

from gptailor import cli
from gptailor.demo import PATH as DEMO
from gptailor.errors import UsageError
from gptailor.execution.slurm.queries import parse_minutes
from gptailor.execution.slurm.submit import JobRequest, SearchJob, parse_slurm, script

REQUEST = JobRequest(
    config=Path("/home/a b/search.yaml"),
    run_folder=Path("/scratch/my runs/mine"),
    overrides=("search.evaluations=500",),
    nodes=8,
    gpus_per_node=4,
    time_min=720,
    program=("gptailor",),
)

ONE_JOB = """#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=4
#SBATCH --job-name=gptailor-mine
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=5
#SBATCH --open-mode=append
#SBATCH --output='/scratch/my runs/mine/logs/job-%j.log'
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=720

# setup
unset SLURM_NTASKS_PER_NODE
# the program: srun --mpi=pmix --kill-on-bad-exit=1 --ntasks=33 --distribution=cyclic \
--cpus-per-task=4 gptailor search '/home/a b/search.yaml' search.evaluations=500 --resume \
--executor mpi

# command
export SUBMITIT_EXECUTOR=slurm
PYTHON -u -m submitit.core._submit '/scratch/my runs/mine/jobs/submitit'
"""

ISLANDS = """#!/bin/bash

# Parameters
#SBATCH --account=proj
#SBATCH --array=0-2%3
#SBATCH --constraint='a100&ib'
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=gptailor-mine
#SBATCH --mail-type=END,FAIL
#SBATCH --mem=0
#SBATCH --no-requeue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=5
#SBATCH --open-mode=append
#SBATCH --output='/scratch/my runs/mine/logs/job-%A_%a.log'
#SBATCH --partition=gpu,spot
#SBATCH --qos=low
#SBATCH --signal=USR2@900
#SBATCH --time=2880

# setup
module load openmpi/5.0
source ~/venv/bin/activate
unset SLURM_NTASKS_PER_NODE
# the program: srun --mpi=pmi2 --kill-on-bad-exit=1 --ntasks=9 --distribution=cyclic \
--cpus-per-task=16 apptainer exec --nv image.sif gptailor search '/home/a b/search.yaml' --resume \
--executor mpi --island I/3

# command
export SUBMITIT_EXECUTOR=slurm
PYTHON -u -m submitit.core._submit '/scratch/my runs/mine/jobs/submitit'
"""


def shown(request: JobRequest, num_jobs: int) -> str:
    return script(request, num_jobs).replace(shlex.quote(sys.executable), "PYTHON")


def test_the_script_of_one_job() -> None:
    assert shown(REQUEST, 1) == ONE_JOB


def test_the_script_of_islands() -> None:
    request = JobRequest(
        config=REQUEST.config,
        run_folder=REQUEST.run_folder,
        nodes=2,
        gpus_per_node=8,
        time_min=parse_minutes("2-00:00:00"),
        gpus_per_worker=2,
        cpus_per_worker=16,
        mem="0",
        partition="gpu,spot",
        account="proj",
        constraint="a100&ib",
        qos="low",
        setup=("module load openmpi/5.0", "source ~/venv/bin/activate"),
        slurm=parse_slurm(["mail-type=END,FAIL", "--exclusive", "no_requeue"]),
        islands=3,
        mpi="pmi2",
        signal_before_s=900,
        program=("apptainer", "exec", "--nv", "image.sif", "gptailor"),
    )
    request.check()
    assert shown(request, 3) == ISLANDS


def test_the_version_of_submitit() -> None:
    """gptailor uses private functions of submitit. Before naming another version here, look at its
    `_make_sbatch_string` and `_submit_command_str`, and run tests/cluster/test_launch.py."""
    assert metadata.version("submitit") == "1.5.4"


def test_the_program_of_an_island_names_it() -> None:
    words = replace(REQUEST, islands=3).command(2)
    assert words[:2] == ["srun", "--mpi=pmix"]
    assert words[-2:] == ["--island", "2/3"]
    assert "--island" not in REQUEST.command()


def test_a_worker_may_have_several_gpus() -> None:
    assert replace(REQUEST, gpus_per_worker=2).num_ranks == 8 * 2 + 1
    assert replace(REQUEST, workers_per_node=3).num_ranks == 8 * 3 + 1
    assert replace(REQUEST, gpus_per_node=0, workers_per_node=6).num_ranks == 8 * 6 + 1


class Changes(TypedDict, total=False):
    gpus_per_node: int
    gpus_per_worker: int
    workers_per_node: int
    time_min: int
    signal_before_s: int
    slurm: tuple[tuple[str, str | bool], ...]
    setup: tuple[str, ...]
    partition: str
    overrides: tuple[str, ...]
    run_folder: Path


REFUSED: list[tuple[Changes, str]] = [
    ({"gpus_per_node": 0}, "set --gpus-per-node or --workers-per-node"),
    ({"gpus_per_worker": 8}, "A worker of 8 GPUs does not fit on a node of 4"),
    ({"gpus_per_worker": 2, "workers_per_node": 3}, "need more than the 4 GPUs of a node"),
    ({"time_min": 5}, "--signal-before 300 leaves no time to search in a job of 5 minutes"),
    ({"signal_before_s": 70000}, "--signal-before 70000 leaves no time"),
    ({"slurm": parse_slurm(["nodes=3"])}, "--slurm nodes: this is set by launch's own"),
    ({"slurm": parse_slurm(["signal=B:USR2@60"])}, "--slurm signal: this is set by"),
    ({"slurm": parse_slurm(["partition=gpu"])}, "use --partition gpu"),
    ({"slurm": parse_slurm(["a b=3"])}, "--slurm a b: this is not an option of sbatch"),
    ({"slurm": parse_slurm(["comment=a\nrm -r ~"])}, "this must be one line of a batch script"),
    ({"setup": ("module load a\nrm -r ~",)}, "this must be one line of a batch script"),
    ({"partition": "a\n"}, "this must be one line of a batch script"),
    ({"overrides": ("a=\n1",)}, "this must be one line of a batch script"),
    ({"run_folder": Path("/runs/50%")}, "Slurm replaces % in the name of a log"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_bad_requests_are_refused_before_slurm_is_asked(changes: Changes, message: str) -> None:
    REQUEST.check()
    with pytest.raises(UsageError, match=r"^[^\n]*$") as error:
        replace(REQUEST, **changes).check()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:30", 91),
        ("1:30:00", 90),
        ("0:0:1", 1),
        ("2-0", 2880),
        ("1-12:30", 2190),
        ("2-00:00:00", 2880),
        ("10000", 10000),
    ],
)
def test_times_are_read_the_way_slurm_reads_them(text: str, minutes: int) -> None:
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "1h", "-5", "1:2:3:4", "0", "0:00", "1.5", "9" * 50])
def test_invalid_times(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a time|is zero"):
        parse_minutes(text)


def test_a_submitit_job_ends_with_the_searchs_exit_code(tmp_path: Path) -> None:
    """submitit turns a return or an exception into a result, but lets SystemExit through."""
    code = "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1]))()"
    for wanted in (0, 3):
        job = SearchJob([sys.executable, "-c", f"raise SystemExit({wanted})"], 100)
        import pickle

        done = subprocess.run(
            [sys.executable, "-c", code, pickle.dumps(job).hex()],
            env={k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
            check=False,
            stderr=subprocess.DEVNULL,
        )
        assert done.returncode == wanted


def launch_demo(*words: str) -> int:
    return cli.main(["launch", str(DEMO / "search.yaml"), "--workers-per-node", "2", *words])


def test_dry_run_writes_nothing_and_needs_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("GPTAILOR", "apptainer exec image.sif gptailor")
    monkeypatch.setenv("MPI_TYPE", "pmi2")
    words = ("--stage", "$TMPDIR", "--io", "pread", "--log-json")
    assert launch_demo("--time", "1:00:00", "--dry-run", "output=runs/mine", *words) == 0
    out = capsys.readouterr().out
    assert f"#SBATCH --output={tmp_path}/runs/mine/logs/job-%j.log" in out
    assert "--mpi=pmi2" in out
    assert "apptainer exec image.sif gptailor search" in out
    assert "--executor mpi --io=pread '--stage=$TMPDIR' --log-json" in out
    assert not list(tmp_path.iterdir())


def test_without_slurm_launch_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch_demo("--time", "60") == 2
    assert "There is no Slurm on this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
