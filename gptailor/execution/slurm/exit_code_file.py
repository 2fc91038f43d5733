"""What a search tells the supervisor of its job: what it gained, and at the end its exit code.

A launcher's own exit code does not tell whether a search ended as it meant to, or a rank was
killed. The supervisor names two files in the environment, on the disk of its own machine, where
rank 0 runs. The exit code file has the code that the search means. The other grows by a byte for
each thing that the archive gained: so whether a step that was killed got anywhere is known exactly,
without opening an archive that somebody may be writing, over a network that may show it later.

After SIGTERM or SIGINT nothing is written: launchers send SIGTERM to all ranks when one of them
dies, and only the supervisor knows whether somebody wanted the job to end.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from gptailor.execution.mpi.launcher import is_first
from gptailor.execution.variables import EXIT_CODE_FILE, GAINED
from gptailor.exit_codes import signal_of


def is_supervised() -> bool:
    """Whether somebody will start this program again if it dies."""
    return bool(os.environ.get(EXIT_CODE_FILE))


def note_gain(count: int) -> None:
    """Tells the supervisor, if there is one, that so many things are in the archive now.

    To be called when they are durable. What can't be told is not counted, which at worst ends a job
    that is killed again and again; the search itself goes on.
    """
    path = os.environ.get(GAINED)
    if not path:
        return
    with contextlib.suppress(OSError):
        # no file, no supervisor: it makes the file, and whoever removed it has gone
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(fd, b"+" * count)
        finally:
            os.close(fd)


def gained() -> int | None:
    """What `note_gain` counted in this turn of the job, earlier steps included; None if nobody
    counts."""
    try:
        return Path(os.environ[GAINED]).stat().st_size
    except (KeyError, OSError):
        return None


def write_exit_code(code: int) -> None:
    """Writes the exit code file, if somebody wants it and this is rank 0, or the only process.

    Without a file, because it can't be written, the supervisor starts the search again, which finds
    out what it has to do.
    """
    path = os.environ.get(EXIT_CODE_FILE)
    if not path or signal_of(code) is not None or not is_first():
        return
    from gptailor.files import write_whole

    with contextlib.suppress(OSError):
        write_whole(Path(path), f"{code}\n".encode())
