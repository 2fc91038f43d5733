"""The candidates as the workers of one node open them: read from their disk once, then shared.

Every worker calls `open_candidates`. One of them reads all files into the page cache in large
pieces (or copies them to the node's own disk) while the others wait; then all map them, and the
kernel holds each byte once for all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from gptailor.config import Config
from gptailor.errors import ModelError, ResourceError, UsageError, size
from gptailor.evaluation.family import open_family
from gptailor.evaluation.forward_dtype import is_cpu
from gptailor.evaluation.memory import available_bytes
from gptailor.execution.node.lock import node_lock, own_folder
from gptailor.execution.node.page_cache import Range, absent, read_all, whole
from gptailor.execution.node.staging import scratch_folder, staged
from gptailor.models.checkpoint import checked_io
from gptailor.models.family import Family
from gptailor.patience import Say

STAGE_VARIABLE = "GPTAILOR_STAGE"
"""A folder of the node's own disk, to which candidates are copied before they are opened."""

_USABLE = 0.8
"""Part of the available memory that candidates may take; more of them push each other out."""
_TRUST_S = 600.0
"""So long a file that was read is thought to be in memory, where the kernel does not tell."""


def open_candidates(
    config: Config,
    *,
    workers_here: int = 1,
    io: str | None = None,
    stage: str | None = None,
    keep_going: Callable[[], None] = lambda: None,
    note: Say = lambda text: print(text, file=sys.stderr),
    says: Say = lambda text: None,
) -> Family:
    """The family of a search, for a worker that will evaluate with it.

    On the CPU its files are mapped whatever the file system, unless `io` asks for something else:
    the copies that other ways of reading make would be private to each worker. A GPU's loader keeps
    its own way, and finds the files in the page cache if the node has several workers.

    Args:
        config: the search.
        workers_here: how many processes of this node call this.
        io: how weights are read, see `Checkpoint`; None for what GPTAILOR_IO says, or auto.
        stage: a folder of the node's own disk, to which they are copied first; its variables are
            filled in here. None for what GPTAILOR_STAGE says, empty for none.
        keep_going: called while it waits or reads; what it raises ends that.
        note: is told what a person should know.
        says: is told what is done, and how far it is.

    Returns:
        The family; names and references are the configuration's, also where the files are copies.

    Raises:
        ModelError: a candidate is unusable, or can't be read.
        ResourceError: there is no room for the copies.
        UsageError: there is no such scratch folder, or no such `io`.
    """
    says(f"opening {len(config.models)} candidates")
    on_cpu = is_cpu(config.evaluation.device)
    io = checked_io(io)
    if on_cpu and io == "auto":
        io = "mmap"
    family = open_family(config.models, config.base, io)
    scratch = os.environ.get(STAGE_VARIABLE) if stage is None else stage
    if scratch:
        began = time.monotonic()
        candidates = list(family.candidates.values())
        folders = staged(candidates, scratch_folder(scratch), keep_going, says)
        family = open_family(config.models, config.base, io, folders=folders)
        if time.monotonic() - began > 1.0:
            note(f"Candidates are in {scratch} of {socket.gethostname()}: {_seconds(began)}.")
    if (on_cpu or workers_here > 1) and io != "direct":
        share(_paths(family, config), keep_going=keep_going, note=note, says=says)
    return family


def share(
    paths: Iterable[Path],
    *,
    keep_going: Callable[[], None] = lambda: None,
    note: Say = lambda text: None,
    says: Say = lambda text: None,
) -> int:
    """Makes sure that files are in the page cache; one process of the node reads, others wait.

    Files that do not fit into memory together are left alone: they would push each other out.

    Returns:
        How many bytes this process read.

    Raises:
        ModelError: a file can't be read.
    """
    came = _clock()
    files = list({(s.st_dev, s.st_ino): p for p in paths for s in [p.stat()]}.values())
    n_bytes, room = sum(path.stat().st_size for path in files), available_bytes()
    if n_bytes > _USABLE * room:
        note(
            f"The candidates have {size(n_bytes)}, of which {socket.gethostname()} can't "
            f"hold all in {size(room)} of memory: they are read when they are needed."
        )
        return 0
    says("looking which files are in memory")
    try:
        if not _absent(files, unless_since=None):
            return 0  # without waiting for anybody
        with contextlib.ExitStack() as stack:
            fd = None
            with contextlib.suppress(ResourceError, UsageError):  # without it it is only slower
                says("waiting for another process that reads the candidates")
                fd = stack.enter_context(node_lock(_lock_file(files), keep_going))
            finished = _read_time(fd)
            if finished >= came:
                return 0  # the others were waiting for this
            began = time.monotonic()
            done = read_all(_absent(files, unless_since=finished), keep_going, says)
            _write_time(fd)
    except OSError as error:
        raise ModelError(f"{error.filename} can't be read: {error.strerror}.") from error
    if time.monotonic() - began > 1.0:
        note(f"Read {size(done)} of candidates: {_seconds(began)}.")
    return done


def _paths(family: Family, config: Config) -> list[Path]:
    """Every large file that an evaluation may need."""
    candidates = family.candidates.values()
    paths = [path for candidate in candidates for path in candidate.checkpoint.files]
    if config.calibration is not None:
        for method in config.space.merge.calibrated:
            paths += [c.statistics(config.calibration, method).path for c in candidates]
    return paths


def _absent(files: Iterable[Path], unless_since: float | None) -> list[tuple[Path, Range]]:
    """What has to be read.

    Args:
        files: to look at.
        unless_since: when they were read last; None: never.
    """
    missing: list[tuple[Path, Range]] = []
    for path in files:
        ranges = absent(path)
        if ranges is not None:
            missing += [(path, part) for part in ranges]
        elif unless_since is None or _clock() - unless_since > _TRUST_S:
            missing += whole([path])
    return missing


def _lock_file(files: Iterable[Path]) -> Path:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()  # its times count from there
    text = repr((boot, sorted(str(path.resolve()) for path in files)))
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return own_folder(Path(tempfile.gettempdir())) / f"{name}.read"


def _read_time(fd: int | None) -> float:
    try:
        return float("-inf" if fd is None else os.pread(fd, 64, 0))
    except ValueError:
        return float("-inf")


def _write_time(fd: int | None) -> None:
    if fd is not None:
        os.ftruncate(fd, 0)
        os.pwrite(fd, repr(_clock()).encode(), 0)


def _clock() -> float:
    """Seconds since the machine started, the same for all its processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _seconds(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"
