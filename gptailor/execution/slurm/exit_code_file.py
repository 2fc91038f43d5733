"""Reports a search's new results, and finally its exit code, to the supervisor of its job.

A launcher's own exit code does not show whether a search ended as intended or a rank was killed.
The supervisor passes the paths of two files in environment variables; they are on the disk of its
own machine, where rank 0 runs. The exit code file has the search's intended exit code. The other
file grows by one byte for each result that the archive gained. It shows exactly whether a killed
step made progress, without opening an archive that somebody may be writing, perhaps over a network
that shows changes late.

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
    """Whether a supervisor will start this program again if it dies."""
    return bool(os.environ.get(EXIT_CODE_FILE))


def note_gain(count: int) -> None:
    """Tells the supervisor, if there is one, that `count` new results are in the archive.

    Call it once they are durable. If the file can't be written, they are not counted, which at
    worst ends a job that is killed again and again; the search itself goes on.
    """
    path = os.environ.get(GAINED)
    if not path:
        return
    with contextlib.suppress(OSError):
        # without O_CREAT: the supervisor makes the file, and without it there is no supervisor
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(fd, b"+" * count)
        finally:
            os.close(fd)


def gained() -> int | None:
    """The results that `note_gain` counted in this turn of the job, including earlier steps; None
    without a supervisor."""
    try:
        return Path(os.environ[GAINED]).stat().st_size
    except (KeyError, OSError):
        return None


def write_exit_code(code: int) -> None:
    """Writes the exit code file if there is a supervisor and this is rank 0 or the only process.

    If the file can't be written, the supervisor starts the search again, which finds out what is
    left to do.
    """
    path = os.environ.get(EXIT_CODE_FILE)
    if not path or signal_of(code) is not None or not is_first():
        return
    from gptailor.files import write_whole

    with contextlib.suppress(OSError):
        write_whole(Path(path), f"{code}\n".encode())
