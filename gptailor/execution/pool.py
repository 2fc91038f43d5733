"""Evaluation in a few worker processes of this machine."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from gptailor.config import Config
from gptailor.errors import GptailorError, StoppedEarly
from gptailor.evaluation.forward_dtype import Ability, find_ability
from gptailor.evaluation.outcome import Outcome
from gptailor.evaluation.similarity import Similarity
from gptailor.execution.executor import Finished, Job, WorkloadInfo
from gptailor.execution.node.files import open_candidates
from gptailor.execution.worker import Worker, without_garbage_collection, without_process_locks

WORDS_BYTES = 200
"""Size of the shared memory for a worker's progress message."""

WORDS_S = 0.5

LEAVE_S = 3.0
"""How long workers without a job may take to leave."""

T = TypeVar("T")


class LocalPool:
    """Several worker processes on this machine, each with its share of the cores.

    Args:
        config: the search.
        num_workers: how many processes.
        io, stage: as for `open_candidates`.

    Raises:
        StoppedEarly: a worker died (killed, or out of memory); everything evaluated is kept.
    """

    def __init__(
        self,
        config: Config,
        num_workers: int,
        *,
        io: str | None = None,
        stage: str | None = None,
    ) -> None:
        self.num_workers = num_workers
        self._config = config
        self._io, self._stage = io, stage
        threads = max(len(os.sched_getaffinity(0)) // num_workers, 1)
        others = multiprocessing.active_children()
        context = multiprocessing.get_context("spawn")
        self._words = [context.RawArray(ctypes.c_char, WORDS_BYTES) for _ in range(num_workers)]
        self._pools = [  # a pool per worker, so that a job can be given to a certain worker
            ProcessPoolExecutor(
                1,
                mp_context=context,
                initializer=_start_worker,
                initargs=(threads, words),
            )
            for words in self._words
        ]
        device = config.evaluation.device
        self._abilities = [pool.submit(_ability, device) for pool in self._pools]
        self._begun: list[Future[WorkloadInfo]] = []
        self._processes = [p for p in multiprocessing.active_children() if p not in others]
        self._running: dict[Future[Outcome | Similarity], tuple[int, Job]] = {}

    def abilities(self) -> Sequence[Ability]:
        """What this machine can do, as found by each worker."""
        return [self._result(future) for future in self._abilities]

    def load(self, dtype: str) -> None:
        """Has the workers load candidates and tasks."""
        config = self._config.computed_in(dtype)
        self._begun = [
            pool.submit(_load, config, self.num_workers, self._io, self._stage)
            for pool in self._pools
        ]

    def workload(self) -> WorkloadInfo:
        """What will be evaluated; waits for the first worker."""
        return self._result(self._begun[0])

    def free(self) -> Sequence[int]:
        """The workers without a job."""
        busy = {worker for worker, _ in self._running.values()}
        return [worker for worker in range(self.num_workers) if worker not in busy]

    def start(self, worker: int, job: Job) -> None:
        """Sends a job to a worker's process."""
        future = self._submit(worker, _do, job)
        self._running[future] = (worker, job)

    def finished(self, timeout_s: float) -> list[Finished]:
        """The jobs that ended."""
        done, _ = wait(self._running, min(timeout_s, 1e6), FIRST_COMPLETED)
        good = [future for future in done if future.exception() is None]
        found = []
        for future in sorted(good or done, key=lambda f: self._running[f][0]):
            worker, job = self._running.pop(future)  # a failed one stays for the next call
            found.append(Finished(worker, job, self._result(future)))
        return found

    def words(self) -> Mapping[int, str]:
        """The workers' progress messages."""
        found = (bytes(words.value).decode(errors="replace") for words in self._words)
        return {worker: text for worker, text in enumerate(found) if text}

    def now(self) -> float:
        """Seconds of the machine's monotonic clock."""
        return time.monotonic()

    def close(self) -> None:
        """Ends the workers: idle ones exit cleanly, busy ones are terminated."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        begun = [f.done() for f in self._abilities] + [f.done() for f in self._begun]
        is_idle = not self._running and all(begun)
        deadline = time.monotonic() + (LEAVE_S if is_idle else 0.0)
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0.0))
            process.terminate()
            process.join()

    def _submit(
        self, worker: int, what: Callable[[Job], Outcome | Similarity], job: Job
    ) -> Future[Outcome | Similarity]:
        try:
            return self._pools[worker].submit(what, job)
        except BrokenProcessPool as error:
            raise _worker_died() from error

    @staticmethod
    def _result(future: Future[T]) -> T:
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise _worker_died() from error


def _worker_died() -> StoppedEarly:
    return StoppedEarly(
        "A worker process died (killed, or out of memory): everything evaluated is kept, "
        "and the same command with --resume continues."
    )


_worker: Worker
"""The worker of this process."""

_words: Any
"""The shared memory for this process's progress message."""

_said_at = float("-inf")

_trouble: Exception | None = None
"""Why this process can't be a worker."""


def _start_worker(threads: int, words: Any) -> None:
    """Never raises: an exception here would break the pool, and its reason would be lost."""
    global _trouble, _words  # noqa: PLW0603  (a pool's process has no other place for its state)
    _words = words
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm sends it to all processes of a step
    try:
        with without_garbage_collection():
            import torch

            without_process_locks()
        torch.set_num_threads(threads)
    except Exception as error:
        _trouble = error


def _ability(device: str) -> Ability:
    if _trouble is not None:
        raise _trouble
    return find_ability(device)


def _load(config: Config, num_workers: int, io: str | None, stage: str | None) -> WorkloadInfo:
    global _worker  # noqa: PLW0603
    with _portable_errors(), without_garbage_collection():
        family = open_candidates(config, workers_here=num_workers, io=io, stage=stage, says=_say)
        _worker = Worker(config, family, num_workers, _say)
        _worker.beat = _beat
        return _worker.workload()


def _do(job: Job) -> Outcome | Similarity:
    with _portable_errors():
        return _worker.do(job)


@contextmanager
def _portable_errors() -> Iterator[None]:
    """Converts errors of libraries so that they arrive: many can't be unpickled, and a pool that
    can't read what its worker raised reports that the worker died."""
    try:
        yield
    except Exception as error:
        if type(error).__module__ in ("builtins", GptailorError.__module__):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    finally:
        _say("")


def _say(text: str) -> None:
    _words.value = text.encode()[: WORDS_BYTES - 1]


def _beat() -> None:
    global _said_at  # noqa: PLW0603
    if time.monotonic() - _said_at >= WORDS_S:
        _said_at = time.monotonic()
        _say(_worker.words())
