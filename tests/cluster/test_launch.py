"""`gptailor launch`, `status` and `cancel` with a real Slurm and a small program for the search."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gptailor import cli
from gptailor.demo import PATH as DEMO
from tests.cluster.cluster import Cluster
from tests.cluster.processes import wait_until

pytestmark = pytest.mark.cluster

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from gptailor.run.job_record import JobRecord, JobRecorder, job_id_here

came = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda n, _: came.append(n))
run, seconds, code = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
rank = int(os.environ["SLURM_PROCID"])
names = ("SLURM_RESTART_COUNT", "SLURMD_NODENAME", "SLURM_LOCALID", "SLURM_CPUS_PER_TASK")
words = [os.environ.get(name, "0") for name in names]
with (run / f"{job_id_here()}.ranks").open("a") as file:
    file.write(" ".join([str(rank), *words, os.environ.get("CUDA_VISIBLE_DEVICES", "")]) + chr(10))
if rank == 0:
    island = sys.argv[sys.argv.index("--island") + 1] if "--island" in sys.argv else None
    first = JobRecord(job_id_here(), "running", island and int(island.split("/")[0]))
    recorder = JobRecorder(run, first)
until = time.monotonic() + seconds
while time.monotonic() < until and not came:
    time.sleep(0.05)
if came:
    code = 143 if signal.SIGTERM in came else 75
if rank == 0:
    recorder.end(code)
    Path(os.environ["GPTAILOR_VERDICT"]).write_text(str(code))
sys.exit(code)
"""


@dataclass
class Launcher:
    """`gptailor` on the login node of a cluster, for one run folder."""

    cluster: Cluster
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def gptailor(self, *words: str | Path, **environ: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "gptailor.cli", *map(str, words)],
            cwd=self.folder, env={**self.cluster.env, **environ}, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout

    def launch_words(self, *words: str) -> list[str]:
        """The command line; on both nodes unless `words` sets their number."""
        nodes = [] if "--nodes" in words else ["--nodes", "2"]
        search = ("launch", str(DEMO / "search.yaml"), f"output={self.run}")
        shape = ("--cpus-per-worker", "2", "--gpus-per-node", "2", "--time", "20", "--mpi", "none")
        return [*search, *shape, *nodes, *words]

    def launch(self, *words: str, seconds: float = 300, code: int = 0) -> tuple[int, str]:
        """Launches the small program instead of a search."""
        self.run.mkdir(exist_ok=True)
        program = self.folder / "program.py"
        program.write_text(PROGRAM)
        gptailor = f"{sys.executable} {program} {self.run} {seconds} {code}"
        return self.gptailor(*self.launch_words(*words), GPTAILOR=gptailor)

    def submitted(self, *words: str, seconds: float = 300, code: int = 0) -> list[str]:
        done, said = self.launch(*words, "--json", seconds=seconds, code=code)
        assert done == 0, said
        jobs: list[str] = json.loads(said.splitlines()[-1])["jobs"]
        return jobs

    def status(self) -> dict[str, Any]:
        """The status of each job, by id."""
        code, said = self.gptailor("status", self.run, "--json")
        assert code == 0, said
        return {job["record"]["job_id"]: job for job in json.loads(said)["jobs"]}

    def wait_for_ranks(self, job: str, count: int) -> list[list[str]]:
        """(rank, restart, node, local rank, cores, GPUs) of each rank that has started."""
        place = self.run / f"{job}.ranks"
        wait_until(
            lambda: place.exists() and len(place.read_text().splitlines()) >= count,
            60,
            f"{count} ranks of {job}",
        )
        return sorted(
            (line.split() for line in place.read_text().splitlines()), key=lambda r: int(r[0])
        )


@pytest.fixture
def launcher(cluster: Cluster, tmp_path: Path) -> Iterator[Launcher]:
    yield Launcher(cluster, tmp_path)


def test_ranks_gpus_and_cores_are_placed_as_asked(launcher: Launcher) -> None:
    """One rank for each GPU of a node, and one more on the first node."""
    (job,) = launcher.submitted(seconds=0)
    ranks = launcher.wait_for_ranks(job, 5)
    places = [(int(rank), node, local) for rank, _, node, local, *_ in ranks]
    assert places == [
        (0, "n1", "0"), (1, "n2", "0"), (2, "n1", "1"), (3, "n2", "1"), (4, "n1", "2"),
    ]  # fmt: skip
    assert {(cores, gpus) for *_, cores, gpus in ranks} == {("2", "0,1")}
    assert launcher.cluster.wait(job) == "COMPLETED"
    log = (launcher.run / "logs" / f"job-{job}.log").read_text()
    assert "can't honor" not in log
    assert "ended after" in log


