"""Log files: one per rank of a run, as text and optionally also as JSON lines.

`RUN/logs/rank-000.log` is the one to read first: progress, who joined, what went wrong. The others
hold what their rank did and what its libraries print. A log that can't be written (a full disk)
does not end anything.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

from gptailor.run.layout import LOGS

_MAX_KEPT = 1000
"""The most lines that are kept until the file is opened."""


def log_path(rank: int) -> str:
    """The path of a rank's log, relative to the run folder."""
    return f"{LOGS}/rank-{rank:03d}.log"


class Log:
    """The log of one rank; lines logged before `open` are written when it opens.

    Args:
        rank: of this process.
        host: the host that it runs on.
    """

    def __init__(self, rank: int, host: str) -> None:
        self.rank = rank
        self.host = host
        self._text_fd = self._json_fd = -1
        self._is_open = False
        self._kept: list[tuple[str, str]] = []

    def open(self, run_folder: str | Path, *, as_json: bool = False) -> None:
        """Appends to this rank's files from now on; with `as_json`, also to a `.jsonl`."""
        path = Path(run_folder) / log_path(self.rank)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._text_fd = _appended(path)
        if as_json:
            self._json_fd = _appended(path.with_suffix(".jsonl"))
        self._is_open = True
        for text, line in self._kept:
            self._put(text, line)
        self._kept.clear()

    def say(self, text: str) -> None:
        """Logs a line for people."""
        self.event("note", text)

    def event(self, event: str, text: str = "", **fields: object) -> None:
        """Logs an event.

        Args:
            event: one word.
            text: for people; without it, the event is only in the JSON lines.
            fields: JSON-compatible values.
        """
        now = time.time()
        head = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        shown = f"{head} {text}\n" if text else ""
        data = {"time": round(now, 3), "rank": self.rank, "host": self.host, "event": event}
        line = json.dumps(data | ({"text": text} if text else {}) | fields, default=str) + "\n"
        if self._is_open:
            self._put(shown, line)
        elif len(self._kept) < _MAX_KEPT:
            self._kept.append((shown, line))

    def take_output(self) -> None:
        """Redirects this process's output to the file, including that of compiled code."""
        if self._text_fd < 0:
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        for fd in (1, 2):
            os.dup2(self._text_fd, fd)
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Careful(1)), line_buffering=True)
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(_Careful(2)), line_buffering=True)

    def close(self) -> None:
        """Closes the files; nothing is written afterwards."""
        for fd in (self._text_fd, self._json_fd):
            if fd >= 0:
                os.close(fd)
        self._text_fd = self._json_fd = -1

    def _put(self, text: str, line: str) -> None:
        for fd, content in ((self._text_fd, text), (self._json_fd, line)):
            if fd >= 0 and content:
                with contextlib.suppress(OSError):
                    os.write(fd, content.encode(errors="replace"))


class _Careful(io.RawIOBase):
    """A file that drops what it can't write: a library's output must not cost an evaluation."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        with contextlib.suppress(OSError):
            os.write(self._fd, view)
        return view.nbytes


def _appended(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError:
        return -1
