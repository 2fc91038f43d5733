"""The last word of a search to whoever watches over it: its exit code, in a file.

A launcher's own exit code does not tell whether a search ended as it meant to, or a rank was
killed. The supervisor of a job names a file in the environment; what is in it was meant.

An end by SIGTERM or SIGINT is no verdict: launchers send SIGTERM to all ranks when one of them
dies, and only the supervisor knows whether somebody wanted the job to end.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from gptailor.execution.launcher import is_first
from gptailor.execution.variables import VERDICT

_SIGNALS = 128
"""Exit codes above stand for signals."""


def is_supervised() -> bool:
    """Whether somebody will start this program again if it dies."""
    return bool(os.environ.get(VERDICT))


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
