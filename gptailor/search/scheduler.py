"""The scheduler: gives jobs to free workers until there are none left.

It decides which worker gets which job, and nothing else: it asks for jobs, tells their results, and
waits only inside the executor, which may be a simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gptailor.evaluation.outcome import Outcome
from gptailor.execution.executor import EvaluationJob, Executor, Finished, Job
from gptailor.execution.stop import Stop
from gptailor.recipe import Layer, Merge, Recipe

POLL_S = 1.0
"""How often the scheduler wakes up for signals, other islands and the job's record, in seconds."""

NUM_COMPARED = 32
"""Only the first this many free workers are compared: 1000 workers × 1000 jobs would take long."""

Ask = Callable[[int], Sequence[Job]]
Tell = Callable[[Sequence[Finished]], None]


@dataclass(frozen=True)
class Running:
    """A job on a worker.

    Attributes:
        job: the job.
        began: when it began, in seconds on the executor's clock.
    """

    job: Job
    began: float


class Scheduler:
    """Keeps the workers of an executor busy.

    Args:
        executor: the workers.
        stop: once set, nothing new starts, and running jobs are waited for as long as it allows.
        tick: called at least every `POLL_S` seconds.

    Attributes:
        running: worker → its current job.
    """

    def __init__(
        self, executor: Executor, stop: Stop, tick: Callable[[], None] = lambda: None
    ) -> None:
        self.executor = executor
        self.running: dict[int, Running] = {}
        self._stop = stop
        self._tick = tick
        self._held: dict[int, _Held] = {}
        self._expected: dict[str, _Line] = {}

    def run(self, ask: Ask, tell: Tell) -> None:
        """Works until there are no more jobs and nothing runs.

        Args:
            ask: gives at most this many jobs to start now; fewer, or none, if there are no more or
                if further ones depend on what is running.
            tell: takes finished jobs as soon as they end.

        Raises:
            StoppedEarly: the search was asked to stop; `Requeue` and `Interrupted` say how.
        """
        while True:
            is_late = False  # no worker is there yet, so nothing could be asked
            if not self._stop.is_set():
                free = list(self.executor.free())
                is_late = not free
                self._fill(ask, free)
            self._tick()  # now that every free worker has its next job
            if not self.running and not is_late:
                break
            if self._stop.is_set() and self._stop.seconds_left <= 0:
                break
            self._collect(tell)
        if self._stop.is_set():
            raise self._stop.error()

    def more_is_longer(self, documents: str) -> bool:
        """Whether recipes with more layers take longer on these documents, as far as known."""
        line = self._expected.get(documents)
        return line is None or line.slope >= 0

    def _fill(self, ask: Ask, free: list[int]) -> None:
        jobs = list(ask(len(free))) if free else []
        for job in jobs:
            worker = self._nearest(job, free)
            free.remove(worker)
            self.running[worker] = Running(job, self.executor.now())
            self.executor.start(worker, job)
            if isinstance(job, EvaluationJob):
                self._held.setdefault(worker, _Held()).add(job.recipe)

    def _nearest(self, job: Job, free: Sequence[int]) -> int:
        """The free worker that already holds the most of a recipe."""
        if not isinstance(job, EvaluationJob):
            return free[0]
        near, most = free[0], 0
        for worker in free[:NUM_COMPARED]:
            shared = self._held[worker].shared(job.recipe) if worker in self._held else 0
            if shared > most:
                near, most = worker, shared
        return near

    def _collect(self, tell: Tell) -> None:
        finished = self.executor.finished(min(POLL_S, self._stop.seconds_left))
        for one in finished:
            self.running.pop(one.worker, None)
            if isinstance(one.job, EvaluationJob) and isinstance(one.result, Outcome):
                line = self._expected.setdefault(one.job.documents, _Line())
                line.add(one.job.recipe.num_layers, one.result.cost.seconds)
        if finished:
            tell(finished)


@dataclass
class _Held:
    """What a worker has in memory, judging by its last recipes."""

    last: tuple[Layer, ...] = ()
    merged: dict[Layer, None] = field(default_factory=dict)

    def add(self, recipe: Recipe) -> None:
        self.last = recipe.layers
        for layer in recipe.layers:
            if isinstance(layer, Merge):
                self.merged.pop(layer, None)
                self.merged[layer] = None
        for layer in list(self.merged)[: -2 * max(recipe.num_layers, 1)]:  # the oldest
            del self.merged[layer]

    def shared(self, recipe: Recipe) -> int:
        """Number of leading layers shared with the last recipe, plus merges already made."""
        prefix = 0
        for mine, other in zip(self.last, recipe.layers, strict=False):
            if mine != other:
                break
            prefix += 1
        return prefix + sum(layer in self.merged for layer in recipe.layers[prefix:])


@dataclass
class _Line:
    """The slope b of y = a + b·x by least squares, from sums."""

    n: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.n += 1
        self.x += x
        self.y += y
        self.xx += x * x
        self.xy += x * y

    @property
    def slope(self) -> float:
        spread = self.n * self.xx - self.x * self.x
        return (self.n * self.xy - self.x * self.y) / spread if spread > 0 else 0.0