def test_the_dry_run_shows_the_submitted_script(launcher: Launcher) -> None:
    code, text = launcher.launch("--dry-run", "--slurm", "comment=it's a test", seconds=0)
    assert code == 0
    (job,) = launcher.submitted("--slurm", "comment=it's a test", seconds=0)
    written = launcher.run / "jobs" / "submitit" / f"{job}_submission.sh"
    assert written.read_text() == text
    assert "it's a test" in launcher.cluster.run("scontrol", "show", "job", job)


@pytest.mark.long  # runs a separate job
def test_the_status_of_a_job_is_right_from_submission_to_end(launcher: Launcher) -> None:
    (job,) = launcher.submitted("--slurm", "hold")
    told = launcher.status()[job]
    assert (told["state"], told["is_live"], told["runs"]) == ("PENDING", True, False)
    assert told["note"] == "JobHeldUser"
    assert told["record"]["state"] == "submitted"

    launcher.cluster.run("scontrol", "release", job)
    launcher.wait_for_ranks(job, 5)
    wait_until(lambda: launcher.status()[job]["note"] == "", 20, "the record says running", 0.5)
    told = launcher.status()[job]
    assert (told["state"], told["runs"]) == ("RUNNING", True)
    assert 1000 < told["time_left_s"] <= 1200

    code, said = launcher.launch()
    assert code == 2
    assert f"is in progress in job {job}" in said

    code, said = launcher.gptailor("cancel", launcher.run)
    assert (code, said) == (0, f"Ended: {job}. `gptailor search … --resume` continues.\n")
    assert launcher.cluster.squeue(job)[0] in ("", "CANCELLED")
    wait_until(lambda: not launcher.status()[job]["is_live"], 20, "sacct knows", 0.5)
    told = launcher.status()[job]
    assert (told["state"], told["exit_code"]) == ("CANCELLED", None)
    assert told["record"]["exit_code"] == 143
    assert launcher.gptailor("cancel", launcher.run)[0] == 0


@pytest.mark.long  # runs a separate job
def test_a_job_ends_with_the_exit_code_of_its_search(launcher: Launcher) -> None:
    (job,) = launcher.submitted("--nodes", "1", seconds=0, code=3)
    launcher.cluster.wait(job)
    told = launcher.status()[job]
    assert (told["state"], told["exit_code"], told["is_live"]) == ("FAILED", 3, False)


@pytest.mark.long  # runs a separate job
def test_a_job_that_ended_before_its_search_began(launcher: Launcher) -> None:
    (job,) = launcher.submitted("--nodes", "1", "--setup", "exit 9")
    launcher.cluster.wait(job)
    told = launcher.status()[job]
    assert (told["state"], told["exit_code"]) == ("FAILED", 9)
    assert told["note"] == f"it ended before the search began: see logs/job-{job}.log"


@pytest.mark.long  # two searches
def test_islands_join_a_run(launcher: Launcher) -> None:
    """An array; a second launch submits the islands that have no job."""
    first, second = launcher.submitted("--islands", "2", "--nodes", "1")
    assert (first.partition("_")[2], second.partition("_")[2]) == ("0", "1")
    for job in (first, second):
        launcher.wait_for_ranks(job, 3)
    assert {j["record"]["island"] for j in launcher.status().values()} == {0, 1}
    code, said = launcher.launch("--islands", "2", "--nodes", "1")
    assert code == 2
    assert "more --islands join it" in said
    (third,) = launcher.submitted("--islands", "3", "--nodes", "1", "--slurm", "hold")
    assert launcher.status()[third]["record"]["island"] == 2
    assert set(launcher.status()) == {first, second, third}
    code, said = launcher.gptailor("cancel", launcher.run, "--json")
    assert code == 0
    assert set(json.loads(said)["ended"]) == {first, second, third}


