"""The ranks other than 0: they answer rank 0's messages one after the other until it sends `Leave`.

A worker never decides that a search is over. SIGUSR2 is meant for rank 0, to which Slurm also sends
it; after SIGTERM or SIGINT a worker waits briefly for rank 0's message, then leaves without it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from gptailor.errors import UsageError
from gptailor.evaluation.forward_dtype import find_ability
from gptailor.evaluation.outcome import Outcome
from gptailor.execution.executor import (
    EvaluationJob,
    Job,
    SimilarityJob,
    WorkloadInfo,
    job_name,
)
from gptailor.execution.logs import Log
from gptailor.execution.mpi.channel import SHORTEST_S, Channel
from gptailor.execution.mpi.handshake import content_digests, file_digests, find_hello, sees_token
from gptailor.execution.mpi.messages import (
    AskClock,
    AskContents,
    Clock,
    Contents,
    Done,
    Failed,
    Joined,
    Leave,
    Left,
    Load,
    Message,
    Orders,
    Ready,
    StartJob,
    Times,
    Words,
)
from gptailor.execution.node.placement import find_place
from gptailor.execution.stop import TERM_GRACE_S, Stop
from gptailor.execution.worker import Worker, without_garbage_collection, without_process_locks
from gptailor.exit_codes import BUG, of_signal
from gptailor.patience import EVERY_OF_LONG_S, EVERY_S, Patience, Say

if TYPE_CHECKING:
    from gptailor.evaluation.similarity import Similarity
    from gptailor.models.family import Family

LONGEST_S = 0.02
"""The longest pause between two polls, reached after a while without messages."""

WORDS_S = 5.0
"""How often a job's progress is sent to rank 0."""

_QUICK_S = 0.2
"""How long a worker polls often: the next job follows soon after a result."""

_WORD_S = TERM_GRACE_S + 5.0
"""How long after a signal a worker waits for rank 0, which itself waits for running jobs."""


class Evaluates(Protocol):
    """Does the jobs of a rank; `execution.worker.Worker` in a search."""

    def workload(self) -> WorkloadInfo:
        """What will be evaluated."""
        ...

    beat: Callable[[], None]
    """A function to set, which is called regularly during a job."""

    def do(self, job: Job) -> Outcome | Similarity:
        """Does a job; what it raises ends the search."""
        ...

    def words(self) -> str:
        """The job's progress; empty if unknown."""
        ...


Opens = Callable[[Orders, Callable[[], None], Log, Say], tuple[Evaluates, str]]
"""Takes the orders, a function to call regularly, which raises if loading should end, the log, and
a function for progress messages; returns what does the jobs, and the name of its device."""


def open_worker(
    orders: Orders, go_on: Callable[[], None], log: Log, says: Say
) -> tuple[Evaluates, str]:
    """Loads models and documents; this is where torch is imported."""
    import torch

    from gptailor.execution.node.files import open_candidates

    without_process_locks()
    placement = orders.placement
    if not os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        torch.set_num_threads(placement.threads)
    go_on()
    family = open_candidates(
        orders.config,
        workers_here=placement.workers_here,
        io=orders.io,
        stage=orders.stage,
        keep_going=go_on,
        note=log.say,
        says=says,
    )
    worker = Worker(orders.config, family, placement.sharing, says)
    device = str(worker.evaluator.resident.device)
    if device.startswith("cuda") and placement.visible_devices is not None:
        device = f"cuda:{placement.visible_devices}"
    return worker, device


def run_worker(channel: Channel, opens: Opens = open_worker) -> NoReturn:
    """Works on a search until rank 0 ends it.

    Side effect: ends the process. An error is reported to rank 0 or ends all ranks.
    """
    try:
        code = MpiWorker(channel, opens).run()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        channel.abort(BUG)
    if code != 0:
        os._exit(code)  # MPI was not finalized and would wait for the other ranks
    sys.exit(0)  # not _exit: MPICH disconnects from its launcher in a handler of exit()


