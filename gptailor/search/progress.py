"""Progress of a running search: evaluations done, the best so far, time left."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from gptailor.evaluation.outcome import Evaluation
from gptailor.patience import Patience, duration
from gptailor.run.pareto import SMALL, most_small_layers

PLAIN_INTERVAL_S = 5.0
"""Without a terminal, the shortest time between two lines."""

PLAIN_LINES = 100
"""Without a terminal, about the largest number of lines, so that overnight logs stay readable."""


class Progress:
    """Prints how far a search is: one line that is rewritten, or plain lines without a terminal.

    As a context it also reports on steps that print nothing for a while (`Patience`).

    Args:
        total: number of evaluations that the search will make.
        num_layers: source layers of the family.
        stream: where to print; default: standard error.
        log: takes whole lines, for a file.

    Attributes:
        total: number of evaluations that the search will make.
        done: evaluations so far, wherever they were made.
        reused: those that existed when the search began.
        elsewhere: those that other islands have made since.
        step, watch: as of `Patience`.
    """

    def __init__(
        self,
        total: int,
        num_layers: int,
        stream: TextIO | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.total = total
        self.num_layers = num_layers
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._log = log
        self._began: float | None = None
        self._shown_at = -PLAIN_INTERVAL_S
        self._shown = 0
        self.done = self.reused = self.elsewhere = 0
        self._best: float | None = None
        self._lock = threading.Lock()
        self._is_dirty = False  # a line on the terminal waits to be rewritten
        self._patience = Patience(self._still)
        self.step, self.watch = self._patience.step, self._patience.watch

    def __enter__(self) -> Progress:
        self._patience.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._patience.__exit__(*error)
        if self._is_dirty:
            self._print("", is_last=False)

    def update(self, evaluation: Evaluation, *, is_new: bool, is_elsewhere: bool = False) -> None:
        """Counts one evaluation.

        Args:
            evaluation: how it ended.
            is_new: it was made just now; False if it came from an archive.
            is_elsewhere: another island has made it since this search began.
        """
        now = time.monotonic()
        if self._began is None:  # time before the first evaluation says nothing about the rest
            self._began = now - evaluation.outcome.cost.seconds
        self.done += 1
        self.reused += not is_new and not is_elsewhere
        self.elsewhere += is_elsewhere
        accuracy = evaluation.outcome.accuracy
        is_small = evaluation.recipe.num_layers <= most_small_layers(self.num_layers)
        if accuracy is not None and is_small:
            self._best = accuracy if self._best is None else max(self._best, accuracy)
        last = self.done >= self.total
        is_due = now - self._shown_at >= PLAIN_INTERVAL_S
        is_due &= self.done == 1 or self.done - self._shown >= self.total / PLAIN_LINES
        if last or is_due:
            self._shown_at, self._shown = now, self.done
            self._log(self.line(now))
        if self._is_terminal or last or is_due:
            self._print(self.line(now), is_last=last or not self._is_terminal)

    def line(self, now: float) -> str:
        """The current progress line."""
        best = "–" if self._best is None else f"{self._best:.3f}"
        parts = [
            f"{self.done}/{self.total} evaluations",
            f"best at ≤ {100 * SMALL:.0f} % of the layers: {best}",
        ]
        new = self.done - self.reused
        if self.reused:
            parts.append(f"{self.reused} from the archive")
        if self.elsewhere:
            parts.append(f"{self.elsewhere} by other islands")
        if new and self._began is not None and self.done < self.total:
            left = (now - self._began) / new * (self.total - self.done)
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)

    def note(self, text: str) -> None:
        """Prints a separate line, for anything but evaluations."""
        self._print(text, is_last=True)
        self._log(text)

    def _still(self, text: str) -> None:
        """Replaces the progress line."""
        self._print(text, is_last=not self._is_terminal)
        self._log(text)

    def _print(self, text: str, *, is_last: bool) -> None:
        """Prints a line over a rewritable one; with `is_last` the next line begins below it."""
        with self._lock, contextlib.suppress(OSError):  # a closed pipe must not end a search
            before = "\r\x1b[K" if self._is_terminal and (text or self._is_dirty) else ""
            self._stream.write(before + text + ("\n" if is_last else ""))
            self._stream.flush()
            self._is_dirty = bool(text) and not is_last
        self._patience.spoke()
