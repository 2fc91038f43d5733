"""The test session's cluster; each test starts without jobs and with all nodes up."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import ROOT, Cluster, running
from tests.cluster.programs import missing_packages, skip_without
from tests.cluster.searches import EVALUATIONS, Search, make_search


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    skip_without(missing_packages())
    with running(Cluster()) as started:
        yield started


@pytest.fixture(scope="session")
def session_strict_cluster() -> Iterator[Cluster]:
    skip_without(missing_packages())
    with running(Cluster(may_requeue=False)) as started:
        yield started


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """Nodes n1 and n2 with two GPUs each, partitions `main` and `high`, which preempts."""
    yield session_cluster
    session_cluster.reset()


@pytest.fixture
def strict_cluster(session_strict_cluster: Cluster) -> Iterator[Cluster]:
    """The same, but it refuses to requeue jobs."""
    yield session_strict_cluster
    session_strict_cluster.reset()


@pytest.fixture(scope="session")
def front(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, float]]:
    """The front that a single process finds, generation by generation, with the same seed.

    Test processes that run side by side share it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with (root / "alone.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "alone" / "run" / "front.json").exists():
            search = make_search(root / "alone", seconds=0)
            command = [sys.executable, "-m", "gptailor.cli", "search", str(search.config)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            subprocess.run(command, env=env, check=True, capture_output=True, timeout=120)
            search.check(search.rows())
    return Search(root / "alone" / "search.yaml", root / "alone" / "run", EVALUATIONS).front()


@pytest.fixture(autouse=True)
def logs(tmp_path: Path) -> Iterator[None]:
    """The jobs' logs, shown when a test fails."""
    yield
    for log in [*tmp_path.rglob("*.log"), *tmp_path.rglob("*.out")]:
        print(
            f"\n== {log.relative_to(tmp_path)}", log.read_text(errors="replace")[-6000:], sep="\n"
        )


@pytest.fixture(scope="session")
def mpich() -> Path:
    """MPICH's library, from its wheel, beside the system's Open MPI."""
    for folder in (Path(sys.prefix) / "mpich" / "lib", Path(sys.prefix) / "lib"):
        if (folder / "libmpi.so.12").exists():
            return folder / "libmpi.so.12"
    skip_without(
        ["mpich"], f"{sys.executable} -m pip install --no-deps --prefix {sys.prefix}/mpich"
    )
    raise AssertionError
