"""Faults that a long search on a cluster meets: no finished evaluation is repeated."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from gptailor.run.folder import read_run
from tests.cluster.cluster import Cluster
from tests.cluster.jobs import check_status, launch, submit
from tests.cluster.processes import wait_until
from tests.cluster.searches import make_search

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.long,  # Slurm rarely checks its timers, and each start loads the models again
]

Front = list[tuple[str, float]]


@pytest.mark.long(minutes=2.5)
def test_a_node_dies(cluster: Cluster, tmp_path: Path, front: Front) -> None:
    search = make_search(tmp_path / "search", seconds=0.5)
    job = submit(cluster, search)
    seen = search.wait_for(8)
    cluster.kill_node("n2")
    cluster.wait_past(job, "NODE_FAIL")
    later = search.rows()
    cluster.restart_node("n2")
    assert cluster.wait(job, timeout_s=300) == "COMPLETED"
    search.check(seen, later)
    assert search.front() == front
    check_status(cluster, search, job)


@pytest.mark.long(minutes=1.5)
def test_the_node_of_rank_0_dies(cluster: Cluster, tmp_path: Path, front: Front) -> None:
    search = make_search(tmp_path / "search", seconds=0.5)
    job = submit(cluster, search)
    seen = search.wait_for(8)
    cluster.kill_node("n1")
    cluster.run("scontrol", "update", "nodename=n1", "state=down", "reason=no answer")  # at once
    cluster.wait_past(job, "NODE_FAIL")
    later = search.rows()
    cluster.restart_node("n1")
    assert cluster.wait(job, timeout_s=300) == "COMPLETED"
    search.check(seen, later)
    assert search.front() == front
    check_status(cluster, search, job)


@pytest.mark.long(minutes=4)
def test_the_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    # 30 s before the end: Slurm checks every 30 s, so it signals 60 to 90 s after the start
    search = make_search(tmp_path / "search", seconds=4, evaluations=66)
    job = submit(cluster, search, "--time=2", "--signal=USR2@30")
    seen = search.wait_for(3)
    cluster.wait(job, ["PENDING"], timeout_s=300)
    later = search.rows()
    assert cluster.wait(job, timeout_s=400) == "COMPLETED"
    search.check(seen, later)
    assert search.logged(search.run).total() == len(search.rows())  # no evaluation was lost midway
    states = [state for state, _ in cluster.sacct(job)]
    assert set(states[:-1]) <= {"REQUEUED"}, states  # Slurm never ended it
    assert len(states) > 1
    check_status(cluster, search, job)


@pytest.mark.long(minutes=1)
def test_preemption(cluster: Cluster, tmp_path: Path, front: Front) -> None:
    search = make_search(tmp_path / "search", seconds=0.5)
    job = submit(cluster, search)
    seen = search.wait_for(8)
    high = cluster.submit("-N2", "--exclusive", "-p", "high", "--wrap", "sleep 3")
    assert cluster.wait(high) == "COMPLETED"
    later = search.rows()
    assert cluster.wait(job, timeout_s=300) == "COMPLETED"
    search.check(seen, later)
    assert search.front() == front
    check_status(cluster, search, job)
    assert [state for state, _ in cluster.sacct(job)] == ["PREEMPTED", "COMPLETED"]


@pytest.mark.long(minutes=1)
def test_scancel_and_resume(cluster: Cluster, tmp_path: Path, front: Front) -> None:
    search = make_search(tmp_path / "search", seconds=0.5)
    job = submit(cluster, search)
    seen = search.wait_for(8)
    cluster.cancel(job)
    assert cluster.wait(job) == "CANCELLED"
    assert not cluster.processes(job)
    check_status(cluster, search, job)
    later = search.rows()
    assert len(later) < search.evaluations
    again = submit(cluster, search)
    assert cluster.wait(again, timeout_s=300) == "COMPLETED"
    search.check(seen, later)
    assert search.front() == front
    check_status(cluster, search, job)


@pytest.mark.long(minutes=3)
@pytest.mark.parametrize("islands", [0, 2], ids=["one search", "two islands"])
def test_five_kills_each_after_a_new_result(
    cluster: Cluster, tmp_path: Path, front: Front, islands: int
) -> None:
    """That is more than the three restarts in a row that a job gets if it makes no progress.

    The last kill hits the rank that searches, unless there are islands.
    """
    if islands:
        search = make_search(
            tmp_path / "search", seconds=1, evaluations=120, schedule="asynchronous"
        )
        job, *others = launch(
            cluster, search, f"--islands={islands}", "--nodes=1", "--workers-per-node=1"
        )
    else:
        search = make_search(tmp_path / "search", seconds=2)
        job, others = submit(cluster, search), []

    def mine() -> int:
        return sum(folder == ("0" if islands else "run") for folder, *_ in search.rows())

    seen = []
    for kill in range(5):
        before = mine()
        wait_until(lambda: mine() > before, 200, "a new result")  # noqa: B023
        seen.append(search.rows())
        ranks = set(cluster.ranks(job).values())
        cluster.kill_rank(job, 0 if kill == 4 and not islands else search.busy(job))
        wait_until(lambda: not ranks & set(cluster.ranks(job).values()), 60, "the step ends")  # noqa: B023
    for one in (job, *others):
        assert cluster.wait(one, timeout_s=400) == "COMPLETED"
        assert cluster.sacct(one) == [("COMPLETED", 0)]
    search.check(*seen)
    said = "".join(path.read_text() for path in (tmp_path / "search").rglob("job*.log"))
    assert (
        len(re.findall(r"ended by SIG\w+ after \d+ s and [1-9]\d* new results; starts", said)) == 5
    )
    if not islands:
        assert search.front() == front
    check_status(cluster, search, job)


@pytest.mark.long(minutes=1.5)
def test_a_site_that_does_not_requeue(strict_cluster: Cluster, tmp_path: Path) -> None:
    search = make_search(tmp_path / "search", seconds=0.5, evaluations=48)
    job = submit(strict_cluster, search)
    seen = search.wait_for(8)
    strict_cluster.signal_ranks(job, signal.SIGUSR2)
    assert strict_cluster.wait(job) == "FAILED"
    assert strict_cluster.sacct(job) == [("FAILED", 75)]
    assert "submit the same command again" in (tmp_path / "search" / "job.log").read_text()
    check_status(strict_cluster, search, job)
    later = search.rows()
    again = submit(strict_cluster, search)
    assert strict_cluster.wait(again, timeout_s=300) == "COMPLETED"
    search.check(seen, later)


@pytest.mark.long(minutes=2)
def test_one_of_three_islands_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    search = make_search(tmp_path / "search", seconds=1, evaluations=90, schedule="asynchronous")
    jobs = launch(cluster, search, "--islands=3", "--nodes=1", "--workers-per-node=1")
    assert len(jobs) == 3
    wait_until(lambda: len(search.archives()) == 3, 120, "three islands")
    seen = search.wait_for(12)
    cluster.kill_rank(jobs[1], 1)  # comes back
    cluster.cancel(jobs[2])  # does not
    assert cluster.wait(jobs[2]) == "CANCELLED"
    later = search.rows()
    assert cluster.wait(jobs[0], timeout_s=300) == "COMPLETED"
    assert cluster.wait(jobs[1], timeout_s=60) == "COMPLETED"
    search.check(seen, later)
    data = read_run(search.run)
    assert len(data.paid) - len(data.evaluations) <= 6  # evaluated by two at the same time
    assert {folder.name for folder in search.archives()} == {"0", "1", "2"}
    for job in jobs:
        check_status(cluster, search, job)


def test_a_crash_in_one_rank_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    search = make_search(tmp_path / "search", seconds=0, crashes=True)
    job = submit(cluster, search)
    assert cluster.wait(job) == "FAILED"
    assert cluster.sacct(job) == [("FAILED", 1)]
    text = (tmp_path / "search" / "job.log").read_text()
    assert text.count("Traceback") == 1
    assert "struck by lightning" in text
    assert "starts again" not in text
    check_status(cluster, search, job)
