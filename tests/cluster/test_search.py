"""A search on two nodes finds what one process finds; test_faults.py kills ranks on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import launch, submit, wait_for_ranks
from tests.cluster.searches import make_search

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.mark.long(minutes=1)
def test_launch_finds_the_same_front(
    cluster: Cluster, tmp_path: Path, front: list[tuple[str, float]]
) -> None:
    search = make_search(tmp_path / "search", seconds=0.1)
    (job,) = launch(cluster, search, "--gpus-per-node=2")
    wait_for_ranks(cluster, job, 5)  # one to search, and one for each GPU
    assert cluster.wait(job) == "COMPLETED"
    search.check()
    assert search.front() == front


def test_mpich_under_pmi2(
    cluster: Cluster, mpich: Path, tmp_path: Path, front: list[tuple[str, float]]
) -> None:
    search = make_search(tmp_path / "search", seconds=0.1)
    chosen = f"MPI_TYPE=pmi2,MPI4PY_LIBMPI={mpich}"
    job = submit(cluster, search, f"--export=ALL,RANKS=3,{chosen}")
    search.wait_for(1)
    for pid in cluster.ranks(job).values():
        assert str(mpich) in Path(f"/proc/{pid}/maps").read_text()
    assert cluster.wait(job, timeout_s=300) == "COMPLETED"
    search.check()
    assert search.front() == front


@pytest.mark.parametrize(
    ("export", "says"),
    [("RANKS=4,MPI_TYPE=smoke", "'smoke'"), ("RANKS=1", "rank")],
    ids=["unknown MPI", "one rank"],
)
def test_a_hopeless_job_ends_at_once(
    cluster: Cluster, tmp_path: Path, export: str, says: str
) -> None:
    search = make_search(tmp_path / "search", seconds=0)
    job = submit(cluster, search, f"--export=ALL,{export}")
    assert cluster.wait(job) == "FAILED"
    assert cluster.sacct(job) == [("FAILED", 2)]
    text = (tmp_path / "search" / "job.log").read_text()
    assert says in text
    assert "Traceback" not in text
    assert "starts again" not in text
