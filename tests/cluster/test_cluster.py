"""The cluster that the other tests rely on behaves like a real one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, running
from tests.cluster.processes import find, program, wait_until
from tests.cluster.programs import missing_packages, skip_without

pytestmark = [pytest.mark.cluster, pytest.mark.long]


def script(folder: Path, *lines: str) -> Path:
    path = folder / "job.sh"
    path.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    return path


def test_the_cluster_has_two_nodes_with_gpus(cluster: Cluster) -> None:
    if not cluster.settings.gpus:
        pytest.skip("only root can make dummy GPUs")
    out = cluster.run(
        *("srun", "-N2", "--ntasks-per-node=2", "--gpus-per-task=1"),
        *("bash", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"),
    )
    assert sorted(out.split("\n")) == ["", "n1 0", "n1 1", "n2 0", "n2 1"]


def test_mpi_ranks_find_each_other_across_the_nodes(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "ranks.py"
    program.write_text(
        "import os\nfrom mpi4py import MPI\n"
        "nodes = MPI.COMM_WORLD.gather(os.environ['SLURMD_NODENAME'])\n"
        "if nodes: print(*nodes)\n"
    )
    out = cluster.run(
        *("srun", "-N2", "--ntasks-per-node=2", "--mpi=pmix", sys.executable, program)
    )
    assert out.split() == ["n1", "n1", "n2", "n2"]


def test_sacct_knows_how_a_job_ended(cluster: Cluster, tmp_path: Path) -> None:
    good = cluster.submit(script(tmp_path, "true"))
    bad = cluster.submit(script(tmp_path, "exit 3"))
    assert cluster.wait(good) == "COMPLETED"
    assert cluster.wait(bad) == "FAILED"
    assert cluster.sacct(bad) == [("FAILED", 3)]


def test_a_job_is_requeued_when_its_node_dies(cluster: Cluster, tmp_path: Path) -> None:
    place = script(tmp_path, f"echo $SLURMD_NODENAME >> {tmp_path}/ran", "sleep 1000")
    job = cluster.submit("--requeue", "-w", "n2", "-o", tmp_path / "log", place)
    wait_until((tmp_path / "ran").exists, 20, "the job runs")
    here = {"SLURM_CONF": cluster.env["SLURM_CONF"], "SLURMD_NODENAME": "n2"}
    assert {"slurmd", "slurmstepd", "sleep"} <= {program(pid) for pid in find(**here)}
    cluster.kill_node("n2")
    assert not find(**here)
    cluster.wait_past(job, "NODE_FAIL")
    cluster.restart_node("n2")
    wait_until(lambda: (tmp_path / "ran").read_text() == "n2\nn2\n", 40, "it runs again")


def test_a_rank_is_found_and_killed(cluster: Cluster, tmp_path: Path) -> None:
    place = script(tmp_path, "srun -N2 -n4 --kill-on-bad-exit=1 sleep 1000")
    job = cluster.submit("-N2", "--ntasks-per-node=2", "-o", tmp_path / "log", place)
    cluster.wait(job, ["RUNNING"])
    wait_until(lambda: set(cluster.ranks(job)) == {0, 1, 2, 3}, 20, "all ranks run")
    cluster.kill_rank(job, 3)
    assert cluster.wait(job) == "FAILED"


def test_a_higher_partition_preempts(cluster: Cluster, tmp_path: Path) -> None:
    low = cluster.submit("-N2", "--exclusive", "--requeue", script(tmp_path, "sleep 1000"))
    cluster.wait(low, ["RUNNING"])
    high = cluster.submit("-N2", "--exclusive", "-p", "high", script(tmp_path, "sleep 3"))
    assert cluster.wait(high) == "COMPLETED"
    cluster.wait(low, ["RUNNING"])
    cluster.wait_past(low, "RUNNING")
    assert [state for state, _ in cluster.sacct(low)] == ["PREEMPTED", "RUNNING"]


def test_a_strict_site_refuses_to_requeue(strict_cluster: Cluster, tmp_path: Path) -> None:
    job = strict_cluster.submit("--requeue", script(tmp_path, "sleep 1000"))
    strict_cluster.wait(job, ["RUNNING"])
    assert "disabled" in strict_cluster.run("scontrol", "requeue", job, check=False)
    assert strict_cluster.squeue(job)[0] == "RUNNING"


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    skip_without(missing_packages())
    with pytest.raises(KeyError), running(Cluster()) as other:
        job = other.submit("-N2", script(tmp_path, "srun -N2 sleep 1000"))
        wait_until(lambda: len(other.processes(job)) >= 4, 20, "the job runs")
        raise KeyError
    assert not find(SLURM_CONF=other.env["SLURM_CONF"])
    assert not other.folder.exists()
    assert "SLURM_CONF" not in os.environ
