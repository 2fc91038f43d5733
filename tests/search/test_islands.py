"""Islands: they share results, leave running work to each other, and take over a lost one's."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from gptailor.errors import UsageError
from gptailor.evaluation.outcome import Score
from gptailor.execution.executor import EvaluationJob, SimilarityJob
from gptailor.report import load_report
from gptailor.run.folder import RunData, read_run
from gptailor.run.island_folder import island_folder, parse_island
from gptailor.run.journal import evaluations_in, read_journal
from gptailor.run.journal_entry import Measured
from gptailor.run.layout import ISLANDS, JOURNAL
from gptailor.search import island_peers as module
from gptailor.search.island_peers import IslandPeers
from gptailor.search.migration import Migration
from gptailor.search.peers import NoPeers
from gptailor.search.searcher import Scored
from tests.search.archipelago import (
    Sleeper,
    in_threads,
    make_config,
    open_archive,
    outcome,
    paid_twice,
    recipe_of,
    search,
)
from tests.search.helpers import MODELS
from tests.search.simulated import similarity

CONFIG = make_config()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 1.5)
    monkeypatch.setattr(module, "WAIT_S", 0.05)


# Whole searches


def check_paid_once(data: RunData) -> None:
    """Only work begun at the same time is done twice, and that is rare on a busy machine."""
    first = {(e.recipe.hash, e.documents): e for e in data.evaluations}
    twice = paid_twice(data)
    for again in twice:
        before = first[again.recipe.hash, again.documents]
        assert again.finished_at - before.finished_at < 1.0
    assert len(twice) <= len(data.paid) // 10, f"{len(twice)} of {len(data.paid)}"


@pytest.mark.parametrize("schedule", ["asynchronous", "generational"])
@pytest.mark.parametrize("num_workers", [1, 4])
def test_three_islands_use_one_budget(schedule: str, num_workers: int, tmp_path: Path) -> None:
    config = make_config(schedule=schedule, evaluations=90)
    executors = [Sleeper(num_workers, 0.02) for _ in range(3)]
    ready = threading.Barrier(3).wait

    def island(i: int) -> None:
        search(tmp_path, i, 3, executors[i], config, ready=ready)

    in_threads(*(partial(island, i) for i in range(3)))
    data = read_run(tmp_path)
    searched = [e for e in data.evaluations if e.documents == "search"]
    assert 90 <= len(searched) <= 93, len(searched)
    check_paid_once(data)
    measured = Counter(j.model for x in executors for j in x.done if isinstance(j, SimilarityJob))
    assert set(measured) == set(MODELS)
    if num_workers == 1:  # with four, each island begins with all of them at once
        assert sum(measured.values()) <= len(MODELS) + 2
    per_island = [sum(isinstance(j, EvaluationJob) for j in x.done) for x in executors]
    assert min(per_island) >= 5, per_island
    arms = [e for e in searched if e.arms]
    begun = [
        {j.recipe.hash for j in x.done if isinstance(j, EvaluationJob)}
        & {a.recipe.hash for a in arms}
        for x in executors
    ]
    assert sum(map(bool, begun)) >= 2  # the arms were shared out
    held = {e.recipe.hash for e in data.evaluations if e.documents == "holdout"}
    report = load_report(tmp_path)
    assert {p.recipe.hash for p in report.front} <= held
    assert report.cost.evaluations == len(data.paid)
    assert [e.number for e in data.evaluations] == list(range(1, len(data.evaluations) + 1))


@pytest.mark.parametrize("schedule", ["asynchronous", "generational"])
def test_the_share_of_a_lost_island_is_done(schedule: str, tmp_path: Path) -> None:
    config = make_config(schedule=schedule)
    executors = [Sleeper(2, 0.02), Sleeper(2, 0.02, fails_at=12)]
    ready = threading.Barrier(2).wait
    in_threads(
        lambda: search(tmp_path, 0, 2, executors[0], config, ready=ready),
        lambda: search(tmp_path, 1, 2, executors[1], config, ready=ready, dies=True),
    )
    data = read_run(tmp_path)
    assert 60 <= len([e for e in data.evaluations if e.documents == "search"]) <= 61
    check_paid_once(data)
    again = [Sleeper(2, 0.02), Sleeper(2, 0.02)]
    search(tmp_path, 0, 2, again[0], config)
    search(tmp_path, 1, 2, again[1], config)
    assert again[0].done == again[1].done == []  # nothing was left to do, and nothing is repeated
    assert len(read_run(tmp_path).paid) == len(data.paid)


def test_a_late_island_gets_all_results(tmp_path: Path) -> None:
    config = make_config(schedule="asynchronous", evaluations=30)
    search(tmp_path, 0, 2, Sleeper(1, 0.0), config)
    more = make_config(schedule="asynchronous", evaluations=40)
    executor = Sleeper(1, 0.0)
    search(tmp_path, 1, 2, executor, more)
    searched = [
        j for j in executor.done if isinstance(j, EvaluationJob) and j.documents == "search"
    ]
    assert len(searched) == 10
    assert not any(isinstance(job, SimilarityJob) for job in executor.done)
    assert paid_twice(read_run(tmp_path)) == []


# Two islands, step by step


class Pair:
    """Islands 0 and 1, and a clock."""

    def __init__(self, run: Path) -> None:
        self.run, self.time = run, 0.0
        self.archives = [open_archive(run, i, CONFIG) for i in range(2)]
        self.notes: list[str] = []
        self.islands = [
            IslandPeers(run, i, 2, archive, self.notes.append, lambda: self.time)
            for i, archive in enumerate(self.archives)
        ]

    def evaluate(self, island: int, *layers: int, seconds: float = 1.0) -> str:
        row = self.archives[island].record(
            recipe_of(*layers), "search", 100 * len(layers), outcome(seconds=seconds)
        )
        self.islands[island].publish([row])
        return row.recipe.hash

    def look(self, island: int) -> list[str]:
        self.time += 10.0
        return [e.recipe.hash for e in self.islands[island].refresh()]

    def journal(self, island: int) -> Path:
        return island_folder(self.run, island) / JOURNAL


def test_each_result_arrives_once(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    one = pair.evaluate(1, 0, 1)
    assert pair.look(0) == [one]
    assert pair.look(0) == []
    assert pair.look(1) == []
    two, three = pair.evaluate(1, 0, 2), pair.evaluate(1, 0, 3)
    assert pair.look(0) == [two, three]


def test_running_work_is_left_to_the_other(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    key = (recipe_of(0, 1).hash, "search")
    other = (recipe_of(0, 2).hash, "search")
    pair.islands[1].begin([key, other, ("red", "similarity")])
    pair.look(0)
    assert pair.islands[0].is_under_way(key)
    assert pair.islands[0].num_under_way("search") == 2
    assert pair.islands[0].num_under_way("holdout") == 0
    pair.evaluate(1, 0, 1)
    pair.islands[1].publish_similarities([Measured("red", similarity(8, 0.0))])
    pair.islands[1].publish_similarities([Measured("green", similarity(7, 0.0))])
    pair.look(0)
    assert not pair.islands[0].is_under_way(key)
    assert not pair.islands[0].is_under_way(("red", "similarity"))
    assert pair.islands[0].similarities == {"red": similarity(8, 0.0)}
    with pair.islands[1]:
        pass
    assert pair.islands[0].num_under_way("search") == 1
    pair.look(0)
    assert pair.islands[0].num_under_way("search") == 0


def test_a_lost_islands_work_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 60.0)
    pair = Pair(tmp_path)
    pair.evaluate(0, 0, 3, seconds=30.0)
    key = (recipe_of(0, 1).hash, "search")
    pair.islands[1].begin([key])
    pair.look(0)
    pair.time += 80.0
    assert pair.islands[0].is_under_way(key)  # under three times the longest evaluation
    pair.time += 11.0
    assert not pair.islands[0].is_under_way(key)
    pair.evaluate(1, 0, 2)
    pair.look(0)
    assert pair.islands[0].is_under_way(key)  # it was not lost, only slow


def test_a_restarted_search_has_nothing_under_way(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    key = (recipe_of(0, 1).hash, "search")
    pair.islands[1].begin([key])
    pair.look(0)
    IslandPeers(tmp_path, 1, 2, pair.archives[1])
    pair.look(0)
    assert not pair.islands[0].is_under_way(key)


def test_an_evaluation_by_both_counts_once_and_costs_twice(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.evaluate(1, 0, 1)
    time.sleep(0.01)
    pair.evaluate(0, 0, 1)
    pair.archives[0].add_arm("late", recipe_of(0, 2))
    pair.evaluate(0, 0, 2)
    data = read_run(tmp_path)
    assert [e.number for e in data.evaluations] == [1, 2]
    assert len(data.paid) == 3
    first = min(data.paid, key=lambda e: e.finished_at)
    assert data.evaluations[0].finished_at == first.finished_at
    assert data.evaluations[1].arms == ("late",)
    report = load_report(tmp_path)
    with open_archive(tmp_path, 2, make_config(evaluations=99)) as archive:
        IslandPeers(tmp_path, 2, 3, archive)
    assert load_report(tmp_path).config["search"]["evaluations"] == 99
    assert len(report.points) == 2
    assert report.cost.evaluations == 3
    assert report.num_layers == 8
    assert report.config["search"]["population"] == 12


def test_a_lost_archive_is_restored_from_the_journal(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    one = pair.evaluate(0, 0, 1)
    for archive in pair.archives:
        archive.close()
    (island_folder(tmp_path, 0) / "archive.db").unlink()
    with open_archive(tmp_path, 0, CONFIG) as archive:
        islands = IslandPeers(tmp_path, 0, 2, archive)
        assert [e.recipe.hash for e in islands.refresh()] == [one]
    assert len(evaluations_in(read_journal(pair.journal(0))[1])) == 1


# Who belongs to a run


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (
            {"config": make_config(seed=4).model_dump_json()},
            r"islands/0/journal.jsonl is .* another configuration: search.seed was 4, but is 0",
        ),
        ({"fingerprint": "x"}, "with other model files than"),
        ({"documents": "e"}, "with other documents of the tasks than"),
    ],
)
def test_another_search(meta: dict[str, str], message: str, tmp_path: Path) -> None:
    with open_archive(tmp_path, 0, CONFIG) as archive:
        IslandPeers(tmp_path, 0, 2, archive)
    with (
        open_archive(tmp_path, 1, CONFIG, **meta) as archive,
        pytest.raises(UsageError, match=message),
    ):
        IslandPeers(tmp_path, 1, 2, archive)
    assert not (island_folder(tmp_path, 1) / JOURNAL).exists()


def test_what_may_differ_between_islands(tmp_path: Path) -> None:
    config = make_config(evaluations=7)
    with open_archive(tmp_path, 0, CONFIG) as archive:
        IslandPeers(tmp_path, 0, 2, archive)
    with open_archive(tmp_path, 1, config) as archive:
        IslandPeers(tmp_path, 1, 5, archive)


def test_a_bad_journal_among_good_ones(tmp_path: Path) -> None:
    """A new island refuses to start; a running one ignores that journal until it is repaired."""
    pair = Pair(tmp_path)
    with pair.journal(1).open("ab") as file:
        file.write(b"what?\n")
    one = pair.evaluate(1, 0, 1)
    assert pair.look(0) == []
    pair.look(0)
    assert len(pair.notes) == 1
    assert "Island 1 is ignored: " in pair.notes[0]
    assert "journal.jsonl is corrupt" in pair.notes[0]
    assert "Resuming island 1 (--island 1/2) repairs it; or remove it." in pair.notes[0]
    with (
        open_archive(tmp_path, 2, CONFIG) as archive,
        pytest.raises(UsageError, match="is corrupt"),
    ):
        IslandPeers(tmp_path, 2, 3, archive)
    IslandPeers(tmp_path, 1, 2, pair.archives[1])
    assert pair.look(0) == [one]


def test_recipes_of_other_models_are_skipped(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.evaluate(1, 0, 99)
    text = pair.journal(1).read_text()
    pair.journal(1).write_text(
        text.replace("/m/red", "/m/evil").replace('"/m/evil"', '"/m/red"', 1)
    )
    assert pair.look(0) == []


def test_scores_that_lack_an_objective_are_skipped(tmp_path: Path) -> None:
    config = make_config()
    config = config.model_copy(update={"objectives": ("t", "parameters")})
    with open_archive(tmp_path, 0, config) as mine, open_archive(tmp_path, 1, config) as archive:
        others = IslandPeers(tmp_path, 1, 2, archive)
        score = Score("t", "acc", 0.5, None, 1)
        bad = archive.record(recipe_of(0, 1), "search", 200, outcome())
        good = archive.record(recipe_of(0, 2), "search", 200, replace(outcome(), scores=(score,)))
        others.publish([bad, good])
        assert [e.recipe for e in IslandPeers(tmp_path, 0, 2, mine).refresh()] == [good.recipe]


def test_folders_that_are_not_islands(tmp_path: Path) -> None:
    for name in ("x", "-1", "007", "9999999", "٣"):
        (tmp_path / ISLANDS / name).mkdir(parents=True)
        (tmp_path / ISLANDS / name / JOURNAL).write_text("evil")
    (tmp_path / ISLANDS / "5").mkdir()
    (tmp_path / ISLANDS / "6").write_text("a file")
    pair = Pair(tmp_path)
    one = pair.evaluate(1, 0, 1)
    assert pair.look(0) == [one]


def test_words() -> None:
    assert parse_island("0/1") == (0, 1)
    assert parse_island("2/3") == (2, 3)
    for text in ("3/3", "1", "/", "a/b", "-1/2", "1/2/3", "", "1/" + "9" * 30, "²/3"):
        with pytest.raises(UsageError, match="is not of the form I/K"):
            parse_island(text)


def test_orders_and_seeds_differ(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    assert NoPeers().rotated([1, 2, 3, 4]) == [1, 2, 3, 4]
    assert NoPeers().seed(7) == 7
    assert [i.rotated([1, 2, 3, 4, 5]) for i in pair.islands] == [[1, 2, 3, 4, 5], [3, 4, 5, 1, 2]]
    seeds = {island.seed(seed) for island in pair.islands for seed in range(100)}
    assert len(seeds) == 200


def test_looking_at_other_islands_is_cheap(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    journal = pair.journal(1)
    pair.evaluate(1, 0, 1)
    pair.look(0)
    began = time.perf_counter()
    for _ in range(100):
        pair.look(0)
    assert (time.perf_counter() - began) / 100 < 0.01
    assert journal.stat().st_size > 0


# Migration


def test_the_front_migrates() -> None:
    migration = Migration()
    a, b, c = recipe_of(0), recipe_of(1), recipe_of(2)
    best = Scored(a, (0.0, 1.0))
    arrived = [best, Scored(b, (1.0, 1.0)), Scored(c, None)]
    assert migration.chosen(arrived) == [best, Scored(b, None), Scored(c, None)]
    assert migration.chosen([Scored(b, (0.1, 1.5))]) == [Scored(b, None)]
    better = Scored(c, (-1.0, -1.0))
    assert migration.chosen([Scored(b, (0.1, 0.5)), better]) == [Scored(b, None), better]


def test_the_header_says_what_is_searched(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    header, _ = read_journal(pair.journal(1))
    assert header == pair.islands[1].header
    first = json.loads(pair.journal(1).read_text().splitlines()[0])["header"]
    assert first["schema"] == "gptailor/journal/1"
    assert (first["island"], first["count"]) == (1, 2)
