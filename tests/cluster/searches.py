"""Searches for the cluster's tests: the demo family, slow evaluations, and checks of a run.

The tasks are the demo's, but scoring a document takes a while without using a processor. This keeps
three workers on two cores busy long enough to be hit in the middle of an evaluation.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from gptailor.demo import PATH
from gptailor.errors import GptailorError
from gptailor.evaluation.outcome import Evaluation, Outcome
from gptailor.report.export import front_dict, to_json
from gptailor.report.front_model import load_report
from gptailor.run import job_record
from gptailor.run.archive import Archive
from gptailor.run.folder import read_run
from tests.cluster.processes import wait_until

Rows = dict[tuple[str, str, str], tuple[int, float, Outcome]]
"""Folder, recipe and documents → number, time and outcome."""

NUM_DOCUMENTS = 40
EVALUATIONS = 48
TASKS = ("sort", "clock")

_EVALUATED = re.compile(r"(\w{8}): (?:ok|infeasible|failed)\b")

_TASK = """\
task: slow_{name}
custom_dataset: !function slow.load
dataset_kwargs: {{file: demo_{name}.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: context
doc_to_choice: choices
doc_to_target: gold
process_results: !function slow.results
num_fewshot: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

_SLOW = """\
import json
import time
from pathlib import Path

import datasets


def load(file, **_):
    lines = (Path({demo!r}) / file).read_text().splitlines()[:{documents}]
    return {{"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}}


class Crash(BaseException):
    pass


def results(document, answers):
    if {crashes}:
        raise Crash("struck by lightning")
    time.sleep({pause_s})
    values = [loglikelihood for loglikelihood, _ in answers]
    return {{"acc": float(values.index(max(values)) == document["gold"])}}
"""


@dataclass(frozen=True)
class Search:
    """A configuration, and its run.

    Attributes:
        config: the `search.yaml`.
        run: the run folder.
        evaluations: the budget.
    """

    config: Path
    run: Path
    evaluations: int

    def archives(self) -> list[Path]:
        """Folders with an archive: the run folder, or one for each island."""
        return sorted(path.parent for path in self.run.rglob("archive.db"))

    def rows(self) -> Rows:
        """The archives' current contents."""
        found: Rows = {}
        for folder in self.archives():
            with suppress(GptailorError), Archive(folder, readonly=True) as archive:
                for e in archive.evaluations():
                    key = (folder.name, e.recipe.hash, e.documents)
                    found[key] = (e.number, e.finished_at, e.outcome)
        return found

    def wait_for(self, count: int, timeout_s: float = 200) -> Rows:
        """The archives' rows, as soon as there are at least `count`."""
        wait_until(lambda: len(self.rows()) >= count, timeout_s, f"{count} rows in {self.run}")
        return self.rows()

    def logged(self, folder: Path) -> Counter[str]:
        """How often the ranks' logs mention an evaluation of each point."""
        logs = (folder / "logs").glob("rank-*.log")
        return Counter(point for log in logs for point in _EVALUATED.findall(log.read_text()))

    def busy(self, job: str) -> int:
        """Waits until some rank of a job is evaluating, and returns that rank."""
        found: list[int] = []

        def is_busy() -> bool:
            for record in job_record.read_all(self.run):
                if record.job_id == job and record.state == "running":
                    found.extend(w.rank for w in record.workers if w.job is not None)
            return bool(found)

        wait_until(is_busy, 200, "a rank evaluates")
        return found[0]

    def front(self) -> list[tuple[str, float]]:
        """Point and accuracy of each model on the front, from `front.json`."""
        data = json.loads((self.run / "front.json").read_text())
        return [(point["point"], point["search"]["accuracy"]) for point in data["front"]]

    def check(self, *before: Rows) -> None:
        """Asserts that the run is whole.

        Args:
            before: the archives' rows before each fault. None of them was evaluated again: each
                still has its number, time and outcome, and appears only once in the logs.
        """
        for folder in self.archives():
            logged = self.logged(folder)
            for name, digest, _ in {key for seen in before for key in seen}:
                assert name != folder.name or logged[digest[:8]] <= 1
            with sqlite3.connect(folder / "archive.db") as database:
                assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                same = "SELECT count(*) FROM evaluations GROUP BY recipe_hash, documents"
                assert {count for (count,) in database.execute(same)} == {1}
        rows = self.rows()
        for seen in before:
            assert seen
            assert seen.items() <= rows.items()
        evaluations = [e for e in read_run(self.run).evaluations if e.documents == "search"]
        if self.archives() == [self.run]:
            assert len(evaluations) == self.evaluations
        else:  # islands end together, but not at the same instant
            assert self.evaluations <= len(evaluations) <= self.evaluations + len(self.archives())
        assert {e.outcome.status for e in evaluations} == {"ok"}
        data = json.loads((self.run / "front.json").read_text())
        assert data == json.loads(to_json(front_dict(load_report(self.run))))
        sizes = [(p["parameters"], p["search"]["accuracy"]) for p in data["front"]]
        assert sizes == unbeaten(evaluations)


def unbeaten(evaluations: Sequence[Evaluation]) -> list[tuple[int, float]]:
    """Sizes and accuracies that no other evaluation beats, smallest first, without duplicates."""
    pairs = {(e.parameters, e.outcome.accuracy or 0.0) for e in evaluations}
    beaten = {a for a in pairs for b in pairs if a != b and b[0] <= a[0] and b[1] >= a[1]}
    return sorted(pairs - beaten)


def make_search(
    folder: Path,
    *,
    seconds: float,
    evaluations: int = EVALUATIONS,
    schedule: str = "generational",
    crashes: bool = False,
) -> Search:
    """Writes a configuration and its tasks into a folder that does not exist yet.

    Args:
        folder: for `search.yaml`, `tasks/`, and later `run/`.
        seconds: that an evaluation takes in addition to its computations.
        evaluations: the budget.
        schedule: of the search.
        crashes: whether scoring crashes, in a way that ends the worker.
    """
    tasks = folder / "tasks"
    tasks.mkdir(parents=True)
    pause_s = seconds / (NUM_DOCUMENTS * len(TASKS))
    demo = str(PATH / "tasks")
    text = _SLOW.format(demo=demo, documents=NUM_DOCUMENTS, pause_s=pause_s, crashes=crashes)
    (tasks / "slow.py").write_text(text)
    for name in TASKS:
        (tasks / f"slow_{name}.yaml").write_text(_TASK.format(name=name))
    config = {
        "models": {name: str(PATH / "models" / name) for name in ("base", "sort", "clock")},
        "base": "base",
        "space": {"layers": {"min": 6}, "merge": {"methods": ["linear", "slerp"]}},
        "evaluation": {
            "tasks": [f"slow_{name}" for name in TASKS],
            "include_path": str(tasks),
            "dtype": "float32",
            "device": "cpu",
        },
        "search": {
            "population": 12,
            "evaluations": evaluations,
            "arms": ["dense", "angular", "uniform", "random"],
            "arm_sizes": [0.75],
            "schedule": schedule,
        },
        "output": str(folder / "run"),
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(config))
    return Search(folder / "search.yaml", folder / "run", evaluations)
