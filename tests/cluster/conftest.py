"""The cluster of the test session; each test finds it without jobs and with all nodes up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, running
from tests.cluster.programs import missing_packages, skip_without


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
    """The same at a site that refuses to requeue jobs."""
    yield session_strict_cluster
    session_strict_cluster.reset()
