"""A lock for one process of a node at a time, on a file of the node's own file system.

The kernel releases it when its holder dies, for whatever reason.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gptailor.errors import ResourceError, UsageError

_POLL_S = 0.1


@contextmanager
def node_lock(path: Path, keep_going: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Waits until no other process has the lock; yields the file's descriptor.

    Args:
        path: the lock file, in a folder that `own_folder` made; it is not removed.
        keep_going: called while waiting; an error that it raises ends the waiting.

    Raises:
        ResourceError: the file system has no locks, or the file can't be made.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ResourceError(f"{path} can't be opened: {error.strerror}.") from error
    try:
        while not _locked(fd, path):
            keep_going()
            time.sleep(_POLL_S)  # not a blocking flock: signal handlers have to run
        yield fd
    finally:
        os.close(fd)


def _locked(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ResourceError(
            f"{path} can't be locked ({error.strerror}): use a folder on a local file system."
        ) from error
    return True


def own_folder(parent: Path) -> Path:
    """Makes a folder of this user alone below one that everybody may write to.

    Raises:
        UsageError: the folder belongs to somebody else.
        ResourceError: it can't be made.
    """
    folder = parent / f"gptailor-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ResourceError(f"{folder} can't be made: {error.strerror}.") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise UsageError(f"{folder} is not a folder that only you can write to: remove it.")
    return folder
