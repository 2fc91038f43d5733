"""Islands without models: real archives and journals, but a formula scores the recipes."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gptailor.config import Config, parse_config
from gptailor.evaluation.outcome import Cost, Evaluation, Outcome
from gptailor.execution.executor import EvaluationJob, Finished, Job
from gptailor.recipe import Recipe, Take
from gptailor.run.archive import Archive
from gptailor.run.folder import RunData
from gptailor.run.island_folder import island_folder
from gptailor.search.island_peers import IslandPeers
from gptailor.search.progress import Progress
from gptailor.search.run import Run
from gptailor.verbs.runs import worth_a_holdout
from tests.search.helpers import MODELS, synthetic
from tests.search.simulated import Unloaded, family_of, similarity

NUM_LAYERS = 8


def make_config(**search: object) -> Config:
    data = {
        "models": MODELS,
        "base": "base",
        "space": {"layers": {"min": 3}, "merge": {"methods": ["linear", "ties"]}},
        "evaluation": {"tasks": ["t"], "holdout": {"tasks": ["h"]}},
        "search": {"population": 12, "evaluations": 60, **search},
        "output": "run",
    }
    return parse_config(data, "test")


def open_archive(run: Path, island: int, searched: Config, /, **meta: str) -> Archive:
    """An island's archive, in the state in which `check_resumable` leaves it."""
    archive = Archive(island_folder(run, island))
    family = {"num_layers": NUM_LAYERS, "models": MODELS, "parameters": dict.fromkeys(MODELS, 1000)}
    values = {
        "config": searched.model_dump_json(),
        "fingerprint": "{}",
        "documents": "d",
        "family": json.dumps(family),
    }
    for key, value in {**values, **meta}.items():
        archive.set_meta(key, value)
    return archive


def recipe_of(*layers: int, model: str = "red") -> Recipe:
    return Recipe(MODELS, "base", tuple(Take(model, i) for i in layers), "base", "base")


def outcome(accuracy: float = 0.5, seconds: float = 1.0) -> Outcome:
    return Outcome("ok", accuracy, (), "", Cost(seconds=seconds))


class Sleeper(Unloaded):
    """Workers that sleep instead of evaluating; one dies after `fails_at` jobs, if given."""

    def __init__(self, num_workers: int, seconds: float, fails_at: int | None = None) -> None:
        self.num_workers = num_workers
        self.done: list[Job] = []
        self._seconds = seconds
        self._fails_at = fails_at
        self._running: dict[int, tuple[float, Job]] = {}

    def free(self) -> Sequence[int]:
        return [w for w in range(self.num_workers) if w not in self._running]

    def start(self, worker: int, job: Job) -> None:
        layers = job.recipe.num_layers if isinstance(job, EvaluationJob) else NUM_LAYERS
        seconds = self._seconds * layers / NUM_LAYERS
        self._running[worker] = (time.monotonic() + seconds, job)

    def finished(self, timeout_s: float) -> list[Finished]:
        if not self._running:
            return []
        worker, (ends, job) = min(self._running.items(), key=lambda item: item[1][0])
        time.sleep(max(min(ends - time.monotonic(), timeout_s), 0.0))
        if ends > time.monotonic():
            return []
        if self._fails_at is not None and len(self.done) >= self._fails_at:
            raise Lost
        del self._running[worker]
        self.done.append(job)
        if isinstance(job, EvaluationJob):
            return [Finished(worker, job, synthetic(job.recipe))]
        return [Finished(worker, job, similarity(NUM_LAYERS, 0.0))]

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        pass


class Lost(Exception):
    """Raised where an island dies."""


def search(
    run: Path,
    island: int,
    count: int,
    executor: Sleeper,
    config: Config,
    *,
    dies: bool = False,
    ready: Callable[[], object] = lambda: None,
) -> None:
    """What `gptailor search --island` does, without models; `ready` is called before it begins."""
    with open_archive(run, island, config) as archive:
        others = IslandPeers(run, island, count, archive)
        ready()
        progress = Progress(config.search.evaluations, NUM_LAYERS, stream=io.StringIO())
        try:
            made = Run(config, family_of(NUM_LAYERS), archive, executor, progress, peers=others)
            made.search()
            made.holdout([e.recipe for e in worth_a_holdout(made.evaluations("search"))])
        except Lost:
            assert dies
            return  # without notice to the others, like kill -9
        with others:
            pass


def in_threads(*calls: Callable[[], None]) -> None:
    """Makes all calls at the same time, and raises the first error."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def paid_twice(data: RunData) -> list[Evaluation]:
    """Repeated evaluations of the same recipe on the same documents, without the first of each."""
    seen: set[tuple[str, str]] = set()
    twice = []
    for e in sorted(data.paid, key=lambda e: e.finished_at):
        if (e.recipe.hash, e.documents) in seen:
            twice.append(e)
        seen.add((e.recipe.hash, e.documents))
    return twice
