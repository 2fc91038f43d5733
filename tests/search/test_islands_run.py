"""Several searches on one run folder: real processes, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from gptailor import verbs
from gptailor.errors import UsageError
from gptailor.evaluation.outcome import Evaluation
from gptailor.report import load_report
from gptailor.run.archive import Archive
from gptailor.run.folder import read_run
from gptailor.run.island_folder import island_folder
from gptailor.run.journal import evaluations_in, read_journal
from gptailor.run.journal_entry import Measured
from gptailor.run.layout import ISLANDS, JOURNAL
from tests.search.test_run import write_config

COUNT = 3
EVALUATIONS = 60

SEARCH = """
import sys
from gptailor.search import island_peers
island_peers.PATIENCE_S = 10.0
from gptailor.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Fleet:
    """Islands as processes, each with its own log."""

    def __init__(self, config: Path, run: Path) -> None:
        self.config, self.run = config, run
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, island: int) -> None:
        words = ["search", str(self.config), "--resume", "--island", f"{island}/{COUNT}"]
        with (self.config.parent / f"log-{island}").open("ab") as log:
            self.processes[island] = subprocess.Popen(
                [sys.executable, "-c", SEARCH, *words],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "GPTAILOR_GAINED": str(self.gained(island)),
                },
            )

    def gained(self, island: int) -> Path:
        """The file in which an island counts its new results for its supervisor."""
        path = self.config.parent / f"gained-{island}"
        path.touch()
        return path

    def kill(self, island: int) -> None:
        self.processes[island].send_signal(signal.SIGKILL)
        self.processes[island].wait()

    def wait(self, *islands: int) -> None:
        for island in islands:
            code = self.processes[island].wait(200)
            assert code == 0, (self.config.parent / f"log-{island}").read_text()[-3000:]

    def wait_for(self, island: int, evaluations: int) -> None:
        """Waits until the island's journal has this many evaluations."""
        deadline = time.monotonic() + 120
        while len(journal(self.run, island)) < evaluations:
            assert time.monotonic() < deadline
            assert self.processes[island].poll() is None
            time.sleep(0.02)

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def journal(run: Path, island: int) -> list[Evaluation]:
    return evaluations_in(read_journal(island_folder(run, island) / JOURNAL)[1])


def archived(run: Path, island: int) -> list[Evaluation]:
    with Archive(island_folder(run, island), readonly=True) as archive:
        assert archive._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        return archive.evaluations()


def keys(evaluations: list[Evaluation]) -> list[tuple[str, str]]:
    return [(e.recipe.hash, e.documents) for e in evaluations]


def check_whole(run: Path) -> None:
    """Asserts that the budget was used, the front has its holdout, and the report has it all."""
    found = read_run(run).evaluations
    assert [e.number for e in found] == list(range(1, len(found) + 1))
    searched = [e for e in found if e.documents == "search"]
    assert EVALUATIONS <= len(searched) <= EVALUATIONS + COUNT
    held = {e.recipe.point for e in found if e.documents == "holdout"}
    report = json.loads((run / "front.json").read_text())
    assert {row["point"] for row in report["front"]} <= held
    assert [row["point"] for row in report["front"]] == [p.id for p in load_report(run).front]
    best = max(e.outcome.accuracy or 0.0 for e in searched)
    assert max(row["search"]["accuracy"] for row in report["front"]) == best
    assert report["cost"]["evaluations"] == len(read_run(run).paid)
    assert not (run / "archive.db").exists()
    assert verbs.report(run).is_file()


