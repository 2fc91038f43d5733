"""Rank 0's view of the other ranks: it gathers them, compares them, and ends them.

    channel = join("auto")
    if channel.rank: run_worker(channel)
    with Crew(channel, …) as crew:
        crew.join(config, family, run_folder, …)
        executor = MpiExecutor(crew)

Rank 0 imports no torch, never blocks inside MPI, and ends all ranks, no matter how it ends itself.
"""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from gptailor.errors import (
    GptailorError,
    ResourceError,
    StoppedEarly,
    UsageError,
    exit_code_of,
    is_disk_full,
)
from gptailor.evaluation.forward_dtype import Ability
from gptailor.execution.executor import Job, WorkerInfo
from gptailor.execution.logs import Log, log_path
from gptailor.execution.mpi.channel import SHORTEST_S, Channel
from gptailor.execution.mpi.handshake import (
    check_alike,
    check_clocks,
    check_models,
    clock_difference,
    content_digests,
    file_digests,
    find_hello,
    first_difference,
    write_token,
)
from gptailor.execution.mpi.messages import (
    Answer,
    AskClock,
    AskContents,
    Clock,
    Contents,
    Failed,
    Hello,
    Joined,
    Leave,
    Left,
    Load,
    Message,
    Orders,
    Times,
)
from gptailor.execution.node.placement import find_place, place_workers
from gptailor.execution.stop import Stop

if TYPE_CHECKING:
    from gptailor.config import Config
    from gptailor.models.family import Family

NOTE_EVERY_S = 10.0
ANSWER_LIMIT_S = 600.0
"""How often ranks that do not answer are reported, and when they are given up."""

END_S = 60.0
HURRIED_END_S = 2.0
"""How long the ranks may take to leave at the end of a search, and after an error."""

A = TypeVar("A", bound=Answer)


@dataclass
class Member:
    """A rank that evaluates.

    Attributes:
        hello: its first message.
        ability: what its node can do; known once it has joined.
        device: what it computes on; empty until it is ready.
        job: its current job; None if it is idle.
        since: when it began its job or became free, in seconds of the executor's clock.
        words: its progress message.
        times: how it spent its time; known at the end.
    """

    hello: Hello
    ability: Ability | None = None
    device: str = ""
    job: Job | None = None
    since: float = 0.0
    words: str = ""
    times: Times | None = None

    @property
    def info(self) -> WorkerInfo:
        """The rank as a worker, for monitoring."""
        hello = self.hello
        since = self.since if self.device else None
        return WorkerInfo(hello.rank, hello.place.node, hello.pid, self.device, since)