class MpiWorker:
    """A rank that evaluates.

    Args:
        channel: to rank 0.
        opens: opens what does the jobs.
    """

    def __init__(self, channel: Channel, opens: Opens = open_worker) -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._stop = Stop()
        self._stop.install(signal.SIGTERM, signal.SIGINT)
        self._channel = channel
        self._opens = opens
        self._place = find_place()
        self._log = Log(channel.rank, self._place.node)
        self._orders: Orders | None = None
        self._family: Family | None = None
        self._worker: Evaluates | None = None
        self._times = Times()
        self._words, self._words_at = "", float("-inf")
        self._patience = Patience(self._log.say)
        self._sent_at: float | None = None

    def run(self) -> int:
        """Answers messages until the end; returns the exit code."""
        with self._patience:
            return self._run()

    def _run(self) -> int:
        self._channel.send(0, find_hello(self._channel.rank, self._place))
        while True:
            message = self._next()
            if message is None:
                assert self._stop.signal is not None
                self._log.say("Leaving, as rank 0 sends nothing after a signal.")
                return of_signal(self._stop.signal)
            if isinstance(message, Leave):
                break
            try:
                self._answer(message)
            except _ToldToStop:
                break
            except BaseException as error:  # even a library's sys.exit() is reported to rank 0
                self._report(error)
        self._channel.send(0, Left(self._times))
        if not self._channel.flush(_WORD_S):
            return BUG
        self._log.say("Leaving.")
        self._log.close()
        self._channel.finalize()
        return 0

    def _next(self) -> Message | None:
        """The next message; None when it is time to leave without one."""
        pause, began = SHORTEST_S, time.monotonic()
        while True:
            found = self._channel.receive()
            if found is not None:
                return found[1]
            if self._stop.is_set() and time.time() - self._stop.came_at > _WORD_S:
                return None
            if time.monotonic() - began > _QUICK_S:
                pause = min(1.2 * pause, LONGEST_S)
            time.sleep(pause)

    def _answer(self, message: Message) -> None:
        match message:
            case AskClock():
                self._channel.send(0, Clock(time.time()))
            case Orders():
                self._channel.send(0, self._join(message))
            case AskContents():
                assert self._orders is not None
                assert self._family is not None
                digests = content_digests(self._orders.config, self._family)
                self._channel.send(0, Contents(digests))
            case Load(dtype):
                self._load(dtype)
            case StartJob(job):
                self._do(job)
            case _:
                raise AssertionError(f"{message} from rank 0")

    def _join(self, orders: Orders) -> Joined:
        """Joins the run."""
        from gptailor.evaluation.family import open_family

        self._orders = orders
        if not sees_token(Path(orders.run_folder, orders.token)):
            raise UsageError(
                f"The run folder {orders.run_folder} is not shared: a file that "
                f"{orders.first_node} writes there is not visible on {self._place.node}. Use an "
                "output on a file system that all nodes have."
            )
        self._log.open(orders.run_folder, as_json=orders.log_json)
        placement = orders.placement
        self._log.event(
            "start",
            f"Rank {self._channel.rank} on {self._place.node}, process {os.getpid()}: "
            f"{placement.threads} threads, cpus {placement.cpus or 'as given'}, "
            f"GPUs {placement.visible_devices or 'as given'}.",
        )
        self._log.take_output()
        if placement.cpus is not None:
            try:
                os.sched_setaffinity(0, placement.cpus)
            except OSError as error:  # a container may forbid it; the worker is only slower
                self._log.say(f"The process can't be bound to its cores: {error.strerror}.")
        if placement.visible_devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = placement.visible_devices
        self._family = open_family(orders.config.models, orders.config.base, orders.io)
        ability = find_ability(orders.config.evaluation.device)
        return Joined(file_digests(orders.config, self._family), ability)

    def _load(self, dtype: str) -> None:
        assert self._orders is not None
        self._orders = replace(self._orders, config=self._orders.config.computed_in(dtype))
        began = time.monotonic()
        step = self._patience.step("Starting", lambda: self._words)
        with step, without_garbage_collection():
            self._worker, device = self._opens(self._orders, self._go_on, self._log, self._says)
        self._worker.beat = self._beat
        self._channel.send(0, Ready(self._worker.workload(), device))
        seconds = time.monotonic() - began
        self._log.event("ready", f"Ready on {device} after {seconds:.1f} s.", seconds=seconds)

    def _says(self, text: str) -> None:
        """Sends a progress message to rank 0 if it is a new step, or from time to time."""
        is_new = text.partition(",")[0] != self._words.partition(",")[0]
        self._words = text
        now = time.monotonic()
        if is_new or now - self._words_at >= WORDS_S:
            self._words_at = now
            self._channel.send(0, Words(text))

    def _beat(self) -> None:
        if time.monotonic() - self._words_at >= WORDS_S:
            assert self._worker is not None
            self._says(self._worker.words())

    def _go_on(self) -> None:
        """Raises if rank 0 has ended the search meanwhile; no other message can arrive before a
        worker is ready."""
        if self._channel.receive() is not None:
            raise _ToldToStop

    def _do(self, job: Job) -> None:
        assert self._worker is not None
        began = time.monotonic()
        if self._sent_at is not None:
            self._times.idle_s += began - self._sent_at
            self._times.gaps += 1
        self._words, self._words_at = "", began  # a quick job sends no progress
        what, every_s = f"Evaluating {job_name(job)}", EVERY_OF_LONG_S
        if isinstance(job, SimilarityJob):
            what, every_s = f"Measuring the {job_name(job)}", EVERY_S
            self._log.say(f"{what}.")
        with self._patience.step(what, self._worker.words, every_s):
            result = self._worker.do(job)
        self._sent_at = time.monotonic()
        self._channel.send(0, Done(result))
        seconds = self._sent_at - began
        self._times.busy_s += seconds
        self._say_done(job, result, seconds)

    def _say_done(self, job: Job, result: object, seconds: float) -> None:
        what, how = job_name(job), "measured"
        if isinstance(job, EvaluationJob) and isinstance(result, Outcome):
            what, how = job.recipe.point, result.status
            if result.accuracy is not None:
                how = f"{how}, accuracy {result.accuracy:.4f}"
            elif result.reason:
                how = f"{how}: {result.reason.strip()}"
        self._log.event("done", f"{what}: {how} in {seconds:.2f} s", job=what, seconds=seconds)

    def _report(self, error: BaseException) -> None:
        """Reports an error to rank 0, which ends the search; only a bug has a traceback."""
        message = Failed.by(error)
        self._log.event("error", message.trace.strip() or message.text)
        self._channel.send(0, message)


class _ToldToStop(Exception):
    """Rank 0 ended the search while this rank was still preparing for it."""