def check_paid_once(run: Path) -> None:
    """Asserts that a recipe was evaluated twice only if two islands chose it at the same time.

    Between choice and evaluation they wait for the disk, which may be busy.
    """
    paid = read_run(run).paid
    times: dict[tuple[str, str], list[Evaluation]] = {}
    for evaluation in paid:
        times.setdefault((evaluation.recipe.hash, evaluation.documents), []).append(evaluation)
    for twice in (rows for rows in times.values() if len(rows) > 1):
        first, *others = sorted(twice, key=lambda e: e.finished_at)
        for other in others:
            began = other.finished_at - other.outcome.cost.seconds
            assert began < first.finished_at + 5.0, (began, first.finished_at)
    repeated = len(paid) - len(times)
    assert repeated <= 0.05 * len(paid), f"{repeated} of {len(paid)} were paid twice"


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param("asynchronous", marks=pytest.mark.long),  # three whole programs
        pytest.param("generational", marks=pytest.mark.slow),
    ],
)
def test_an_island_is_lost(
    schedule: str, models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = write_config(
        tmp_path, models, tasks_dir, run, evaluations=EVALUATIONS, schedule=schedule
    )
    fleet = Fleet(config, run)
    try:
        for island in range(COUNT):
            fleet.start(island)
        fleet.wait_for(1, 8)
        fleet.kill(1)
        assert len(read_run(run).evaluations) < EVALUATIONS
        fleet.wait(0, 2)
    finally:
        fleet.close()
    check_whole(run)
    check_paid_once(run)
    for island in (0, 2):
        mine = archived(run, island)
        assert keys(mine) == keys(journal(run, island))
        assert len([e for e in mine if e.documents == "search"]) >= 8  # both did their part
        _, entries = read_journal(island_folder(run, island) / JOURNAL)
        measured = [entry for entry in entries if isinstance(entry, Measured)]
        # results of other islands are not counted as its own
        assert fleet.gained(island).stat().st_size == len(mine) + len(measured)
    seen = Counter(key for island in range(COUNT) for key in keys(journal(run, island)))
    arms = [e for e in read_run(run).evaluations if e.arms and e.documents == "search"]
    assert len(arms) > 12
    assert sum(seen[e.recipe.hash, "search"] - 1 for e in arms) <= 4  # the arms were shared out


@pytest.mark.slow  # three whole programs
def test_killed_and_resumed(models: dict[str, str], tasks_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_config(
        tmp_path, models, tasks_dir, run, evaluations=EVALUATIONS, schedule="asynchronous"
    )
    fleet = Fleet(config, run)
    try:
        for island in (0, 2):
            fleet.start(island)
        fleet.wait_for(2, 8)
        fleet.kill(2)
        before = archived(run, 2)
        path = island_folder(run, 2) / JOURNAL
        lines = path.read_bytes().splitlines(keepends=True)
        written = [i for i, line in enumerate(lines) if line.startswith(b'{"evaluation"')]
        path.write_bytes(b"".join(lines[: written[-1]]) + lines[written[-1]][:100])  # torn
        fleet.start(2)
        fleet.wait(0, 2)
    finally:
        fleet.close()
    check_whole(run)
    check_paid_once(run)
    after = archived(run, 2)
    assert after[: len(before)] == before
    assert set(keys(after)) == set(keys(journal(run, 2)))
    assert len(keys(journal(run, 2))) == len(after)


def test_a_run_has_islands_or_none(models: dict[str, str], tasks_dir: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, models, tasks_dir, tmp_path / "run", evaluations=5)
    verbs.search(config, island=(0, 2))
    with pytest.raises(UsageError, match=r"islands/0 already holds a run"):
        verbs.search(config, island=(0, 2))
    with pytest.raises(UsageError, match=r"holds a run with islands: continue it with --island"):
        verbs.search(config, resume=True)
    with pytest.raises(UsageError, match=r"another configuration: search.seed was 0, but is 7"):
        verbs.search(config, overrides=["search.seed=7"], island=(1, 2))
    assert not (tmp_path / "run" / ISLANDS / "1").exists()
    verbs.search(config, overrides=["search.evaluations=8"], island=(1, 2))
    searched = [e for e in read_run(tmp_path / "run").evaluations if e.documents == "search"]
    assert len(searched) == 8
    assert len(journal(tmp_path / "run", 1)) < 8
    plain = write_config(tmp_path / "b", models, tasks_dir, tmp_path / "plain", evaluations=2)
    verbs.search(plain)
    with pytest.raises(UsageError, match=r"holds a run without islands"):
        verbs.search(plain, resume=True, island=(0, 2))
    point = searched[-1].recipe.point
    assert verbs.stitch(tmp_path / "run", tmp_path / "model", point=point, verify=False).is_dir()
