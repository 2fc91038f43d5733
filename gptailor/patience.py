"""Progress lines for slow steps: quick steps print nothing, slow ones a line now and then.

A step may be a single library call, or may wait for other processes, so the lines come from a
thread. It only reads what the step has counted.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

EVERY_S = 10.0
"""Seconds without output before a line says what is going on; also the interval between lines."""

LONG_S = 120.0
EVERY_OF_LONG_S = 60.0
"""Interval for steps longer than `LONG_S`, so that overnight logs stay readable."""

BEAT_S = 1.0

Say = Callable[[str], None]
"""Takes a sentence for the terminal or a log."""


@dataclass
class _Step:
    what: Callable[[], str]
    how_far: Callable[[], str]
    every_s: float
    began: float


class Patience:
    """Reports what a program is doing while it prints nothing else.

    A context manager: its thread runs inside the context.

    Args:
        say: takes each line.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._beat: Callable[[], None] = lambda: None
        self._steps: list[_Step] = []
        self._spoke_at = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def step(
        self,
        what: str | Callable[[], str],
        how_far: Callable[[], str] = lambda: "",
        every_s: float | None = None,
    ) -> Iterator[None]:
        """Names what the context does; an inner step replaces an outer one.

        Args:
            what: "Loading the tasks", or a function that returns such a text if it changes.
            how_far: returns "3 of 14 files", or an empty string; called in the thread.
            every_s: like `EVERY_S`, for a step that needs fewer lines.
        """
        of = what if callable(what) else lambda: what
        step = _Step(of, how_far, every_s or EVERY_S, time.monotonic())
        self._steps.append(step)
        try:
            yield
        finally:
            self._steps.remove(step)

    def watch(self, beat: Callable[[], None]) -> None:
        """Calls `beat` from now on, about every second, in the thread."""
        self._beat = beat

    def spoke(self) -> None:
        """Records that something else was just printed, which postpones the next line."""
        self._spoke_at = time.monotonic()

    def __enter__(self) -> Patience:
        self._over.clear()
        self._thread = threading.Thread(target=self._watch, name="patience", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(BEAT_S)  # what it reads may hang, as file systems do

    def _watch(self) -> None:
        while not self._over.wait(min(BEAT_S, EVERY_S)):
            # the state may change while it is read; the next beat tries again
            with contextlib.suppress(Exception):
                self._beat()
            with contextlib.suppress(Exception):
                text = self._line(time.monotonic())
                if text:
                    self._say(text)
                    self.spoke()

    def _line(self, now: float) -> str:
        """The line that is due now; usually empty."""
        if not self._steps:
            return ""
        step = self._steps[-1]
        seconds = now - step.began
        every_s = step.every_s if seconds < LONG_S else max(step.every_s, EVERY_OF_LONG_S)
        if now - max(self._spoke_at, step.began) < every_s:
            return ""
        far = step.how_far()
        return f"{step.what()}{': ' if far else ''}{far} ({duration(seconds)})"


@contextlib.contextmanager
def slowly(what: str, say: Say, how_far: Callable[[], str] = lambda: "") -> Iterator[None]:
    """A single step, as in `Patience.step`."""
    with Patience(say) as patience, patience.step(what, how_far):
        yield


def duration(seconds: float) -> str:
    """Formats a duration: "45 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
