"""Measures what distributing a search costs: messages, waiting, the archive, and idle ranks.

    mpirun -n 4 python benchmarks/dispatch.py              # all of it, about a minute
    mpirun -n 4 python benchmarks/dispatch.py --seconds 1  # evaluations of another length

Evaluations are sleeps; everything else is what a search does: the scheduler, asynchronous NSGA-II
over the demo family's headers, messages, the archive with its fsync, the job's record. All ranks
must be on one machine (processor time and memory are read from /proc).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gptailor.config import Config, read_config
from gptailor.demo import PATH
from gptailor.evaluation.outcome import Cost, Outcome, Score
from gptailor.execution.executor import EvaluationJob, Job, WorkloadInfo
from gptailor.execution.job_monitor import JobMonitor
from gptailor.execution.mpi.channel import Channel
from gptailor.execution.mpi.crew import Crew
from gptailor.execution.mpi.executor import MpiExecutor
from gptailor.execution.mpi.launcher import join
from gptailor.execution.mpi.messages import Orders
from gptailor.execution.mpi.worker import run_worker
from gptailor.execution.stop import Stop
from gptailor.models.family import Family
from gptailor.recipe import Recipe
from gptailor.run.archive import Archive
from gptailor.search.progress import Progress
from gptailor.search.run import Run
from gptailor.search.searcher import Settings
from gptailor.search.space import SearchSpace
from gptailor.search.steady_state import SteadyStateNSGA2
from gptailor.verbs.watched_run import WatchedRun

IDLE_S = 10.0


class Sleeper:
    """An evaluation that takes a fixed time, or no time for "holdout" documents."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.beat: Callable[[], None] = lambda: None

    def workload(self) -> WorkloadInfo:
        return WorkloadInfo({"search": 1}, "asleep")

    def words(self) -> str:
        return ""

    def do(self, job: Job) -> Outcome:
        assert isinstance(job, EvaluationJob)
        if job.documents == "search":
            time.sleep(self.seconds)
        value = int(job.recipe.hash[:8], 16) / 16**8
        scores = tuple(Score(f"task_{i}", "acc,none", value, 0.01, 100) for i in range(3))
        return Outcome("ok", value, scores, "", Cost(self.seconds))


def round_trips(executor: MpiExecutor, recipes: list[Recipe]) -> None:
    """Measures the time from starting a job that takes no time to having its result."""
    times = []
    for recipe in recipes:
        (worker, *_) = executor.free()
        began = executor.now()
        executor.start(worker, EvaluationJob(recipe, "holdout"))
        while not executor.finished(1.0):
            pass
        times.append((executor.now() - began) * 1000)
    times.sort()
    p95 = times[int(0.95 * len(times))]
    print(f"round trip of a job: median {statistics.median(times):.2f} ms, p95 {p95:.2f} ms")


def search(config: Config, family: Family, executor: MpiExecutor, monitor: JobMonitor) -> None:
    """Runs an asynchronous search; prints the cost of each evaluation beyond its own time."""
    with Archive(config.output) as archive, Path(os.devnull).open("w") as nowhere:
        progress = Progress(config.search.evaluations, family.num_layers, stream=nowhere)
        run = Run(
            config, family, archive, executor, progress,
            tick=lambda run: monitor.tick(WatchedRun(run)),
        )  # fmt: skip
        cpu, began = time.process_time(), time.monotonic()
        run.search()
        wall, cpu = time.monotonic() - began, time.process_time() - cpu
        costs = [e.outcome.cost.seconds for e in archive.evaluations("search")]
    lost = (wall * executor.num_workers - sum(costs)) / len(costs)
    print(
        f"search: {len(costs)} evaluations of {costs[0]:g} s by {executor.num_workers} workers in "
        f"{wall:.2f} s: {lost * 1000:.1f} ms lost for each, {sum(costs) / wall:.2f} workers busy; "
        f"rank 0 used {cpu / len(costs) * 1000:.2f} ms of its processor for each"
    )


def archive_writes(config: Config, recipes: list[Recipe], outcome: Outcome) -> None:
    """Measures durable evaluations per second, written one by one and many at a time."""
    for at_once in (1, 16, 256):
        folder = f"{config.output}-{at_once}"
        with Archive(folder) as archive:
            began, rows = time.monotonic(), 0
            while time.monotonic() - began < 3:
                some = [recipes[(rows + i) % len(recipes)] for i in range(at_once)]
                # documents differ, so that a recipe may be repeated
                archive.record_all([(r, f"{rows + i}", 1, outcome) for i, r in enumerate(some)])
                rows += at_once
            seconds = time.monotonic() - began
        print(f"archive: {rows / seconds:.0f} evaluations/s, {at_once} in a transaction")


def idle(executor: MpiExecutor) -> None:
    """Measures what ranks use that have nothing to do."""
    pids = [os.getpid(), *(member.hello.pid for member in executor.members)]
    before = [cpu_s(pid) for pid in pids]
    executor.finished(IDLE_S)
    used = [100 * (cpu_s(pid) - b) / IDLE_S for pid, b in zip(pids, before, strict=True)]
    print(f"idle: rank 0 uses {used[0]:.1f} % of a core, a worker {max(used[1:]):.1f} %")
    sizes = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, size = line.split()[:2]
        sizes[name] = int(size) / 1024
    print(f"memory of rank 0: {sizes['Rss:']:.0f} MB resident, {sizes['Pss:']:.0f} MB proportional")


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.2, help="of an evaluation (0.2)")
    parser.add_argument("--evaluations", type=int, default=300, help="of the search (300)")
    parser.add_argument("--folder", help="where the archive is written; default: a temporary one")
    arguments = parser.parse_args()
    channel = join("mpi")
    assert channel is not None
    if channel.rank > 0:

        def opens(orders: Orders, *_: object) -> tuple[Sleeper, str]:
            return Sleeper(arguments.seconds), "none"

        run_worker(channel, opens)
    return lead(channel, arguments)


def lead(channel: Channel, arguments: argparse.Namespace) -> int:
    """Rank 0."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        config = read_config(
            PATH / "search.yaml",
            [
                f"output={folder}/run", f"search.evaluations={arguments.evaluations}",
                "search.arms=[random]", "search.schedule=asynchronous",
            ],
        )  # fmt: skip
        family = Family(config.models, config.base)
        space = SearchSpace(config.space, config.models, config.base, family.num_layers)
        proposals = SteadyStateNSGA2(space, Settings(2, 24, (1,))).ask(256)
        recipes = [proposal.recipe for proposal in proposals]
        stop = Stop()
        with Crew(channel, stop) as crew:
            monitor = JobMonitor(stop, config.search.evaluations, config.output)
            crew.join(config, family, config.output, lambda: monitor.begin(workers=crew.workers))
            executor = MpiExecutor(crew)
            executor.load("float32")
            executor.workload()
            while len(executor.free()) < executor.num_workers:
                executor.finished(1.0)
            round_trips(executor, recipes)
            search(config, family, executor, monitor)
            archive_writes(config, recipes, Sleeper(0).do(EvaluationJob(recipes[0], "holdout")))
            idle(executor)
            print(f"torch on rank 0: {'torch' in sys.modules}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
