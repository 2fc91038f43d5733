"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file beside its place and renames it; makes its folder where it is missing.

    Readers see the old file or the new one. Several processes, on several nodes, may write the same
    file at once: one of them is the last. Nothing is flushed to the disk.

    Raises:
        OSError: it can't be written; the file that was there stays, and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
