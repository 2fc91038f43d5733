"""What a search tells whoever watches over it: what it gained, and at the end its exit code.

A launcher's own exit code does not tell whether a search ended as it meant to, or a rank was
killed. The supervisor of a job names two files in the environment, on the disk of its own machine,
where rank 0 runs. What is in the one was meant. The other grows by a byte for each thing that the
archive gained: so whether a step that was killed got anywhere is known exactly, without opening an
archive that somebody may be writing, over a network that may show it later.

An end by SIGTERM or SIGINT is no verdict: launchers send SIGTERM to all ranks when one of them
dies, and only the supervisor knows whether somebody wanted the job to end.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from gptailor.execution.mpi.launcher import is_first
from gptailor.execution.slurm.variables import GAINED, VERDICT

_SIGNALS = 128
"""Exit codes above stand for signals."""


def is_supervised() -> bool:
    """Whether somebody will start this program again if it dies."""
    return bool(os.environ.get(VERDICT))


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


def write_verdict(code: int) -> None:
    """Writes the exit code, if somebody wants it and this is rank 0, or the only process.

    A verdict that can't be written is none: the supervisor starts the search again, which finds
    out what it has to do.
    """
    path = os.environ.get(VERDICT)
    if not path or code > _SIGNALS or not is_first():
        return
    from gptailor.files import write_whole

    with contextlib.suppress(OSError):
        write_whole(Path(path), f"{code}\n".encode())
