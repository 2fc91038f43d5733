"""Messages between the ranks of an MPI program, without any blocking call.

A blocking receive spins on a core and keeps Python from running signal handlers, and an `isend`
whose request is dropped loses its buffer. So requests are kept until they are complete, and waiting
code polls and sleeps.
"""

from __future__ import annotations

import atexit
import contextlib
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptailor.execution.mpi.messages import Message

SHORTEST_S, LONGEST_S = 0.001, 0.005
"""Pauses between two polls."""

_TAG = 71
_ABORT_LIMIT_S = 5


class Channel:
    """The ranks of MPI's world.

    Args:
        mpi: the module `mpi4py.MPI`, initialised.

    Attributes:
        rank: of this process.
        size: how many ranks there are.
    """

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._comm = mpi.COMM_WORLD
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self._sent: list[Any] = []
        self._arriving: list[tuple[int, Any]] = []

    def send(self, rank: int, message: Message) -> None:
        """Starts sending; `receive` and `flush` complete it."""
        self._sent.append(self._comm.isend(message, dest=rank, tag=_TAG))

    def receive(self) -> tuple[int, Message] | None:
        """A message that has arrived and the rank that sent it; None if there is none."""
        self._sent = [request for request in self._sent if not request.test()[0]]
        status = self._mpi.Status()
        while True:
            found = self._comm.improbe(tag=_TAG, status=status)
            if found is None:
                break
            self._arriving.append((status.Get_source(), found.irecv()))
        for index, (source, request) in enumerate(self._arriving):
            is_here, message = request.test()
            if is_here:
                del self._arriving[index]
                return source, message
        return None

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything is sent; False if that takes longer than the timeout."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._sent = [request for request in self._sent if not request.test()[0]]
            if not self._sent or time.monotonic() >= deadline:
                return not self._sent
            time.sleep(SHORTEST_S)

    def finalize(self) -> None:
        """Finalizes MPI; every rank must do so and waits for the others."""
        self._mpi.Finalize()

    def leave_behind(self) -> None:
        """Makes the end of this process end the others, too, as some can't be waited for."""
        global _left_behind  # noqa: PLW0603  (an exit handler has no other place for state)
        _left_behind = self
        atexit.register(leave, 1)

    def abort(self, code: int) -> None:
        """Ends all ranks at once, this one with the exit code."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_ABORT_LIMIT_S)  # in case the launcher does not respond
        self._comm.Abort(code)


_left_behind: Channel | None = None


def leave(code: int) -> None:
    """Ends all ranks with an exit code if some were left behind; otherwise does nothing.

    Side effect: may end the process.
    """
    if _left_behind is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        _left_behind.abort(code)
