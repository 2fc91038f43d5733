"""gptailor's exit codes; no other module writes these numbers down.

Works on Python 3.8 and later without any packages: a job's supervisor imports it, too.
"""

from __future__ import annotations

DONE = 0
BUG = 1
"""A bug in gptailor; also Python's own exit code after an exception."""

USAGE = 2
"""The command line, a configuration or a recipe is wrong."""

MODEL = 3
"""A model or a tokenizer is unusable."""

RESOURCE = 4
"""Memory or disk is exhausted."""

STOPPED_EARLY = 5
"""Every evaluation is kept, and `--resume` continues."""

REQUEUE = 75
"""The job asks to be requeued (EX_TEMPFAIL in sysexits.h)."""

MEANT = (DONE, USAGE, MODEL, RESOURCE, STOPPED_EARLY, REQUEUE)
"""Codes that come from gptailor only: a launcher or a killed rank ends with others."""

SIGNALS = 128
"""Codes above this stand for a signal, as in a shell: 130 is SIGINT, 143 SIGTERM."""


def of_signal(number: int) -> int:
    """The exit code that stands for a signal."""
    return SIGNALS + number


def signal_of(code: int) -> int | None:
    """The signal number that an exit code stands for, or None."""
    return code - SIGNALS if code > SIGNALS else None
