"""The folder of a result: it appears once it is complete, and a failure leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gptailor.errors import GptailorError, ResourceError, UsageError, is_disk_full, sizes
from gptailor.files import left_behind, process_marker
from gptailor.models.family import Family


def check_out(out: Path, family: Family) -> None:
    """Raises a `UsageError` if `out` exists, or is, contains or is inside an input."""
    place = out.resolve()
    for candidate in family.candidates.values():
        if place == candidate.folder.resolve() or place in candidate.folder.resolve().parents:
            raise UsageError(f"The output {out} is also an input ({candidate.name}).")
        if candidate.folder.resolve() in place.parents:
            raise UsageError(f"The output {out} is inside an input ({candidate.folder}).")
    if out.exists() or out.is_symlink():
        raise UsageError(f"The output {out} already exists: name a folder that does not.")


def check_space(folder: Path, n_bytes: int) -> None:
    """Raises a `ResourceError` if the disk of `folder` has no room for `n_bytes` bytes."""
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if free < n_bytes:
        there, needed = sizes(free, n_bytes)
        raise ResourceError(
            f"The disk of {folder.parent} has {there} free, but the model needs "
            f"{needed}: free some space or name another output."
        )


@contextmanager
def new_folder(
    out: Path, sync: bool, test: Callable[[Path], object] | None = None
) -> Iterator[Path]:
    """A temporary folder next to `out` that is renamed to `out` on success and removed on failure.

    Args:
        out: the folder to make.
        sync: flush everything to the disk before it gets its name.
        test: called with the complete folder before that; raises to reject it.

    Raises:
        UsageError: `out` appeared in the meantime.
        ResourceError: the folder can't be written, for example because the disk is full.
    """
    folder = out.parent / f"{process_marker(out, 'tmp')}{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # our own: a dead process had our id before, which happens in containers
        for stale in (folder, *left_behind(out, "tmp")):
            shutil.rmtree(stale, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        raise ResourceError(f"{out.parent} can't be written: {error.strerror}.") from error
    try:
        yield folder
        if test is not None:
            test(folder)
        if sync:
            for path in [*folder.rglob("*"), folder]:
                _fsync(path)
        folder.rename(out)
        if sync:
            _fsync(out.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, GptailorError):
            raise _explained(error, out) from error
        raise


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explained(error: OSError, out: Path) -> GptailorError:
    if is_disk_full(error):
        return ResourceError(
            f"The disk of {out} is full, nothing was left behind: free some space."
        )
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return UsageError(f"The output {out} appeared in the meantime: nothing was replaced.")
    return ResourceError(f"{out} can't be written: {error.strerror or error}.")
