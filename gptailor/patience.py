"""What is said while something takes long: nothing of what is quick, then a line now and then.

A step of a program may be one call into a library, or wait for others, so the lines come from a
thread. It only reads what the step has counted.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

EVERY_S = 10.0
"""So long nothing is said before a line tells what is going on; and between two such lines."""

LONG_S = 120.0
EVERY_OF_LONG_S = 60.0
"""A step that takes longer is told of more rarely: a log of a night stays readable."""

BEAT_S = 1.0

Say = Callable[[str], None]
"""Takes a sentence for a person who waits, or for a log."""


@dataclass
class _Step:
    what: Callable[[], str]
    how_far: Callable[[], str]
    every_s: float
    began: float


class Patience:
    """Tells what a program is at while it says nothing else; a context, in which its thread lives.

    Args:
        say: takes the line.
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
        """What is done within; an inner step takes the place of an outer one.

        Args:
            what: "Loading the tasks"; or gives that, where it changes.
            how_far: gives "3 of 14 files", or nothing; called in the thread.
            every_s: as `EVERY_S`, for a step of which less has to be said.
        """
        of = what if callable(what) else lambda: what
        step = _Step(of, how_far, every_s or EVERY_S, time.monotonic())
        self._steps.append(step)
        try:
            yield
        finally:
            self._steps.remove(step)

    def watch(self, beat: Callable[[], None]) -> None:
        """What is looked at from now on, about every second, in the thread."""
        self._beat = beat

    def spoke(self) -> None:
        """Something was said by somebody else: that is enough for a while."""
        self._spoke_at = time.monotonic()

    def __enter__(self) -> Patience:
        self._over.clear()
        self._thread = threading.Thread(target=self._watch, name="patience", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(BEAT_S)  # what it looks at may hang, as file systems do

    def _watch(self) -> None:
        while not self._over.wait(min(BEAT_S, EVERY_S)):
            # what is looked at may change in this moment; there will be another one
            with contextlib.suppress(Exception):
                self._beat()
            with contextlib.suppress(Exception):
                text = self._line(time.monotonic())
                if text:
                    self._say(text)
                    self.spoke()

    def _line(self, now: float) -> str:
        """What there is to say now; mostly nothing."""
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
    """One step by itself, as in `Patience.step`."""
    with Patience(say) as patience, patience.step(what, how_far):
        yield


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
