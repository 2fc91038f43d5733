"""Requests to stop by signal: recorded at once, acted on between two steps of a search.

- SIGUSR2 comes minutes before a time limit (Slurm's `--signal`): nothing new is started, jobs that
  can finish in time are waited for, and the program asks to be requeued (exit code 75).
- SIGTERM comes seconds before SIGKILL (scancel, preemption, another rank that died), SIGINT comes
  from a person: the same, but the wait is short and the exit code is 143 or 130.

A handler only records the signal. Waiting code must not block in C, where Python's handlers don't
run.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType

from gptailor.errors import Interrupted, Requeue, StoppedEarly
from gptailor.execution.variables import ENDS_AT

TERM_GRACE_S = 10.0
"""How long a search waits for running jobs after SIGTERM; Slurm's default KillWait is 30 s."""

MARGIN_S = 15.0
"""Time reserved before the job's time limit for the last write and the exit."""


def job_ends_at(env: Mapping[str, str] = os.environ) -> float | None:
    """Unix time in seconds at which Slurm kills the job; None if the environment has none."""
    for name in (ENDS_AT, "SLURM_JOB_END_TIME"):
        if env.get(name, "").isdecimal():
            return float(env[name])
    return None


@dataclass
class Stop:
    """Whether and how soon the search has to stop.

    Attributes:
        job_ends_at: Unix time in seconds at which the job is killed; None if unknown.
        signal: the signal that came; the more urgent one if there were two.
        came_at: Unix time in seconds at which it came.
    """

    job_ends_at: float | None = None
    signal: int | None = None
    came_at: float = field(default=0.0)

    def install(self, *signals: int) -> None:
        """Installs signal handlers; only in the main thread."""
        for number in signals or (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal in (None, signal.SIGUSR2):
            self.signal = number
            self.came_at = time.time()

    def is_set(self) -> bool:
        """True once a signal came: nothing new may be started."""
        return self.signal is not None

    @property
    def seconds_left(self) -> float:
        """How long running jobs may still be waited for; infinite without a limit."""
        now = time.time()
        if self.signal is None or (self.signal == signal.SIGUSR2 and self.job_ends_at is None):
            return float("inf")
        if self.signal == signal.SIGUSR2:
            assert self.job_ends_at is not None
            return max(self.job_ends_at - MARGIN_S - now, 0.0)
        return max(self.came_at + TERM_GRACE_S - now, 0.0)

    def error(self) -> StoppedEarly:
        """The error with which the search ends."""
        if self.signal == signal.SIGUSR2:
            return Requeue("Stopped before the time limit: everything evaluated is kept.")
        assert self.signal is not None
        return Interrupted(self.signal)
