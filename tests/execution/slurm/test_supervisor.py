"""The supervisor, with real child processes; tests/cluster has it with a real Slurm.

Where a branch depends on the output of `srun` or `scontrol`, small programs of that name stand in.
"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gptailor
from gptailor import execution, exit_codes
from gptailor.execution import slurm, variables
from gptailor.execution.slurm import supervisor
from gptailor.execution.slurm.supervisor import known_mpi_types, mpi_type

CHILD = """
import os, pathlib, signal, sys, time
tries = pathlib.Path(sys.argv[1])
with tries.open("a") as file:
    file.write("x")
number = len(tries.read_text())

def mean(code):
    pathlib.Path(os.environ["GPTAILOR_VERDICT"]).write_text(f"{code}\\n")

def on(number, then):
    signal.signal(number, lambda *_: (then(), os._exit(9)))

def gain(count=1):
    with open(os.environ["GPTAILOR_GAINED"], "ab") as file:
        file.write(b"+" * count)

def ready():
    tries.with_suffix(".ready").write_text(str(os.getpid()))

exec(sys.argv[2])
"""


class Supervised:
    """A supervisor whose child runs the given Python code."""

    def __init__(self, folder: Path, code: str, *options: str, **environ: str) -> None:
        self.folder = folder
        self.tries = folder / "tries"
        child = folder / "child.py"
        child.write_text(CHILD)
        programs = folder / "bin"
        programs.mkdir(exist_ok=True)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        path = f"{programs}:{inherited['PATH']}"
        temporary = folder / "tmp"
        temporary.mkdir()
        command = [sys.executable, str(child), str(self.tries), code]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptailor.execution.supervisor", "--restart-after", "0.05",
             *options, "--", *command],
            env={**inherited, "PATH": path, "TMPDIR": str(temporary), **environ},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def started(self) -> None:
        """Waits until the child is ready for signals."""
        ready = self.tries.with_suffix(".ready")
        until = time.monotonic() + 20
        while not ready.exists():
            assert time.monotonic() < until, "the child never started"
            time.sleep(0.01)

    def end(self) -> tuple[int, int, str]:
        """(exit code, tries, stderr)."""
        _, said = self.process.communicate(timeout=30)
        assert not list((self.folder / "tmp").iterdir())
        tries = len(self.tries.read_text()) if self.tries.exists() else 0
        return self.process.returncode, tries, said


def program(folder: Path, name: str, text: str) -> None:
    """A stand-in for one of Slurm's programs."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 130, 143])
def test_the_exit_code_file_is_final(tmp_path: Path, code: int) -> None:
    """It overrides the command's own exit code, as a rank may have been killed afterwards."""
    assert Supervised(tmp_path, f"mean({code}); os._exit(77)").end()[:2] == (code, 1)


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 75])
def test_gptailors_exit_codes_are_final_without_the_file(tmp_path: Path, code: int) -> None:
    """A usage error occurs before the search begins, on all ranks."""
    assert Supervised(tmp_path, f"os._exit({code})").end()[:2] == (code, 1)


def test_a_killed_step_is_restarted(tmp_path: Path) -> None:
    dies = "os.kill(os.getpid(), signal.SIGKILL)"
    code, tries, said = Supervised(tmp_path, f"if number < 3: {dies}\nmean(0)").end()
    assert (code, tries) == (0, 3)
    assert said.count("a rank was ended by SIGKILL") == 2
    assert "starts again in 0.05 s" in said
    assert "starts again in 0.1 s" in said


def test_the_file_of_an_earlier_try_does_not_count(tmp_path: Path) -> None:
    code = "if number == 1: mean(''); os._exit(137)\nif number == 2: os._exit(137)\nmean(3)"
    assert Supervised(tmp_path, code).end()[:2] == (3, 3)


def test_a_step_that_always_dies_is_given_up(tmp_path: Path) -> None:
    code, tries, said = Supervised(tmp_path, "os._exit(137)").end()
    assert (code, tries) == (5, 4)
    assert "after 3 restarts without one new result this is given up" in said


def test_a_step_that_always_fails_keeps_its_exit_code(tmp_path: Path) -> None:
    assert Supervised(tmp_path, "raise RuntimeError", "--max-restarts", "1").end()[:2] == (1, 2)


