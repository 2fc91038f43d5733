"""Workers in virtual time: an executor for the real scheduler, search and archive.

Each island has its own clock, which jumps from event to event. While rank 0 computes (everything
outside this file), its processor time is measured and the clock advances by as much, so a rank 0
that is too slow leaves workers waiting here as it would in reality.
"""

from __future__ import annotations

import heapq
import threading
import time
from array import array
from collections.abc import Sequence

import numpy as np
from landscape import NUM_LAYERS, Landscape, chance

from gptailor.evaluation.forward_dtype import Ability
from gptailor.evaluation.similarity import Similarity
from gptailor.execution.executor import EvaluationJob, Finished, Job, WorkloadInfo

MEAN_S = 60.0

PROBABILITIES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)

TIMES = {
    # examples/smollm2/search.yaml on two cores, 2026-11-22, columns `cost` and `recipe` of the
    # archives: seconds = a + b · layers by least squares, and the quantiles, at PROBABILITIES, of
    # the evaluations' times divided by that line.
    # The first 137 evaluations, with little else on the machine; mean 1.71 s.
    "quiet": (0.321, 0.0560, (0.768, 0.811, 0.825, 0.875, 0.906, 0.932, 0.955, 0.996, 1.027, 1.089,
                              1.233, 1.354, 1.616, 1.741)),
    # The whole run of 600 in the example's README, on cores that other programs kept busy; 2.94 s.
    "shared": (2.098, 0.0332, (0.414, 0.502, 0.528, 0.577, 0.615, 0.655, 0.694, 0.749, 0.834, 0.999,
                               1.710, 2.254, 7.001, 15.315)),
}  # fmt: skip
MEAN_LAYERS = 25.0

READY_S = (30.0, 60.0)
"""Assumed time from a step's launch until a worker is ready (imports and reading the first
candidate), uniformly distributed. (Measured with three ranks on two cores: 7 s for the imports.)"""

SIMILARITY_S = 60.0
"""Assumed to be as long as an evaluation."""

MESSAGE_S = 0.0003
"""Time that rank 0 takes to send a job and receive its result; measured with mpi4py: 3,000 to 4,000
jobs a second."""

PAUSE_S = 0.005
"""Time between two polls of the network."""


class StepDied(Exception):
    """A node was lost, and the MPI program with it."""


class Turns:
    """Lets only the island whose clock is furthest behind run; each runs in its own thread."""

    def __init__(self, count: int) -> None:
        self._next = [0.0] * count
        self._turn = threading.Condition()

    def until(self, island: int, moment: float) -> None:
        """Waits until no other island has anything to do before `moment` (infinite: leaves)."""
        with self._turn:
            self._next[island] = moment
            self._turn.notify_all()
            while min(self._next) < moment < float("inf"):
                self._turn.wait()


class Clock:
    """An island's virtual time, and its rank 0's share of it.

    Attributes:
        now: seconds since the launch.
        rank0_s: processor time of rank 0 so far, messages included.
    """

    def __init__(self, turns: Turns, island: int, *, slowness: float = 1.0) -> None:
        self.now = 0.0
        self.rank0_s = 0.0
        self.slowness = slowness
        self._turns, self._island = turns, island
        self._left_at = time.thread_time()

    def enter(self) -> None:
        """Rank 0 stops computing."""
        self.think(time.thread_time() - self._left_at)

    def leave(self) -> None:
        """Rank 0 continues computing."""
        self._left_at = time.thread_time()

    def think(self, seconds: float) -> None:
        """Lets time pass while rank 0 is busy."""
        self.rank0_s += seconds
        self.now += seconds * self.slowness

    def wait_until(self, moment: float) -> None:
        """Lets time pass while rank 0 sleeps."""
        self._turns.until(self._island, moment)
        self.now = max(self.now, moment)

    def close(self) -> None:
        """Stops other islands from waiting for this one."""
        self._turns.until(self._island, float("inf"))


class Log:
    """A record of all evaluations.

    Attributes:
        began, ended, accuracy, layers: an entry for each evaluation; times are in seconds since the
            launch.
        useful_s: seconds of workers in evaluations that were not lost.
        lost_s: seconds of workers in evaluations that were lost.
    """

    def __init__(self) -> None:
        self.ended, self.began = array("d"), array("d")
        self.accuracy, self.layers = array("d"), array("d")
        self.useful_s = self.lost_s = 0.0


