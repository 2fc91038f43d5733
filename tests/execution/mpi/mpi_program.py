"""A search with MPI whose workers invent their scores.

    python -m tests.execution.mpi.mpi_program search …

Everything but the evaluation is the real program. The environment variable `TEST_FAULTS` holds the
faults to inject, as JSON: {"seconds": of an evaluation, "worker": [rank, at which job, what]}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from unittest import mock

from gptailor import cli, patience
from gptailor.errors import ModelError
from gptailor.evaluation.outcome import Cost, Outcome
from gptailor.evaluation.similarity import Similarity
from gptailor.execution.executor import EvaluationJob, Job, WorkloadInfo
from gptailor.execution.logs import Log
from gptailor.execution.mpi import worker
from gptailor.execution.mpi.launcher import join
from gptailor.execution.mpi.messages import Orders
from gptailor.execution.mpi.worker import run_worker
from gptailor.patience import Say
from tests.search.helpers import synthetic

FAULTS = json.loads(os.environ.get("TEST_FAULTS", "{}"))
if "words" in FAULTS:  # seconds between progress messages
    patience.EVERY_S = worker.WORDS_S = FAULTS["words"]


class Inventor:
    """Scores by a formula, after a pause."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.num_jobs = 0
        self.beat: Callable[[], None] = lambda: None

    def workload(self) -> WorkloadInfo:
        other = FAULTS.get("documents") == self.rank
        return WorkloadInfo({"search": 10}, "other" if other else "invented")

    def words(self) -> str:
        return "half of it"

    def do(self, job: Job) -> Outcome | Similarity:
        assert isinstance(job, EvaluationJob)
        self.num_jobs += 1
        rank, number, what = FAULTS.get("worker", (0, 0, ""))
        if (rank, number) == (self.rank, self.num_jobs):
            if what == "bug":
                raise ZeroDivisionError("a fault of this test")
            if what == "model":
                raise ModelError("a fault of this test: the model is unusable.")
            if what == "fails":
                return Outcome("failed", None, (), "Traceback\nValueError: of this test", Cost())
            print("what a library says")
            os.system("echo what a program says")
        for _ in range(2):
            time.sleep(FAULTS.get("seconds", 0.01) / 2)
            self.beat()
        return synthetic(job.recipe)


def invented(
    orders: Orders, go_on: Callable[[], None], log: Log, says: Say
) -> tuple[Inventor, str]:
    rank = log.rank
    says("loading nothing")
    if FAULTS.get("slow") == rank:
        time.sleep(20)
        go_on()
    log.say(f"Invents in {orders.config.evaluation.dtype}.")
    return Inventor(rank), "none"


def main() -> int:
    """Rank 0 is the real command line, apart from a fault; the others evaluate by a formula."""
    channel = join("auto")
    if channel is not None and channel.rank > 0:
        run_worker(channel, invented)
    if "rank 0" in FAULTS:
        from gptailor.search.run import Run

        fault = ZeroDivisionError("a fault of this test")
        mock.patch.object(Run, "search", side_effect=fault).start()
    code = cli.main()
    heavy = [name for name in ("torch", "transformers", "lm_eval") if name in sys.modules]
    print(f"heavy modules of rank 0: {heavy}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