def test_new_results_reset_the_count_of_restarts(tmp_path: Path) -> None:
    """Nine deaths, but never more than one in a row without a new result."""
    code = "if number % 2: gain(number)\nif number < 10: os._exit(137)\nmean(0)"
    result = Supervised(tmp_path, code, "--max-restarts", "2").end()
    assert result[:2] == (0, 10)
    for number in (1, 3, 5, 7, 9):
        assert f"SIGKILL after 0 s and {number} new results; starts again in 0.05 s" in result[2]
    assert result[2].count("SIGKILL after 0 s and 0 new results; starts again in 0.1 s") == 4


def test_a_step_without_new_results_is_given_up(tmp_path: Path) -> None:
    """However long it runs, and whatever earlier steps gained."""
    code = "if number < 3: gain(7)\nelse: time.sleep(0.2)\nos._exit(137)"
    result = Supervised(tmp_path, code, "--max-restarts", "2").end()
    assert result[:2] == (5, 4)
    assert "after 2 restarts without one new result this is given up" in result[2]


def test_a_search_whose_gains_file_was_deleted_is_restarted(tmp_path: Path) -> None:
    """The supervisor creates the file again for the next try."""
    code = "os.unlink(os.environ['GPTAILOR_GAINED'])\nif number < 3: os._exit(137)\nmean(0)"
    assert Supervised(tmp_path, code).end()[:2] == (0, 3)


def test_usr2_is_forwarded(tmp_path: Path) -> None:
    run = Supervised(tmp_path, "on(signal.SIGUSR2, lambda: mean(75)); ready(); time.sleep(60)")
    run.started()
    run.process.send_signal(signal.SIGUSR2)
    code, tries, said = run.end()
    assert (code, tries) == (75, 1)
    assert "got SIGUSR2" in said
    assert "start the same command again" in said  # there is no Slurm to requeue it


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("says", [True, False])
def test_no_restart_after_an_end_from_outside(
    tmp_path: Path, number: int, code: int, says: bool
) -> None:
    """Either signal reaches the ranks as SIGTERM; they may or may not manage to write the file."""
    child = f"on(signal.SIGTERM, lambda: {says} and mean(143)); ready(); time.sleep(60)"
    run = Supervised(tmp_path, child)
    run.started()
    run.process.send_signal(number)
    assert run.end()[:2] == (code, 1)


def test_usr2_without_a_handler_leads_to_a_requeue(tmp_path: Path) -> None:
    """SIGUSR2 kills by default, for example while the ranks are starting."""
    run = Supervised(tmp_path, "ready(); time.sleep(60)")
    run.started()
    run.process.send_signal(signal.SIGUSR2)
    assert run.end()[:2] == (75, 1)


def test_a_signal_between_two_tries(tmp_path: Path) -> None:
    run = Supervised(tmp_path, "ready(); os._exit(137)", "--restart-after", "30")
    run.started()
    time.sleep(0.3)
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[:2] == (143, 1)


@pytest.mark.parametrize(
    ("end", "expected"), [("2026-11-22T10:00:00", "1795341600"), ("Unknown", "None")]
)
def test_the_search_is_told_when_the_job_ends(tmp_path: Path, end: str, expected: str) -> None:
    program(tmp_path, "scontrol", f"echo JobId=71 JobState=RUNNING EndTime={end}")
    code = f"mean(0 if str(os.environ.get('GPTAILOR_ENDS_AT')) == '{expected}' else 3)"
    assert Supervised(tmp_path, code, SLURM_JOB_ID="71", TZ="UTC").end()[:2] == (0, 1)


def test_slurm_is_asked_for_a_requeue(tmp_path: Path) -> None:
    """Slurm kills a job that it requeues; here the stand-in does."""
    program(tmp_path, "scontrol", "[ $1 = requeue ] && kill $PPID")
    run = Supervised(tmp_path, "mean(75)", SLURM_JOB_ID="71")
    code, tries, said = run.end()
    assert (code, tries) == (75, 1)
    assert "job 71, restart 0" in said
    assert "requeued" in said


