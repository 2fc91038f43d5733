"""Runs a search's `srun` line inside a job, and repeats it until the search ends on purpose.

    python3 -m gptailor.execution.supervisor [options] -- srun … gptailor search CONFIG --resume

A rank that dies takes the whole MPI step down, so a program outside the step has to restart it. How
the search ended is not read from srun's exit code, which mixes all ranks, srun's own errors and
signals, but from the exit code file: its path is in `GPTAILOR_VERDICT`, and the search's first
rank, which runs on this host, writes its exit code there as its last action.

- With an exit code in the file, the search ended on purpose: this program exits with that code. 75
  asks for a requeue, which is done here; where the site forbids it, 75 is the exit code.
- Without an exit code in the file, ranks were killed, or Slurm refused the step (it does so once
  after an unclean death). The step is restarted in place, at most three times in a row without a
  new result in the archive. New results are read from another file: its path is in
  `GPTAILOR_GAINED`, and the search adds one byte to it for each result once it is durable.

SIGUSR2 (with `--signal=B:USR2@…`) and SIGTERM are passed on to srun, which sends them to all ranks.

Only the standard library is used, from Python 3.8 on, so that a host without installed packages can
run it around a container: `PYTHONPATH=…/gptailor python3 -m gptailor.execution.supervisor …`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from gptailor.execution.variables import ENDS_AT, EXIT_CODE_FILE, GAINED
from gptailor.exit_codes import (
    MEANT,
    REQUEUE,
    SIGNALS,
    STOPPED_EARLY,
    USAGE,
    of_signal,
    signal_of,
)

SRUN_ERROR = 222
"""srun's exit code for its own errors (SLURM_EXIT_ERROR), different from any of the program's."""

REQUEUE_WAIT_S = 120.0
"""How long to wait for Slurm to end a job that it requeues."""


class Supervisor:
    """Runs a command until the search ends.

    Args:
        command: the `srun` line, or any other command that starts the search.
        max_restarts: the most restarts in a row without a new result in the archive.
        restart_after_s: pause before the first restart, doubled for each further one.
        max_requeues: of this job, including preemptions.
        environ: of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        max_restarts: int = 3,
        restart_after_s: float = 2.0,
        max_requeues: int = 100,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.command = list(command)
        self.max_restarts = max_restarts
        self.restart_after_s = restart_after_s
        self.max_requeues = max_requeues
        self.environ = dict(environ)
        self.job = _job_id(self.environ)
        self.requeued = int(self.environ.get("SLURM_RESTART_COUNT") or 0)
        self.asked: int | None = None
        self.attempt = 0
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Runs the command until the search ends; returns the exit code for this process.

        Side effects: handles SIGTERM, SIGINT, SIGUSR2 and SIGCONT; may requeue the job.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._hand_on)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        problem = self._unknown_mpi()
        if problem:
            self._say(problem)
            return USAGE
        folder = tempfile.mkdtemp(prefix="gptailor-")
        try:
            return self._until_it_is_over(Path(folder) / "exit_code", Path(folder) / "gained")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _until_it_is_over(self, exit_code_file: Path, gained_file: Path) -> int:
        restarts = 0
        while True:
            self.attempt += 1
            gained_before, began = _size(gained_file), time.monotonic()
            try:
                code = self._step(exit_code_file, gained_file)
            except OSError as error:
                self._say(f"{self.command[0]} can't be started: {error.strerror}")
                return USAGE
            lived_s = time.monotonic() - began
            meant = _read_exit_code(exit_code_file)
            if meant is None and code in MEANT:  # the file could not be written
                meant = code
            if meant is not None:
                self._say(f"ended after {lived_s:.0f} s with exit code {meant}")
                return self._meant(meant)
            gained = _size(gained_file) - gained_before
            died = f"{_how(code)} after {lived_s:.0f} s and {gained} new results"
            if self._is_preempted():
                self._say(f"{died}, by preemption")
                return self._requeue()
            if self.asked is not None:
                self._say(died)
                return self._stopped(code)
            restarts = 1 if gained > 0 else restarts + 1
            if restarts > self.max_restarts:
                self._say(
                    f"{died}; after {self.max_restarts} restarts without one new result this is "
                    "given up: look for the first error above and in logs/ of the run folder"
                )
                return code if 0 < code < SIGNALS else STOPPED_EARLY
            wait_s = self.restart_after_s * 2 ** (restarts - 1)
            self._say(f"{died}; starts again in {wait_s:g} s")
            if not self._slept(wait_s):
                return self._stopped(code)

    def _step(self, exit_code_file: Path, gained_file: Path) -> int:
        """Runs the command once; returns its exit code, 128 + N if signal N ended it."""
        exit_code_file.unlink(missing_ok=True)
        gained_file.touch()
        environ = {
            "SLURM_EXIT_ERROR": str(SRUN_ERROR),
            **self.environ,
            EXIT_CODE_FILE: str(exit_code_file),
            GAINED: str(gained_file),
            **self._end_time(),
        }
        self._say(f"starts {shlex.join(self.command)}")
        # in this process's group, as some Slurm set-ups track processes by their group
        self._child = subprocess.Popen(self.command, env=environ, stdin=subprocess.DEVNULL)
        if self.asked is not None:  # the signal came before the child existed
            self._child.send_signal(self._for_child(self.asked))
        code = self._child.wait()
        self._child = None
        return code if code >= 0 else of_signal(-code)

    def _meant(self, code: int) -> int:
        """Handles the search's own exit code: returns it, or asks Slurm for another turn."""
        number = signal_of(code)
        if code == REQUEUE or (number is not None and self._is_preempted()):
            return self._requeue()
        if number == signal.SIGTERM and self.asked == signal.SIGINT:
            # srun treats SIGINT as a status query, so the ranks got SIGTERM instead
            return of_signal(signal.SIGINT)
        return code

    def _stopped(self, code: int) -> int:
        """Handles the end after a signal if the search has written no exit code."""
        if self.asked == signal.SIGUSR2:
            return self._requeue()
        assert self.asked is not None
        return of_signal(self.asked)

    def _is_preempted(self) -> bool:
        """Whether Slurm is preempting this job, after a grace time.

        Slurm signals only the ranks, and treats a job that ends in the grace time as finished, so
        it would not requeue the job.
        """
        values = self._job_values()
        preempted_at, began_at = values.get("PreemptTime", "None"), values.get("StartTime", "")
        # in this turn, not in one before a requeue (both have the same format, year first)
        return values.get("JobState") == "RUNNING" and "None" != preempted_at >= began_at

    def _job_values(self) -> dict[str, str]:
        """Slurm's data on this job; empty without Slurm, or without an answer."""
        if not self.job:
            return {}
        shown = _output(["scontrol", "--oneliner", "show", "job", self.job])
        return dict(word.partition("=")[::2] for word in shown.split())

    def _end_time(self) -> dict[str, str]:
        """The time when Slurm will kill the job, for the search; older versions don't set it."""
        try:
            ends_at = time.strptime(self._job_values().get("EndTime", ""), "%Y-%m-%dT%H:%M:%S")
        except ValueError:
            return {}
        return {ENDS_AT: f"{time.mktime(ends_at):.0f}"}

    def _requeue(self) -> int:
        if not self.job:
            self._say("the search needs to continue later: start the same command again")
            return REQUEUE
        if self.requeued >= self.max_requeues:
            self._say(
                f"the job has been requeued {self.requeued} times, which is the limit "
                "(--max-requeues): submit the same command again to continue"
            )
            return REQUEUE
        self.asked = None  # signals from now on are Slurm's, which ends this turn of the job
        try:
            done = subprocess.run(
                ["scontrol", "requeue", self.job],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            refusal = None if done.returncode == 0 else done.stderr.strip() or "no reason given"
        except (OSError, subprocess.TimeoutExpired) as error:
            refusal = str(error)
        if refusal is not None:
            self._say(
                f"Slurm does not requeue the job ({' '.join(refusal.split())}): submit the same "
                "command again to continue; nothing is evaluated twice"
            )
            return REQUEUE
        self._say("requeued")
        self._slept(REQUEUE_WAIT_S)  # until Slurm ends this job
        return REQUEUE

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: remembers the most urgent signal and passes it on to the child."""
        if self.asked in (None, signal.SIGUSR2):
            self.asked = number
        self._say(f"got {signal.Signals(number).name}")
        child = self._child
        if child is not None and child.poll() is None:
            child.send_signal(self._for_child(number))

    @staticmethod
    def _for_child(number: int) -> int:
        return signal.SIGTERM if number == signal.SIGINT else number

    def _slept(self, seconds: float) -> bool:
        """Waits; returns False if a signal came in that time."""
        until = time.monotonic() + seconds
        while self.asked is None and time.monotonic() < until:
            time.sleep(min(0.2, seconds))
        return self.asked is None

    def _unknown_mpi(self) -> str:
        """An error message if srun does not have the MPI type; empty if it does."""
        kind = mpi_type(self.command)
        if kind is None:
            return ""
        known = known_mpi_types()
        if not known or kind in known:
            return ""
        return (
            f"srun knows no MPI of type {kind!r}: set MPI_TYPE (or --mpi) to one of "
            f"{', '.join(known)}"
        )

    def _say(self, text: str) -> None:
        job = f"job {self.job}, restart {self.requeued}" if self.job else "no Slurm job"
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        line = f"{stamp} supervisor ({job}, try {self.attempt}): {text}\n"
        with contextlib.suppress(OSError):  # a full disk, a closed terminal
            os.write(2, line.encode())  # not print, which a signal handler may interrupt


def _job_id(environ: Mapping[str, str]) -> str:
    """Slurm's id of this job; empty outside of Slurm.

    The last element of an array has the array's number as its SLURM_JOB_ID; requeueing by that id
    would requeue all elements.
    """
    array, element = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array and element else environ.get("SLURM_JOB_ID", "")


def mpi_type(command: Sequence[str]) -> str | None:
    """The `--mpi` of an srun line; None without it, or if the line is not an srun line."""
    if not command or Path(command[0]).name != "srun":
        return None
    for index, word in enumerate(command):
        if word == "--mpi" and index + 1 < len(command):
            return command[index + 1]
        if word.startswith("--mpi="):
            return word[len("--mpi=") :]
        if word == "gptailor":
            break
    return None


def known_mpi_types() -> list[str]:
    """The MPI types that this machine's srun has; empty if it does not tell."""
    # one per line below a heading, for some types with their versions after a colon; the text
    # goes to standard error or standard output, depending on Slurm's version
    known: list[str] = []
    for line in _output(["srun", "--mpi=list"]).splitlines():
        words = line.rpartition(":")[2].replace(",", " ").split()
        if ":" in line or len(words) == 1:
            known += [word for word in words if not word.endswith("...")]
    return known


def _read_exit_code(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # for example removed by an overeager clean-up
        return 0


def _output(command: Sequence[str]) -> str:
    """The output of one of Slurm's programs; empty if it is missing or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _how(code: int) -> str:
    """Describes how a command ended without an exit code from the search."""
    if code == SRUN_ERROR:
        return "srun could not start or finish the step"
    number = signal_of(code)
    if number is not None:
        with contextlib.suppress(ValueError):
            return f"a rank was ended by {signal.Signals(number).name}"
    return f"the step died with exit code {code}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command after "--"; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="gptailor.execution.supervisor",
        description="Runs a command inside a job, restarts it when it is killed, and requeues the "
        "job when the command asks for it.",
    )
    parser.add_argument(
        "--max-restarts", type=int, default=3, help="restarts in a row without a new result (3)"
    )
    parser.add_argument(
        "--restart-after", type=float, default=2.0, help="seconds before the first restart (2)"
    )
    parser.add_argument("--max-requeues", type=int, default=100, help="requeues of the job (100)")
    parser.add_argument("command", nargs="+", help="-- and the command")
    arguments = parser.parse_args(argv)
    supervisor = Supervisor(
        arguments.command,
        max_restarts=arguments.max_restarts,
        restart_after_s=arguments.restart_after,
        max_requeues=arguments.max_requeues,
    )
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