@pytest.mark.long  # Slurm's clocks
def test_requeueing_an_island_leaves_the_others_alone(launcher: Launcher) -> None:
    """The last element has the array's own number, and requeueing that would requeue them all."""
    jobs = launcher.submitted("--islands", "2", "--nodes", "1")
    for job in jobs:
        launcher.wait_for_ranks(job, 3)
    for count, job in enumerate(jobs):
        launcher.cluster.run("scancel", "--signal=USR2", job)
        launcher.wait_for_ranks(job, 6)
        restarts = {
            other: {words[1] for words in launcher.wait_for_ranks(other, 3)} for other in jobs
        }
        expected = [{"0", "1"} if index <= count else {"0"} for index in range(2)]
        assert list(restarts.values()) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", "man"], "unknown partition 'man': did you mean 'main'?"),
        (["--mpi", "pmi3"], "unknown type of MPI 'pmi3' in --mpi or MPI_TYPE: did you mean"),
        (["--time", "30-0"], "less than the requested 43200 minutes"),
        (["--nodes", "5"], "The partition main has 2 nodes, but 5 are requested"),
        (["--cpus-per-worker", "9"], "cores, but 27 are requested, including those of the"),
        (["--gpus-per-node", "3"], "refuses the job: Requested node configuration"),
        (["--slurm", "no-such-option=3"], "refuses the job: unrecognized option '--no-such"),
        (["search.population=x"], "search.population"),
        pytest.param(
            ["evaluation.tasks=[no_such_task]"],
            "unknown task 'no_such_task'",
            marks=pytest.mark.long,  # reads the names of all tasks of lm-eval
        ),
        (["models.base=/nowhere"], "/nowhere"),
        (["output=/proc/run"], "/proc/run can't be written"),
    ],
)
def test_mistakes_are_reported_on_the_login_node(
    launcher: Launcher,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, which loads the libraries only once for all cases."""
    for name, value in launcher.cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(launcher.folder)
    code = cli.main(launcher.launch_words(*words))
    assert code in (2, 3, 4)
    said = capsys.readouterr().err
    assert message in said
    lines = [line for line in said.splitlines() if not line.startswith("Checking the search (")]
    assert len(lines) == 1, said
    assert not launcher.cluster.jobs()


@pytest.mark.long  # Slurm's clocks
def test_preemption_with_time_to_end(launcher: Launcher) -> None:
    """If a job ends within its grace time, Slurm thinks it finished; the supervisor does not."""
    cluster = launcher.cluster
    cluster.run("scontrol", "update", "partitionname=main", "gracetime=20")
    try:
        (job,) = launcher.submitted("--slurm", "exclusive")
        launcher.wait_for_ranks(job, 5)
        sleeps = ["--exclusive", "-N2", "-p", "high", "--wrap=sleep 2", "-o", "/dev/null"]
        other = cluster.submit(*sleeps)
        assert cluster.wait(other) == "COMPLETED"
        ranks = launcher.wait_for_ranks(job, 10)
        assert {restart for _, restart, *_ in ranks} == {"0", "1"}
        told = launcher.status()[job]
        assert (told["state"], told["past"]) == ("RUNNING", ["REQUEUED"])
    finally:
        cluster.run("scontrol", "update", "partitionname=main", "gracetime=0")


@pytest.mark.long  # this file takes long enough without it
def test_a_launch_within_a_job_is_independent_of_it(launcher: Launcher) -> None:
    inside = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "7", "SLURM_MEM_PER_NODE": "1"}
    old = dict(launcher.cluster.env)
    launcher.cluster.env.update(inside)
    try:
        (job,) = launcher.submitted(seconds=0)
    finally:
        launcher.cluster.env.clear()
        launcher.cluster.env.update(old)
    assert len(launcher.wait_for_ranks(job, 5)) == 5
    assert launcher.cluster.wait(job) == "COMPLETED"


@pytest.mark.long  # a second cluster
def test_a_site_without_requeue(strict_cluster: Cluster, tmp_path: Path) -> None:
    launcher = Launcher(strict_cluster, tmp_path)
    (job,) = launcher.submitted("--nodes", "1", seconds=0, code=75)
    assert strict_cluster.wait(job) == "FAILED"
    told = launcher.status()[job]
    assert (told["state"], told["exit_code"]) == ("FAILED", 75)
    log = (launcher.run / "logs" / f"job-{job}.log").read_text()
    assert "Slurm does not requeue the job" in log
