"""The numbers of a report, against slow references."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.errors import ResourceError, UsageError
from gptailor.evaluation.outcome import Cost, Outcome, Score
from gptailor.recipe import NO_LAYER, Merge, Recipe, Take
from gptailor.report import load_report, write_report
from gptailor.report.export import (
    ends,
    front_csv,
    front_dict,
    layer_map,
    point_dict,
    to_json,
    write_atomically,
)
from gptailor.report.front_model import Point
from gptailor.report.headline import headline
from gptailor.report.hypervolume import hypervolume_history
from gptailor.report.measured import Measured
from gptailor.run.archive import Archive
from gptailor.run.pareto import pareto_front
from tests.report.report_runs import (
    CRASH,
    CUT,
    LAYERS,
    NAMES,
    Sets,
    add,
    dense,
    make_run,
    make_small,
    make_with_text,
    recipe_of,
    right,
    size_of,
)

sizes = st.integers(1, 12)
accuracies = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.9])
many = st.lists(st.tuples(sizes, accuracies), max_size=24)


def point_of(number: int, parameters: int, accuracy: float) -> Point:
    recipe = recipe_of([Take("base", 0)])
    return Point(number, recipe, parameters, (), Measured(accuracy, None, ()), None)


def measures(point: Point) -> tuple[int, float, str]:
    return point.parameters, point.search.accuracy, f"{point.number:06}"


def slow_front(points: list[Point]) -> list[Point]:
    def beats(a: Point, b: Point) -> bool:
        better = (a.search.accuracy - b.search.accuracy, b.parameters - a.parameters)
        return min(better) >= 0 and (max(better) > 0 or a.number < b.number)

    return [p for p in points if not any(beats(q, p) for q in points if q is not p)]


@given(many)
def test_front_equals_brute_force(pairs: list[tuple[int, float]]) -> None:
    points = [point_of(i, size, accuracy) for i, (size, accuracy) in enumerate(pairs, 1)]
    front = pareto_front(reversed(points), measures)
    assert {p.number for p in front} == {p.number for p in slow_front(points)}
    assert list(front) == sorted(front, key=lambda p: p.parameters)


def slow_volume(pairs: list[tuple[int, float]], largest: int) -> float:
    """The area, summed column by column, as parameter counts are integers."""
    columns = range(1, largest + 1)
    best = [max([a for size, a in pairs if size < column], default=0.0) for column in columns]
    return sum(best) / largest


@settings(deadline=None)
@given(many)
def test_hypervolume_equals_column_sums_and_never_falls(pairs: list[tuple[int, float]]) -> None:
    history = hypervolume_history([(i, *pair) for i, pair in enumerate(pairs, 1)], 12)
    volumes = [volume for _, volume in history]
    assert volumes == sorted(volumes)
    for i, volume in enumerate(volumes, 1):
        assert volume == pytest.approx(slow_volume(pairs[:i], 12), abs=1e-12)


def test_a_model_that_is_too_large_or_too_bad_adds_no_volume() -> None:
    assert hypervolume_history([(1, 12, 0.9), (2, 15, 0.9), (3, 4, -0.5)], 12)[-1] == (3, 0.0)
    assert hypervolume_history([], 12) == ()


def test_retention_is_a_percentage_of_the_best_dense_candidate(run: Path) -> None:
    report = load_report(run)
    candidates = [p for p in report.points if p.is_dense]
    assert len(candidates) == len(NAMES)
    search = max(candidates, key=lambda p: p.search.accuracy)
    holdout = max(candidates, key=lambda p: p.holdout.accuracy if p.holdout else -1.0)
    assert search.holdout is not None and holdout.holdout is not None
    assert (report.search.point, report.holdout.point) == (search.id, holdout.id)
    assert search.search.retention == holdout.holdout.retention == 100.0
    for point in report.points:
        kept = 100.0 * point.search.accuracy / search.search.accuracy
        assert point.search.retention == pytest.approx(kept)
        if point.holdout:
            kept = 100.0 * point.holdout.accuracy / holdout.holdout.accuracy
            assert point.holdout.retention == pytest.approx(kept)


def test_report_sums_up_the_archive(run: Path) -> None:
    report = load_report(run)
    with Archive(run, readonly=True) as archive:
        assert load_report(archive) == report
        rows = archive.evaluations()
    search = [r for r in rows if r.documents == "search"]
    assert [p.number for p in report.points] == [
        r.number for r in search if r.outcome.status == "ok"
    ]
    assert report.num_failed == sum(r.outcome.status == "failed" for r in rows) > 0
    assert report.num_infeasible == sum(r.outcome.status == "infeasible" for r in rows) > 0
    assert report.problems[0].reason.startswith(("torch.OutOfMemoryError", "the model needs"))
    assert CRASH in {p.text for p in report.problems}
    assert report.cost.evaluations == len(rows)
    assert report.cost.num_tokens == sum(r.outcome.cost.num_tokens for r in rows)
    assert report.cost.seconds == pytest.approx(sum(r.outcome.cost.seconds for r in rows))
    assert {s.documents for s in report.spent} == {"search", "search-100-5f3c", "holdout"}
    assert 0.5 < (report.cost.forward_share or 0) < 1.0
    assert (report.num_layers, report.largest_parameters) == (LAYERS, size_of(LAYERS))
    assert report.hypervolume[-1][1] >= report.control_hypervolume > 0.0
    assert {k for p in report.controls for k in p.kinds} == {
        "dense", "block_influence", "angular", "uniform", "random"
    }  # fmt: skip


def test_stderr_of_the_accuracy_is_that_of_the_weighted_mean(tmp_path: Path) -> None:
    scores = (
        Score("a", "acc,none", 0.5, 0.03, 10, 1.0),
        Score("b", "acc,none", 0.8, 0.02, 10, 2.0),
    )
    add_one(tmp_path, Outcome("ok", 0.7, scores, "", Cost()))
    measured = load_report(tmp_path).points[0].search
    assert measured.stderr == pytest.approx(0.05 / 3)  # √(0.03² + 0.04²) / 3
    assert measured.retention is None


def add_one(folder: Path, result: Outcome, recipe: Recipe | None = None) -> Recipe:
    recipe = recipe or recipe_of([Take("math", i) for i in range(9)])
    with Archive(folder) as archive:
        add(archive, recipe, "search", result)
    return recipe


def test_without_meta_the_family_is_taken_from_the_recipes(tmp_path: Path) -> None:
    report = load_report(make_run(tmp_path, count=4, meta=False))
    assert (report.num_layers, report.largest_parameters) == (LAYERS, size_of(LAYERS))
    assert tuple(report.models) == NAMES
    assert report.config == {}


def test_files_hold_the_report(run: Path, tmp_path: Path) -> None:
    write_report(run, tmp_path)
    report = load_report(run)
    with (tmp_path / "front.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    data = json.loads((tmp_path / "front.json").read_text())
    assert len(rows) == len(data["front"]) == len(report.front)
    for row, entry, point in zip(rows, data["front"], report.front, strict=True):
        assert row["point"] == entry["point"] == point.id
        assert int(row["parameters"]) == entry["parameters"] == point.parameters
        assert float(row["accuracy"]) == entry["search"]["accuracy"] == point.search.accuracy
        assert float(row["retention_percent"]) == point.search.retention
        kept = report.search.kept(point.search)
        assert kept is not None and point.holdout is not None
        error = entry["search"]["retention_percent_stderr"]
        assert float(row["retention_percent_stderr"]) == error == kept.stderr
        above = entry["search"]["above_chance_points"]
        assert float(row["above_chance_points"]) == above == point.search.above_chance
        assert float(row["search:gsm:em,none"]) == point.search.scores[2].value
        assert float(row["holdout:boolq:acc,none:stderr"]) == point.holdout.scores[1].stderr
        for data_of_score, score in zip(
            entry["search"]["scores"], point.search.scores, strict=True
        ):
            assert data_of_score["retention_percent"] == report.search.kept_of_task(score)
            names = {f.name for f in fields(Score)} & set(data_of_score)
            assert {name: data_of_score[name] for name in names} == {
                name: getattr(score, name) for name in names
            }
            assert {"value", "stderr", "chance", "num_documents"} < names
        assert Recipe.from_dict(entry["recipe"]).hash == point.recipe.hash
        text = (tmp_path / "recipes" / f"{point.id}.yaml").read_text()
        assert Recipe.from_yaml(text) == point.recipe
        assert [e["out_layer"] for e in entry["layer_map"]] == list(range(point.layers))
    assert {p.name for p in (tmp_path / "recipes").iterdir()} == {
        f"{p.id}.yaml" for p in report.front
    }
    assert len(data["control_arms"]) == len(report.controls)
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.tmp"))


def test_same_archive_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    def written() -> dict[str, bytes]:
        write_report(run, tmp_path)
        files = [p for p in tmp_path.rglob("*") if p.is_file()]
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in files}

    first = written()
    assert {"front.csv", "front.json", "front.png", "report/index.html"} < set(first)
    assert written() == first


def test_outdated_recipes_are_removed_and_foreign_files_kept(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    old = recipe_of([Take("code", 3)])
    (folder / f"{old.point}.yaml").write_text(old.to_yaml())
    kept = {"mine.yaml": old.to_yaml(), "0123abcd.yaml": old.to_yaml(), "deadbeef.yaml": "- no"}
    for name, text in kept.items():
        (folder / name).write_text(text)
    write_report(run, tmp_path)
    assert not (folder / f"{old.point}.yaml").exists()
    assert all((folder / name).read_text() == text for name, text in kept.items())


def test_layer_map_shows_what_is_built() -> None:
    weights = (("math", 1.0), ("code", 0.0))
    values = (("lambda", 1.0), ("normalize", 0.0))
    recipe = recipe_of(
        [
            Merge("task_arithmetic", 4, weights, values),
            Merge("slerp", 7, (("math", 1.0), ("code", 1.0)), (("t", 0.25),), 0.9),
        ]
    )
    first, second = layer_map(recipe)
    assert first["method"] is None
    assert first["sources"] == [{"model": "math", "part": 1.0}]
    assert (second["out_layer"], second["src_layer"], second["scale"]) == (1, 7, 0.9)
    assert [(s["model"], s["part"]) for s in second["sources"]] == [("math", 0.75), ("code", 0.25)]


def test_layer_map_has_modules_and_values_by_source() -> None:
    part = Merge("karcher", 0, (("math", 1.0), ("code", 1.0)))
    sparse = Merge("ties", 3, (("math", 1.0), ("code", 3.0)), (("density", (0.5, 0.25)),))
    (entry,) = layer_map(recipe_of([replace(sparse, modules=(("mlp", part),))]))
    assert entry["parameters"]["density"] == {"math": 0.5, "code": 0.25}
    assert [source["part"] for source in entry["sources"]] == [0.25, 0.75]
    (module,) = entry["modules"]
    assert (module["module"], module["method"]) == ("mlp", "karcher")
    assert module["sources"] == [
        {"model": name, "weight": None, "part": 0.5} for name in ("math", "code")
    ]
    end = Merge("linear", NO_LAYER, (("math", 3.0),))
    found = ends(replace(recipe_of([sparse]), embeddings=end, _cache={}))
    assert found["embeddings"]["sources"] == [{"model": "math", "part": 1.0}]
    assert found["head"]["sources"] == [{"model": "base", "part": 1.0}]


def test_infinity_and_nan_are_no_scores(tmp_path: Path) -> None:
    add_one(tmp_path, Outcome("ok", float("inf"), (), "", Cost()))
    report = load_report(tmp_path)
    assert report.points == () and report.num_failed == 1
    scores = (Score("ppl", "word", float("nan"), None, 5),)
    with Archive(tmp_path) as archive:
        add(archive, dense("math"), "search", Outcome("ok", 0.5, scores, "", Cost()))
    write_report(tmp_path)
    strict = json.loads((tmp_path / "front.json").read_text(), parse_constant=pytest.fail)
    assert strict["front"][0]["search"]["scores"][0]["value"] is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no reason given"),
        ("needs 9 GB\n", "needs 9 GB"),
        (CRASH, CRASH.splitlines()[-1]),
        (f"{CRASH}\n\nDuring handling:\n\n{CRASH}\nInvoked with: 3", CRASH.splitlines()[-1]),
        ("x" * 500, "x" * 159 + "…"),
    ],
)
def test_problems_are_named_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    add_one(tmp_path, Outcome("failed", None, (), text, Cost()))
    assert [(p.reason, p.text) for p in load_report(tmp_path).problems] == [(reason, text)]


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out"):
        write_atomically(tmp_path / "file" / "front.csv", b"")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_atomically(tmp_path / "front.csv", b"")


class TestHeadline:
    def test_compares_at_a_common_size(self, run: Path) -> None:
        found = headline(load_report(run))
        assert found.point is not None and found.control is not None
        assert found.point.layers == found.control.layers == 9
        kept, simple = found.point.search.retention, found.control.search.retention
        assert kept is not None and simple is not None
        told = re.fullmatch(
            r"At 75 % of the layers \(9 of 12\) the best stitched model keeps (\d+) ± \d % of the "
            r"best dense candidate; the best simple pruning keeps (\d+) ± \d %; the difference is "
            r"(\d+) ± \d points\.",
            found.text,
        )
        assert told is not None, found.text
        exact = (kept, simple, kept - simple)
        assert all(abs(float(n) - x) <= 0.5 for n, x in zip(told.groups(), exact, strict=True))
        assert "holdout" in found.note

    def run_with(self, folder: Path, values: dict[str, tuple[Recipe, float]]) -> str:
        with Archive(folder) as archive:
            for arm, (recipe, accuracy) in values.items():
                if not arm.startswith("search"):
                    archive.add_arm(arm, recipe)
                score = Score("t", "acc,none", accuracy, 0.02, 100)
                add(archive, recipe, "search", Outcome("ok", accuracy, (score,), "", Cost()))
        return " ".join([headline(load_report(folder)).text, headline(load_report(folder)).note])

    nine = recipe_of([Take("math", i) for i in range(9)])
    other_nine = recipe_of([Take("base", i + 3) for i in range(9)])
    eight = recipe_of([Take("base", i) for i in range(8)])
    full = recipe_of([Take(("math", "code")[i % 2], i) for i in range(LAYERS)])

    def test_says_when_the_search_gained_nothing(self, tmp_path: Path) -> None:
        text = self.run_with(
            tmp_path,
            {
                "dense:math": (dense("math"), 0.5),
                "angular:0.75": (self.other_nine, 0.4),
                "search": (self.nine, 0.39),
            },
        )
        assert "keeps 78 ± 5 %" in text and "keeps 80 ± 5 %, so the search gained nothing" in text
        assert "within the noise" in text
        assert "no values by document" in text
        assert "chosen on these documents, which flatters it, and was not scored on a hold" in text

    def test_a_smaller_model_that_is_better_counts(self, tmp_path: Path) -> None:
        text = self.run_with(
            tmp_path,
            {
                "dense:math": (dense("math"), 0.5),
                "angular:0.75": (self.other_nine, 0.3),
                "search": (self.nine, 0.39),
                "search2": (self.eight, 0.45),
            },
        )
        assert text.startswith("With at most 75 % of the layers (9 of 12) the best stitched")
        assert "keeps 90 ± 5 %" in text and "keeps 60 ± 5 %; the difference is 30 ± 6" in text

    def test_says_what_is_missing(self, tmp_path: Path) -> None:
        text = self.run_with(
            tmp_path, {"search": (self.nine, 0.4), "search2": (dense("base"), 0.6)}
        )
        assert "an accuracy of 0.400" in text
        assert "No simple pruning of that size" in text and "No dense candidate" in text

    def test_controls_only_and_dense_only(self, tmp_path: Path) -> None:
        values = {"dense:math": (dense("math"), 0.5)}
        assert "Only models of full depth" in self.run_with(tmp_path / "a", values)
        values["angular:0.67"] = (self.eight, 0.4)
        text = self.run_with(tmp_path / "b", values)
        assert (
            "No stitched model" in text and "at 67 % of the layers" in text and "80 ± 5 %" in text
        )
        values["search"] = (self.full, 0.6)
        text = self.run_with(tmp_path / "c", values)
        assert text.startswith("No smaller stitched model has been evaluated yet; at 67 % of the ")
        assert "; the best stitched model has all 12 layers and keeps 120 ± 6 %." in text
        del values["angular:0.67"]
        text = self.run_with(tmp_path / "d", values)
        assert text.startswith(
            "Nothing smaller has been evaluated yet; the best stitched model has all 12 layers and "
            "keeps 120 ± 6 % of the best dense candidate."
        )

    def test_nothing_at_all(self, tmp_path: Path) -> None:
        assert self.run_with(tmp_path / "a", {}).startswith("Nothing has been evaluated yet.")
        add_one(tmp_path / "b", Outcome("failed", None, (), CRASH, Cost()))
        assert headline(load_report(tmp_path / "b")).text.startswith("None of the 1 evaluations")


def test_reading_does_not_write(run: Path) -> None:
    before = (run / "archive.db").read_bytes()
    load_report(run)
    with closing(sqlite3.connect(run / "archive.db")) as db:
        assert db.execute("SELECT count(*) FROM evaluations").fetchone()[0] > 0
    assert (run / "archive.db").read_bytes() == before


def test_outcomes_of_the_made_up_run_are_plausible(run: Path) -> None:
    assert all(0.0 < p.search.accuracy < 1.0 for p in load_report(run).points)


def test_a_task_with_weight_0_is_shown_and_counts_nowhere(tmp_path: Path) -> None:
    found = {"dense:math": 31.7, "dense:base": 20.5, "search": float("inf")}
    report = load_report(make_with_text(tmp_path / "with", found))
    models: dict[str, tuple[Recipe, Sets]] = {
        "dense:math": (dense("math"), (right(300, 400), right(300, 400))),
        "dense:base": (dense("base"), (right(280, 400), right(280, 400))),
        "search": (CUT, (right(260, 400), right(260, 400))),
    }
    without = load_report(make_small(tmp_path / "without", models, tasks=("fresh", "fresh")))
    told = [(found.text, found.note) for found in map(headline, (report, without))]
    assert told[0] == told[1] and "keeps 87" in told[0][0]
    assert (report.holdout_tasks, report.has_other_holdout_tasks) == (("fresh",), False)
    for point, other in zip(report.points, without.points, strict=True):
        assert point.holdout is not None and other.holdout is not None
        assert replace(point.holdout, others=()) == other.holdout
    shown = [point_dict(report, point)["holdout"]["scores"] for point in report.points]
    assert [[score["task"] for score in scores] for scores in shown] == [["fresh", "language"]] * 3
    text = [(s["value"], s["best_dense"], s["retention_percent"]) for _, s in shown]
    assert text == [(31.7, 20.5, None), (20.5, 20.5, None), (float("inf"), 20.5, None)]
    task = [(s["best_dense"], s["retention_percent"]) for s, _ in shown]
    assert task == [(0.75, 100.0), (0.75, pytest.approx(93.33, abs=0.01)), (0.75, task[2][1])]
    rows = list(csv.DictReader(front_csv(report).splitlines()))
    assert {row["holdout:language:word_perplexity,none"] for row in rows} <= {"31.7", "20.5", "inf"}
    json.loads(to_json(front_dict(report)), parse_constant=pytest.fail)