def test_only_one_element_of_an_array_is_requeued(tmp_path: Path) -> None:
    program(tmp_path, "scontrol", "echo no: $2 >&2; exit 1")
    element = {"SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "2"}
    assert "(no: 71_2)" in Supervised(tmp_path, "mean(75)", **element).end()[2]


def test_a_site_without_requeue(tmp_path: Path) -> None:
    program(tmp_path, "scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    code, tries, said = Supervised(tmp_path, "mean(75)", SLURM_JOB_ID="71").end()
    assert (code, tries) == (75, 1)
    assert "does not requeue the job (Requested operation is presently disabled): submit" in said


def test_requeues_have_a_limit(tmp_path: Path) -> None:
    program(tmp_path, "scontrol", "echo never >&2; exit 1")
    environ = {"SLURM_JOB_ID": "71", "SLURM_RESTART_COUNT": "2"}
    code, tries, said = Supervised(tmp_path, "mean(75)", "--max-requeues", "2", **environ).end()
    assert (code, tries) == (75, 1)
    assert "has been requeued 2 times" in said


PREEMPTED = "JobState=RUNNING StartTime=2026-11-22T07:22:11 PreemptTime={}"


@pytest.mark.parametrize("child", ["mean(143)", "os._exit(143)"])
def test_preemption_with_grace_time_leads_to_a_requeue(tmp_path: Path, child: str) -> None:
    shown = PREEMPTED.format("2026-11-22T07:22:15")
    program(tmp_path, "scontrol", f"[ $1 = requeue ] && kill $PPID || echo {shown}")
    code, tries, said = Supervised(tmp_path, child, SLURM_JOB_ID="71").end()
    assert (code, tries) == (75, 1)
    assert "requeued" in said


@pytest.mark.parametrize("at", ["None", "2026-11-21T23:00:00"])
def test_an_end_without_preemption_is_not_requeued(tmp_path: Path, at: str) -> None:
    program(tmp_path, "scontrol", f"[ $1 = requeue ] && exit 0; echo {PREEMPTED.format(at)}")
    assert Supervised(tmp_path, "mean(143)", SLURM_JOB_ID="71").end()[:2] == (143, 1)


def run_srun(tmp_path: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "gptailor.execution.supervisor", "--restart-after", "0", "--",
         "srun", *words],
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


LIST = """if [ "$1" = --mpi=list ]; then
printf 'MPI plugin types are...\\n\\tpmix\\n\\tnone\\n\\tpmi2\\n' >&2
printf 'specific pmix plugin versions available: pmix_v4,pmix_v5\\n' >&2; exit; fi
"""


def test_an_unknown_mpi_type_is_refused_before_anything_starts(tmp_path: Path) -> None:
    program(tmp_path, "srun", f"{LIST} exit 3")
    code, said = run_srun(tmp_path, "--mpi=openmpi", "gptailor", "search")
    assert code == 2
    assert "srun knows no MPI of type 'openmpi'" in said
    assert "one of pmix, none, pmi2, pmix_v4, pmix_v5" in said
    assert "starts" not in said
    for known in ("--mpi=pmix", "--mpi=pmix_v5", "--kill-on-bad-exit=1"):
        assert run_srun(tmp_path, known, "gptailor", "search")[0] == 3


def test_any_mpi_type_passes_if_srun_lists_none(tmp_path: Path) -> None:
    program(tmp_path, "srun", "[ $1 = --mpi=list ] && exit 1; exit 3")
    assert run_srun(tmp_path, "--mpi=pmix")[0] == 3


def test_sruns_own_errors_are_recognized(tmp_path: Path) -> None:
    program(tmp_path, "srun", "exit $SLURM_EXIT_ERROR")
    code, said = run_srun(tmp_path, "gptailor", "search")
    assert said.count("srun could not start or finish the step") == 4
    assert code == 5


def test_a_missing_program_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gptailor.execution.supervisor", "--", "no-such-srun"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no-such-srun can't be started: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_the_standard_library_is_imported() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "import gptailor.execution.supervisor\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['gptailor']\n"


def test_a_hosts_older_python_can_parse_it() -> None:
    for module in (gptailor, execution, slurm, supervisor, variables, exit_codes):
        source = Path(str(module.__file__)).read_text()
        ast.parse(source, feature_version=(3, 8))
        if "->" in source:
            assert "\nfrom __future__ import annotations\n" in source  # unions are not evaluated


def test_the_mpi_type_is_read_from_the_srun_line() -> None:
    assert mpi_type(["/usr/bin/srun", "--mpi=pmi2", "gptailor"]) == "pmi2"
    assert mpi_type(["srun", "-n", "4", "--mpi", "pmix", "gptailor"]) == "pmix"
    assert mpi_type(["srun", "gptailor", "search", "--mpi=pmi2"]) is None
    assert mpi_type(["mpirun", "--mpi=pmi2"]) is None
    assert mpi_type([]) is None


def test_without_slurm_no_mpi_type_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert known_mpi_types() == []
