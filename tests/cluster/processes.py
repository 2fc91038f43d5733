"""Processes: daemons that end with the test run, and whatever a cluster's jobs left behind.

Everything that a cluster starts inherits environment variables that tell where it belongs. They let
us find jobs, their children, and step daemons, which detach themselves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path


def wait_until(
    reached: Callable[[], object], timeout_s: float, what: str, every_s: float = 0.1
) -> None:
    """Checks every `every_s` seconds; raises TimeoutError naming what it waited for."""
    end = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(every_s)


def answers(*command: str, env: Mapping[str, str]) -> bool:
    """Whether a command exits with 0 within five seconds."""
    try:
        done = subprocess.run(command, check=False, env=env, capture_output=True, timeout=5)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False


def environment(pid: int) -> dict[str, str]:
    """The environment a running process was started with; empty once it has ended."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def find(**variables: str) -> list[int]:
    """Running processes that were started with these environment variables."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if variables.items() <= environment(pid).items()]


def program(pid: int) -> str:
    """Name of a process's program; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def parent(pid: int) -> int:
    """Its parent process; 0 once it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def kill_all(**variables: str) -> None:
    """SIGKILL for all processes that `find` finds, and those they start meanwhile."""
    for _ in range(100):
        pids = find(**variables)
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    raise TimeoutError(f"processes {pids} with {variables} do not end")


class Daemon:
    """A program in the foreground with a log file; the kernel ends it when the test run dies."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.argv = ["setpriv", "--pdeathsig", "KILL", *argv]
        self.env = dict(env)
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.argv,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Like a power failure."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def wait_until(self, reached: Callable[[], object], timeout_s: float = 30) -> None:
        """Waits for a daemon to answer; raises RuntimeError with the end of its log."""
        with suppress(TimeoutError):
            wait_until(lambda: not self.alive or reached(), timeout_s, "")
        if not (self.alive and reached()):
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{self.log.name}: it does not answer\n{tail}")
