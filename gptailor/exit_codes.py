"""What an exit code of gptailor says; nothing else in the package writes these numbers down.

For any Python 3 from 3.8 on, without packages: the supervisor of a job reads it, too.
"""

from __future__ import annotations

DONE = 0
BUG = 1
"""Ours; also what Python itself ends with after an exception."""

USAGE = 2
"""The command line, a configuration or a recipe."""

MODEL = 3
"""A model or a tokenizer is unusable."""

RESOURCE = 4
"""Memory or disk is exhausted."""

STOPPED_EARLY = 5
"""What was evaluated is kept, and `--resume` continues."""

REQUEUE = 75
"""The job asks to be started again (EX_TEMPFAIL of sysexits.h)."""

MEANT = (DONE, USAGE, MODEL, RESOURCE, STOPPED_EARLY, REQUEUE)
"""Those that only gptailor itself gives: a launcher or a killed rank gives others."""

SIGNALS = 128
"""Larger codes stand for a signal, as in a shell: 130 is SIGINT, 143 SIGTERM."""


def of_signal(number: int) -> int:
    """The exit code that stands for a signal."""
    return SIGNALS + number


def signal_of(code: int) -> int | None:
    """The number of the signal that an exit code stands for; None if it stands for none."""
    return code - SIGNALS if code > SIGNALS else None