class VirtualCluster:
    """One MPI program's workers.

    Args:
        clock: the island's clock.
        num_workers: the number of workers; each gets a new start-up time.
        times: a key of `TIMES`.
        log: the record to write to.
        landscape: scores recipes.
        dies_at: when a node is lost; infinite for never.
    """

    def __init__(
        self,
        clock: Clock,
        num_workers: int,
        times: str,
        log: Log,
        landscape: Landscape,
        dies_at: float = float("inf"),
    ) -> None:
        self.num_workers = num_workers
        self._clock, self._log, self._landscape = clock, log, landscape
        self._a, self._b, self._ratios = TIMES[times]
        self._unit = MEAN_S / (self._a + self._b * MEAN_LAYERS)
        self._dies_at = dies_at
        self._running: dict[int, tuple[Job, float]] = {}
        self._free: dict[int, None] = {}
        low, high = READY_S
        self._events = [
            (clock.now + low + (high - low) * chance(f"{clock.now} {worker}"), worker)
            for worker in range(num_workers)
        ]
        heapq.heapify(self._events)
        clock.leave()

    def seconds(self, job: Job) -> float:
        """How long a job takes."""
        if not isinstance(job, EvaluationJob):
            return SIMILARITY_S
        ratio = np.interp(chance(f"time {job.recipe.hash}"), PROBABILITIES, self._ratios)
        return float(ratio) * self._unit * (self._a + self._b * job.recipe.num_layers)

    def abilities(self) -> Sequence[Ability]:
        return [Ability("virtual", "cuda", (), 1 << 40)] * self.num_workers

    def load(self, dtype: str) -> None:
        pass

    def words(self) -> dict[int, str]:
        return {}

    def workload(self) -> WorkloadInfo:
        while not self._free:
            self.finished(PAUSE_S)
        return WorkloadInfo({"search": 240}, "virtual")

    def free(self) -> Sequence[int]:
        self._clock.enter()
        found = sorted(self._free)
        self._clock.leave()
        return found

    def start(self, worker: int, job: Job) -> None:
        self._clock.enter()
        self._clock.think(MESSAGE_S)
        del self._free[worker]
        self._running[worker] = job, self._clock.now
        heapq.heappush(self._events, (self._clock.now + self.seconds(job), worker))
        self._clock.leave()

    def finished(self, timeout_s: float) -> list[Finished]:
        self._clock.enter()
        try:
            return self._finished(self._clock.now + timeout_s)
        finally:
            self._clock.leave()

    def now(self) -> float:
        return self._clock.now

    def close(self) -> None:
        self._clock.enter()

    def _finished(self, deadline: float) -> list[Finished]:
        moment = min(self._events[0][0] if self._events else deadline, deadline, self._dies_at)
        self._clock.wait_until(moment)
        if self._clock.now >= self._dies_at:
            self._log.lost_s += sum(self._dies_at - began for _, began in self._running.values())
            raise StepDied
        if self._clock.now < deadline:
            self._clock.wait_until(self._clock.now + PAUSE_S / 2)
        found = []
        while self._events and self._events[0][0] <= self._clock.now:
            ended, worker = heapq.heappop(self._events)
            self._free[worker] = None
            if worker in self._running:
                found.append(self._result(worker, ended))
        return found

    def _result(self, worker: int, ended: float) -> Finished:
        job, began = self._running.pop(worker)
        self._log.useful_s += ended - began
        if not isinstance(job, EvaluationJob):
            return Finished(worker, job, similarity(job.model))
        outcome = self._landscape.outcome(job.recipe, ended - began)
        assert outcome.accuracy is not None
        self._log.ended.append(ended)
        self._log.began.append(began)
        self._log.accuracy.append(outcome.accuracy)
        self._log.layers.append(job.recipe.num_layers)
        return Finished(worker, job, outcome)


def similarity(model: str) -> Similarity:
    """The similarities of a made-up model, in which later layers change less."""
    n = NUM_LAYERS
    influence = tuple(1 / (i + 2) + 0.1 * chance(f"influence {model} {i}") for i in range(n))
    angular = tuple(
        tuple(abs(i - j) / (n + 1) * (1.5 - max(i, j) / n) for j in range(n + 1))
        for i in range(n + 1)
    )
    return Similarity(influence, angular)
