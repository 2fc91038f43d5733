"""Opens the candidates for the workers of one node: files are read once, then shared.

Every worker calls `open_candidates`. One of them reads all files into the page cache in large
pieces (or copies them to the node's own disk) while the others wait; then all of them map the
files, and the kernel keeps each byte in memory only once.
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
from gptailor.evaluation.device_memory import available_bytes
from gptailor.evaluation.family import open_family
from gptailor.evaluation.forward_dtype import is_cpu
from gptailor.execution.node.lock import node_lock, own_folder
from gptailor.execution.node.page_cache import Range, absent, read_all, whole
from gptailor.execution.node.staging import scratch_folder, staged
from gptailor.models.checkpoint import checked_io
from gptailor.models.family import Family
from gptailor.patience import Say

STAGE_VARIABLE = "GPTAILOR_STAGE"
"""A folder on the node's own disk, to which candidates are copied before they are opened."""

_USABLE = 0.8
"""Fraction of the available memory that candidates may take; more would evict each other."""
_TRUST_S = 600.0
"""How long a file is assumed to stay in memory after it was read, if the kernel does not tell."""


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
    """Opens the family of a search for a worker that will evaluate with it.

    On the CPU its files are mapped on any file system, unless `io` says otherwise: other ways of
    reading would give each worker a private copy. A GPU's loader reads in its own way, and finds
    the files in the page cache if the node has several workers.

    Args:
        config: the search.
        workers_here: how many processes of this node call this.
        io: how weights are read, see `Checkpoint`; None for the value of GPTAILOR_IO, or auto.
        stage: a folder on the node's own disk, to which candidates are copied first; variables in
            it are expanded here. None for the value of GPTAILOR_STAGE, empty for no copies.
        keep_going: called while waiting or reading; an error that it raises ends that.
        note: called with notes for the user.
        says: called with the current step and its progress.

    Returns:
        The family; names and references are the configuration's, even if the files are copies.

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
            note(f"Candidates are in {scratch} on {socket.gethostname()}: {_seconds(began)}.")
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

    Files that do not fit into memory together are not read: they would evict each other.

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
            f"The candidates have {size(n_bytes)}, too much for the {size(room)} of free memory on "
            f"{socket.gethostname()}: they are read when they are needed."
        )
        return 0
    says("checking which files are in memory")
    try:
        if not _absent(files, unless_since=None):
            return 0  # without waiting for other processes
        with contextlib.ExitStack() as stack:
            fd = None
            with contextlib.suppress(ResourceError, UsageError):  # without a lock it's just slower
                says("waiting for another process that reads the candidates")
                fd = stack.enter_context(node_lock(_lock_file(files), keep_going))
            finished = _read_time(fd)
            if finished >= came:
                return 0  # another process read them while this one waited
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
    """The parts of files that have to be read.

    Args:
        files: the files to check.
        unless_since: when they were last read; None: never.
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
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()  # times in the file are since boot
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
    """Seconds since boot, the same for all processes of the machine."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _seconds(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"
