"""The two ways to start a search on the cluster, and checks of its status."""

from __future__ import annotations

import json

from tests.cluster.cluster import ROOT, Cluster
from tests.cluster.processes import wait_until
from tests.cluster.searches import Search


def submit(cluster: Cluster, search: Search, *options: str, ranks: int = 3) -> str:
    """`sbatch slurm/search.sh` on two nodes; returns the job's id."""
    gpus = [f"--gpus-per-node={cluster.settings.gpus}"]
    return cluster.submit(
        *("--nodes=2", "--ntasks-per-node=3", "--cpus-per-task=1", *gpus),
        *("--time=10", f"--export=ALL,RANKS={ranks}", *options),
        *("-o", search.config.parent / "job.log", ROOT / "slurm" / "search.sh", search.config),
    )


def launch(cluster: Cluster, search: Search, *options: str) -> list[str]:
    """`gptailor launch` on two nodes; returns the ids of its jobs."""
    text = cluster.run(
        *("gptailor", "launch", search.config, "--nodes=2", "--time=10", "--json"),
        *("--cpus-per-worker=1", *options),
    )
    jobs: list[str] = json.loads(text.splitlines()[-1])["jobs"]
    return jobs


def check_status(cluster: Cluster, search: Search, job: str) -> None:
    """Asserts that `gptailor status` agrees with Slurm's accounting on each turn of a job."""
    data = json.loads(cluster.run("gptailor", "status", search.run, "--json"))
    (told,) = [entry for entry in data["jobs"] if entry["record"]["job_id"] == job]
    turns = cluster.sacct(job)
    assert [*told["past"], told["state"]] == [state for state, _ in turns]
    if not cluster.squeue(job)[0]:
        assert (told["exit_code"] or 0) == turns[-1][1]
        assert not told["is_live"]
    assert data["evaluated"]["done"] == len(search.rows())


def wait_for_ranks(cluster: Cluster, job: str, count: int = 4) -> None:
    """Waits until all ranks of a job are running."""
    wait_until(lambda: len(cluster.ranks(job)) == count, 60, f"{count} ranks of job {job}")
