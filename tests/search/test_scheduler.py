"""The scheduler in simulated time: each job once, no worker idle needlessly, a clean stop."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import pytest

from gptailor.errors import Interrupted, Requeue
from gptailor.execution.executor import EvaluationJob, Finished, Job
from gptailor.execution.stop import Stop
from gptailor.recipe import Merge, Recipe, Take
from gptailor.search.scheduler import Ask, Scheduler, Tell
from gptailor.search.space import SearchSpace
from tests.search.helpers import make_space
from tests.search.simulated import Simulated

SPACE = make_space()


def job(num_layers: int, model: str = "base", space: SearchSpace = SPACE) -> EvaluationJob:
    return EvaluationJob(space.recipe([Take(model, i) for i in range(num_layers)]), "search")


def simulated(num_workers: int) -> Simulated:
    return Simulated(num_workers, 8, lambda job: 0.5, lambda job: float(job.recipe.num_layers))


def feed(jobs: Sequence[Job]) -> tuple[list[Finished], Ask, Tell]:
    waiting = list(jobs)
    found: list[Finished] = []

    def ask(n: int) -> Sequence[Job]:
        given, waiting[:] = waiting[:n], waiting[n:]
        return given

    return found, ask, found.extend


def test_every_job_is_done_once_and_nobody_waits() -> None:
    executor = simulated(3)
    jobs: list[Job] = [job(3 + i % 6) for i in range(30)]
    found, ask, tell = feed(jobs)
    Scheduler(executor, Stop()).run(ask, tell)
    assert sorted(id(f.job) for f in found) == sorted(id(j) for j in jobs)
    assert executor.busy_s / (3 * executor.clock) > 0.95
    assert all(began <= executor.clock for began, _, _ in executor.log)


def test_relatives_go_to_the_worker_that_holds_them() -> None:
    executor = simulated(2)
    scheduler = Scheduler(executor, Stop())
    red, base = job(8, "red"), job(8, "base")
    _, ask, tell = feed([red, base])
    scheduler.run(ask, tell)
    of = {id(j): worker for _, worker, j in executor.log}
    children: list[Job] = [job(6, "base"), job(6, "red")]
    _, ask, tell = feed(children)
    scheduler.run(ask, tell)
    of |= {id(j): worker for _, worker, j in executor.log}
    assert of[id(children[0])] == of[id(base)]
    assert of[id(children[1])] == of[id(red)]


def test_merges_made_before_count_as_held() -> None:
    executor = simulated(2)
    scheduler = Scheduler(executor, Stop())
    merged = Merge("linear", 5, (("base", 1.0), ("red", 1.0)), (("normalize", 1.0),))

    def recipe(first: str) -> Recipe:
        return SPACE.recipe([Take(first, 0), merged, Take(first, 6)])

    plain = EvaluationJob(SPACE.recipe([Take("green", i) for i in range(3)]), "search")
    _, ask, tell = feed([plain, EvaluationJob(recipe("red"), "search")])
    scheduler.run(ask, tell)
    child = EvaluationJob(recipe("blue"), "search")
    _, ask, tell = feed([child])
    scheduler.run(ask, tell)
    assert [worker for _, worker, j in executor.log if j is child] == [1]


@pytest.mark.parametrize("slope", [2.0, -0.2])
def test_durations_are_learned_from_finished_jobs(slope: float) -> None:
    executor = Simulated(1, 8, lambda job: 0.5, lambda job: 3.0 + slope * job.recipe.num_layers)
    scheduler = Scheduler(executor, Stop())
    assert scheduler.more_is_longer("search")
    _, ask, tell = feed([job(3), job(8), job(5)])
    scheduler.run(ask, tell)
    assert scheduler.more_is_longer("search") == (slope > 0)


def test_a_search_waits_for_its_first_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = simulated(2)
    late: list[list[int]] = [[], []]
    free = executor.free
    monkeypatch.setattr(executor, "free", lambda: late.pop() if late else free())
    found, ask, tell = feed([job(3)])
    Scheduler(executor, Stop()).run(ask, tell)
    assert len(found) == 1


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_stop_waits_for_running_jobs_and_starts_none(number: int) -> None:
    executor, stop = simulated(2), Stop()
    found, ask, tell = feed([job(8) for _ in range(10)])
    scheduler = Scheduler(executor, stop)

    def note(finished: Sequence[Finished]) -> None:
        tell(finished)
        stop._note(number, None)

    error = Requeue if number == signal.SIGUSR2 else Interrupted
    with pytest.raises(error):
        scheduler.run(ask, note)
    assert len(found) == len(executor.log) == 2
    assert not scheduler.running


def test_stop_does_not_wait_for_jobs_that_cannot_end_in_time() -> None:
    executor, stop = simulated(2), Stop(job_ends_at=0.0)
    found, ask, tell = feed([job(3), job(8)])
    scheduler = Scheduler(executor, stop)

    def note(finished: Sequence[Finished]) -> None:
        tell(finished)
        stop._note(signal.SIGUSR2, None)

    with pytest.raises(Requeue):
        scheduler.run(ask, note)
    assert len(found) == 1
    assert len(scheduler.running) == 1


def test_a_request_before_the_start_starts_nothing() -> None:
    executor, stop = simulated(2), Stop()
    stop._note(signal.SIGUSR2, None)
    _, ask, tell = feed([job(3)])
    with pytest.raises(Requeue):
        Scheduler(executor, stop).run(ask, tell)
    assert not executor.log