class Crew:
    """The other ranks, as seen by rank 0; as a context manager, gathers them and ends them.

    Args:
        channel: to the other ranks.
        stop: a request to stop.
        log_json: write logs as JSON lines, too.

    Attributes:
        log: rank 0's log; written to a file once there is a run folder.
        members: rank → member.

    Raises:
        UsageError: the ranks do not match.
        StoppedEarly: a rank does not answer, or a signal came.
    """

    def __init__(self, channel: Channel, stop: Stop, *, log_json: bool = False) -> None:
        self.channel = channel
        self.stop = stop
        self.hello = find_hello(0, find_place())
        self.log = Log(0, self.hello.place.node)
        self.members: dict[int, Member] = {}
        self._log_json = log_json
        self._is_told = False
        self._left: set[int] = set()

    def __enter__(self) -> Crew:
        try:
            self._muster()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tells the other ranks to leave, and leaves behind those that don't in time."""
        if not isinstance(value, GptailorError) and exit_code_of(value) == 1:
            text = "".join(traceback.format_exception(kind, value, trace))
            self.say(f"{self.hello.name} ended with:\n{text.rstrip()}")
        self.tell_end()
        patience = END_S if value is None else HURRIED_END_S
        if isinstance(value, StoppedEarly):
            patience = min(max(self.stop.seconds_left, HURRIED_END_S), END_S)
        deadline = time.monotonic() + patience
        while not self._has_ended() and time.monotonic() < deadline:
            found = self.channel.receive()
            if found is None:
                time.sleep(SHORTEST_S)
            elif isinstance(found[1], Left):
                self._left.add(found[0])
                if found[0] in self.members:
                    self.members[found[0]].times = found[1].times
        self._log_times()
        if self._has_ended() and self.channel.flush(HURRIED_END_S):
            self.channel.finalize()
        else:
            busy = [str(rank) for rank in range(1, self.channel.size) if rank not in self._left]
            self.log.say(f"Not waiting for rank {', '.join(busy)}.")
            self.channel.leave_behind()
        self.log.close()

    def say(self, text: str) -> None:
        """Prints a line to standard error and logs it."""
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
        self.log.say(text)

    def workers(self) -> list[WorkerInfo]:
        """The workers, in order."""
        return [self.members[rank].info for rank in sorted(self.members)]

    def join(
        self,
        config: Config,
        family: Family,
        run_folder: str | Path,
        begins: Callable[[], None] = lambda: None,
        *,
        io: str | None = None,
        stage: str | None = None,
    ) -> None:
        """Makes the ranks join a search; call `load` next.

        Args:
            config: of the search.
            family: the candidates, as rank 0 has opened them.
            run_folder: of the run or the island, as a path on rank 0's node; created if it is
                missing.
            begins: called once the run folder is known to be writable, before the ranks join.
            io, stage: as for `open_candidates`, on the ranks' nodes.

        Raises:
            UsageError: the run folder or the models are not the same for all ranks.
            GptailorError: the error that ended a worker.
        """
        folder = Path(run_folder).resolve()
        try:
            token = write_token(folder)
        except OSError as error:
            refused = ResourceError if is_disk_full(error) else UsageError
            raise refused(f"{folder} can't be written to: {error.strerror}.") from error
        try:
            self.log.open(folder, as_json=self._log_json)
            begins()
            self._join(config, family, folder, token, io, stage)
        finally:
            token.unlink(missing_ok=True)

    def load(self, dtype: str) -> None:
        """Makes the ranks load candidates and tasks, to compute in this dtype."""
        for rank in self.members:
            self.channel.send(rank, Load(dtype))

    def tell_end(self) -> None:
        """Tells the ranks to leave, which they do once they are idle."""
        if not self._is_told:
            self._is_told = True
            for rank in range(1, self.channel.size):
                self.channel.send(rank, Leave())

    def receive(self) -> tuple[int, Message] | None:
        """The next message, if there is one; raises the error that a message reports."""
        found = self.channel.receive()
        if found is not None and isinstance(found[1], Failed):
            raise self._error(found[0], found[1])
        return found

    def _muster(self) -> None:
        ranks = range(1, self.channel.size)
        for rank, hello in self._answers(Hello, ranks):
            self.members[rank] = Member(hello)
        others = [self.members[rank].hello for rank in ranks]
        check_alike(self.hello, others)
        asked_at = {}
        for rank in ranks:
            asked_at[rank] = time.time()
            self.channel.send(rank, AskClock())
        differences = {
            rank: clock_difference(asked_at[rank], clock.now_s, time.time())
            for rank, clock in self._answers(Clock, ranks)
        }
        for text in check_clocks(self.hello, differences, others):
            self.say(text)

    def _join(
        self,
        config: Config,
        family: Family,
        folder: Path,
        token: Path,
        io: str | None,
        stage: str | None,
    ) -> None:
        ranks = sorted(self.members)
        places = [self.members[rank].hello.place for rank in ranks]
        placements = place_workers(places, config.evaluation.device)
        for rank, placement in zip(ranks, placements, strict=True):
            orders = Orders(
                config=config,
                run_folder=str(folder),
                token=str(token.relative_to(folder)),
                first_node=self.hello.place.node,
                placement=placement,
                log_json=self._log_json,
                io=io,
                stage=stage,
            )
            self.channel.send(rank, orders)
        mine = file_digests(config, family)
        doubtful = {}
        for rank, joined in self._answers(Joined, ranks):
            self.members[rank].ability = joined.ability
            if first_difference(mine, joined.digests) is not None:
                doubtful[rank] = self.members[rank].hello
        if doubtful:  # copies have different times, so samples of the weights decide
            for rank in doubtful:
                self.channel.send(rank, AskContents())
            mine = content_digests(config, family)
            for rank, contents in self._answers(Contents, list(doubtful)):
                check_models(mine, contents.digests, self.hello, doubtful[rank], config)
        for rank, placement in zip(ranks, placements, strict=True):
            hello = self.members[rank].hello
            self.log.event(
                "joined",
                f"{hello.name} (process {hello.pid}) joins: {placement.threads} threads, "
                f"GPUs {placement.visible_devices or 'as given'}; {log_path(rank)}",
                worker=rank,
                node=hello.place.node,
            )

    def _answers(self, kind: type[A], ranks: Sequence[int]) -> Iterable[tuple[int, A]]:
        """Yields one message of this kind from each rank, as they arrive.

        Raises:
            StoppedEarly: a rank does not answer, or a signal came.
        """
        missing, began, note_after_s = set(ranks), time.monotonic(), NOTE_EVERY_S
        what = kind.__name__.lower()
        while missing:
            found = self.receive()
            if found is not None:
                rank, message = found
                assert isinstance(message, kind), message
                missing.discard(rank)
                yield rank, message
                continue
            if self.stop.is_set():
                raise self.stop.error()
            waited_s = time.monotonic() - began
            if waited_s > ANSWER_LIMIT_S:
                names = self._names(missing)
                raise StoppedEarly(f"No answer ({what}) within {waited_s:.0f} s from {names}.")
            if waited_s > note_after_s:
                note_after_s += NOTE_EVERY_S
                who = f"{len(missing)} of {len(ranks)} ranks: {self._names(missing)}"
                self.say(f"Waiting for {who} ({what}, {waited_s:.0f} s).")
            time.sleep(SHORTEST_S)

    def _names(self, ranks: Iterable[int]) -> str:
        """The names of the first few ranks, for people."""
        return ", ".join(
            self.members[rank].hello.name if rank in self.members else f"rank {rank}"
            for rank in sorted(ranks)[:8]
        )

    def _error(self, rank: int, failed: Failed) -> GptailorError:
        """What ended a worker as an error of ours; reports it on standard error or in the log."""
        member = self.members.get(rank)
        name = f"rank {rank}" if member is None else member.hello.name
        if failed.trace:
            self.say(f"{name} ended with:\n{failed.trace.rstrip()}")
        else:
            self.log.say(f"{name}: {failed.text}")
        return failed.error(name, log_path(rank))

    def _has_ended(self) -> bool:
        return len(self._left) == self.channel.size - 1

    def _log_times(self) -> None:
        for rank, member in self.members.items():
            times = member.times
            if times is not None and times.gaps:
                self.log.event(
                    "times",
                    f"Rank {rank}: {times.busy_s:.1f} s in jobs, "
                    f"{times.idle_s / times.gaps * 1000:.1f} ms between two of them.",
                    worker=rank,
                    busy_s=times.busy_s,
                    idle_s=times.idle_s,
                    gaps=times.gaps,
                )
