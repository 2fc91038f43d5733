"""Which launcher the environment reveals, and whether an MPI library fits it."""

from __future__ import annotations

import pytest

from gptailor.execution.mpi.launcher import LauncherInfo, find_launcher, fits

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
OPEN_MPI, MPICH = "Open MPI v4.1.4, package: Debian", "MPICH Version:      5.0.2\n--enable-fast"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch shell
        (STEP, LauncherInfo("srun", 4, 2)),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, LauncherInfo("srun", 1, 0)),
        ({**STEP, "PMIX_RANK": "2"}, LauncherInfo("srun", 4, 2)),
        ({**STEP, "PMI_SIZE": "4", "PMI_RANK": "2"}, LauncherInfo("srun", 4, 2)),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"}, LauncherInfo("mpirun", 3, 1)),
        # in an allocation, mpirun starts its helpers with srun, one for each node
        (
            {**STEP, "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "9"},
            LauncherInfo("mpirun", 16, 9),
        ),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, LauncherInfo("mpiexec", 3, 0)),
        ({"PMIX_RANK": "1"}, LauncherInfo("the launcher", None, 1)),
    ],
)
def test_find_launcher(env: dict[str, str], expected: LauncherInfo | None) -> None:
    assert find_launcher(env) == expected


@pytest.mark.parametrize(
    ("library", "kind", "components", "expected"),
    [
        (OPEN_MPI, "pmix", [], True),
        (OPEN_MPI, "pmi2", ["mca_pmix_ext3x.so"], False),
        (OPEN_MPI, "pmi2", ["mca_pmix_s2.so"], True),
        (OPEN_MPI, "pmi2", [], True),  # unknown
        (OPEN_MPI, "none", [], False),
        (MPICH, "pmix", [], False),
        (MPICH + " --with-pmix", "pmix", [], True),
        (MPICH, "pmi2", [], True),
        ("Intel(R) MPI Library 2021", "pmi2", [], True),
    ],
)
def test_kinds_of_mpi(library: str, kind: str, components: list[str], expected: bool) -> None:
    given = {"pmix": {"PMIX_RANK": "2"}, "pmi2": {"PMI_RANK": "2"}, "none": {}}[kind]
    assert fits(library, {**STEP, **given}, components) is expected
    assert fits(library, {**given, "OMPI_COMM_WORLD_SIZE": "4"}, components)
