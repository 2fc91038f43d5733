"""Starts MPI programs in tests, with whichever mpirun is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from gptailor.evaluation.outcome import Evaluation
from gptailor.run.archive import Archive
from tests.models.tiny import save_model

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("base", "red", "green", "blue")
PROGRAM = ("-m", "tests.execution.mpi.mpi_program")


@dataclass(frozen=True)
class Ended:
    """How an MPI program ended: mpirun's exit code, and the program's output."""

    code: int
    stdout: str
    stderr: str

    @property
    def sentences(self) -> list[str]:
        """The command line's error messages."""
        return [line for line in self.stderr.splitlines() if line.startswith("gptailor: ")]


def needs_mpi() -> None:
    """Skips the test if no MPI is installed."""
    pytest.importorskip("mpi4py", reason="needs MPI: pip install 'gptailor[mpi]'")
    if shutil.which("mpirun") is None:
        pytest.skip("needs mpirun: apt-get install openmpi-bin, or pip install mpich")


def clean_environment(**values: str) -> dict[str, str]:
    """The environment without traces of another launcher."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI", "OMPI_"))}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMPI_MCA_btl": "self,vader,tcp",
        **values,
    }


def start(
    words: Sequence[str],
    ranks: int = 3,
    *,
    program: Sequence[str] = PROGRAM,
    faults: Mapping[str, object] | None = None,
    parts: Sequence[Sequence[str]] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Starts mpirun with a program on each rank.

    Args:
        words: the program's arguments.
        ranks: how many.
        program: Python's arguments that name the program.
        faults: for `mpi_program`.
        parts: one for each further rank: the words to put before Python there.
        env: further environment variables.
    """
    needs_mpi()
    line = [sys.executable, *program, *words]
    command = ["mpirun", "-n", str(ranks), *line]
    for before in parts:
        command += [":", "-n", "1", *before, *line]
    values = {"TEST_FAULTS": json.dumps(faults or {}), **(env or {})}
    return subprocess.Popen(
        command,
        env=clean_environment(**values),
        cwd="/",  # `python -m` looks here first: in ROOT, all ranks would import the same package
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process: subprocess.Popen[str], timeout_s: float = 120) -> Ended:
    """Waits for the end; a program that hangs is terminated, and fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        stdout, stderr = process.communicate(timeout=30)
        pytest.fail(f"it hangs:\n{stdout}\n{stderr}")
    return Ended(process.returncode, stdout, stderr)


def write_search(folder: Path, **search: object) -> Path:
    """Writes a search.yaml, and a family with meaningless weights; returns the search.yaml."""
    models = folder / "family"
    if not models.exists():
        for name in NAMES:
            save_model(models / name, 8)
    config = {
        "models": {name: str(models / name) for name in NAMES},
        "base": "base",
        "space": {"layers": {"min": 3}},
        "evaluation": {"tasks": ["synthetic"], "device": "cpu"},
        "search": {"population": 12, "evaluations": 60, "arms": ["random"], **search},
        "output": str(folder / "run"),
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def evaluations(run: Path) -> list[Evaluation]:
    with Archive(run, readonly=True) as archive:
        return archive.evaluations("search")


def count(run: Path) -> int:
    try:
        return len(evaluations(run)) if (run / "archive.db").exists() else 0
    except Exception:  # it is being created
        return 0


def log(run: Path, rank: int) -> str:
    return (run / "logs" / f"rank-{rank:03d}.log").read_text()
