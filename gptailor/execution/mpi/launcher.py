"""Detects whether a launcher started this process as one of several, and opens MPI if so.

A launcher leaves variables in the environment. A batch script and the shell of an allocation also
have some of Slurm's, but no step of more than one task.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from gptailor.errors import UsageError, plain

if TYPE_CHECKING:
    from gptailor.execution.mpi.channel import Channel

Choice = Literal["auto", "local", "mpi"]

_QUIET_S = 2.0


@dataclass(frozen=True)
class LauncherInfo:
    """What a launcher tells a process that it started.

    Attributes:
        name: of the launcher.
        num_tasks: how many processes it started; None if unknown.
        rank: the number of this process.
    """

    name: str
    num_tasks: int | None
    rank: int


def find_launcher(env: Mapping[str, str]) -> LauncherInfo | None:
    """The launcher according to the environment; None for a process that was started alone."""
    tasks = _number(env, "SLURM_STEP_NUM_TASKS")
    # check mpirun before srun: inside an allocation it starts its own helpers with srun
    for name, size, rank in (
        ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("mpiexec", "PMI_SIZE", "PMI_RANK"),
    ):
        num_tasks = _number(env, size)
        if num_tasks is not None:
            is_srun = num_tasks == tasks and size == "PMI_SIZE"
            return LauncherInfo("srun" if is_srun else name, num_tasks, _number(env, rank) or 0)
    if tasks is not None:
        return LauncherInfo("srun", tasks, _number(env, "SLURM_PROCID") or 0)
    rank_number = _number(env, "PMIX_RANK")
    return None if rank_number is None else LauncherInfo("the launcher", None, rank_number)


def is_first() -> bool:
    """Whether this process is the one that speaks for all of them."""
    launcher = find_launcher(os.environ)
    return launcher is None or launcher.rank == 0


def leave_quietly(code: int) -> NoReturn:
    """Ends a process that is not the first after a short delay: launchers end all processes when
    one fails, and the first needs time for its message."""
    time.sleep(_QUIET_S)
    raise SystemExit(code)


def join(choice: Choice) -> Channel | None:
    """The channel to the other ranks if this process is one of several; None for a local search.

    Args:
        choice: "local": never MPI; "mpi": always; "auto": if a launcher started several processes.

    Raises:
        UsageError: MPI is missing, does not fit the launcher, or has only one rank. Only the first
            process raises it; the others exit with its exit code (SystemExit).
    """
    launcher = find_launcher(os.environ)
    if choice == "local" or (choice == "auto" and (launcher is None or launcher.num_tasks == 1)):
        return None
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # first check that the library fits
        mpi4py.rc.finalize = False  # it waits for ranks that may be busy: see Channel.leave
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        _refuse(
            launcher,
            f"MPI can't be used here ({plain(str(error).strip(), 200)}): install it with "
            "`pip install 'gptailor[mpi]'`, or load your cluster's MPI and `pip install mpi4py`.",
        )
    text = MPI.Get_library_version().strip()
    library = plain(text.splitlines()[0], 80)
    if not fits(text, os.environ, _components()):
        _refuse_type(launcher, library)
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_FUNNELED)
    size = MPI.COMM_WORLD.Get_size()
    if size > 1:
        from gptailor.execution.mpi.channel import Channel

        return Channel(MPI)
    if launcher is not None and (launcher.num_tasks or 1) > 1:
        _refuse_type(launcher, library)
    if choice == "auto":
        return None
    raise UsageError(
        "An MPI search needs at least two ranks, one that searches and one that evaluates: start "
        "it with `mpirun -n 2` or `srun -n 2`, or leave --executor mpi out."
    )


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    return int(text) if text.isdecimal() else None


def fits(library: str, env: Mapping[str, str], components: Sequence[str] = ()) -> bool:
    """Whether an MPI library can talk to srun; one that can't would abort or see a single rank.

    Args:
        library: its version string.
        env: has variables of the MPI type that srun was asked for.
        components: the file names of those of Open MPI's components that are files.
    """
    if "SLURM_STEP_NUM_TASKS" not in env or "OMPI_COMM_WORLD_SIZE" in env:
        return True  # only srun needs a matching MPI type; other launchers bring their own
    has_pmix, has_pmi = "PMIX_RANK" in env, "PMI_RANK" in env or "PMI_FD" in env
    if not has_pmix and not has_pmi:
        return False
    if "MPICH" in library:
        return has_pmi or "pmix" in library.lower()
    if library.startswith("Open MPI") and not has_pmix:
        is_split = any(name.startswith("mca_pmix") for name in components)
        return not is_split or any(name.startswith("mca_pmix_s") for name in components)
    return True


def _components() -> list[str]:
    """The names of Open MPI's component files next to its library."""
    maps = Path("/proc/self/maps").read_text().split()
    libraries = {Path(word) for word in maps if Path(word).name.startswith("libmpi.so")}
    folders = {path.resolve().parent for path in libraries}
    return [path.name for folder in folders for path in folder.glob("openmpi*/**/mca_*.so")]


def _refuse(launcher: LauncherInfo | None, message: str) -> NoReturn:
    """Raises the error in the first process only; the others leave quietly."""
    if launcher is not None and launcher.rank != 0:
        leave_quietly(UsageError.exit_code)
    raise UsageError(message)


def _refuse_type(launcher: LauncherInfo | None, library: str) -> NoReturn:
    tasks = None if launcher is None else launcher.num_tasks
    name = "the launcher" if launcher is None else launcher.name
    _refuse(
        launcher,
        f"{name} started {tasks or 'several'} tasks, but the MPI library ({library}) sees one "
        "each: `srun --mpi=list` shows the types of this site, pmix fits most builds of Open MPI "
        "and pmi2 those of MPICH; name it with --mpi=TYPE or MPI_TYPE.",
    )
