"""Writes files atomically."""

from __future__ import annotations

import contextlib
import glob
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a temporary file next to `path` and renames it; makes the folder if it is missing.

    Readers see the old file or the new one. Several processes, on several nodes, may write the same
    file at once: the last one wins. Nothing is flushed to disk.

    Raises:
        OSError: it can't be written; an existing file stays, and nothing else is left behind.
    """
    with _beside(path, data) as temporary:
        temporary.replace(path)


def write_new(path: Path, data: bytes) -> None:
    """Writes a file like `write_whole`, but if several processes do so at once, the first one wins.

    Raises:
        OSError: it can't be written.
    """
    with _beside(path, data) as temporary:
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            pass
        except OSError:  # a filesystem without links
            temporary.replace(path)


@contextlib.contextmanager
def _beside(path: Path, data: bytes) -> Iterator[Path]:
    """A temporary file with the data next to `path`; at the end it is gone, if it still exists."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def process_marker(path: Path, kind: str) -> str:
    """The start of the names, beside `path`, of what processes of this host have not finished; a
    process appends its id."""
    return f".{path.name}.{kind}-{socket.gethostname()}-"


def left_behind(path: Path, kind: str) -> Iterator[Path]:
    """What processes of this host that are gone, because they were killed, left beside `path`."""
    marker = process_marker(path, kind)
    for found in path.parent.glob(f"{glob.escape(marker)}*"):
        pid = found.name.removeprefix(marker)
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            yield found
