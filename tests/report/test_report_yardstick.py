"""Each set of documents has its own best dense candidate; near chance there are no percentages."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptailor.evaluation.outcome import Cost, Outcome, Score
from gptailor.recipe import Recipe, Take
from gptailor.report import front_table, load_report
from gptailor.report.export import front_csv, front_dict, to_json, write_front
from gptailor.report.headline import headline
from gptailor.report.measured import Figure, Measured, figure, measured_of
from gptailor.report.page import page_html
from gptailor.run.archive import Archive
from gptailor.verbs.runs import worth_a_holdout
from tests.report.report_runs import (
    CUT,
    LAYERS,
    NINE,
    Sets,
    add,
    dense,
    make_small,
    near_chance,
    recipe_of,
    right,
)

# math is the best dense candidate on the search's documents, but knows nothing on the holdout.
OTHER_IS_BEST: dict[str, tuple[Recipe, Sets]] = {
    "dense:math": (dense("math"), (right(300, 500), right(50, 2500))),
    "dense:code": (dense("code"), (right(200, 500), right(500, 2500))),
    "angular:0.75@math": (CUT, (right(150, 500), right(70, 2500))),
    "search": (NINE, (right(280, 500), right(470, 2500))),
}


def test_the_holdout_has_its_own_best_dense_candidate(tmp_path: Path) -> None:
    """What once read "they keep 940 % and 140 %" is 94 % and 14 % of the holdout's own best."""
    report = load_report(make_small(tmp_path, OTHER_IS_BEST))
    assert (report.search.name, report.holdout.name) == ("math", "code")
    found = headline(report)
    assert found.text.startswith(
        "At 75 % of the layers (9 of 12) the best stitched model keeps 93 ± 1 % of the best dense "
        "candidate; the best simple pruning keeps 50 ± 3 %; the difference is 43 ± 3 points."
    )
    assert found.note.startswith(
        "On the holdout, which has other tasks (fresh) and had no part in the choice, the stitched "
        "model keeps 94 ± 1 % of the best dense candidate there (code), the pruning keeps 14 ± 2 %;"
    )
    write_front(report, tmp_path)
    everything = front_table(report) + page_html(report) + (tmp_path / "front.csv").read_text()
    assert "940" not in everything and "1000" not in re.sub(r"(\d)[,.](\d)", r"\1\2", found.note)
    (row,) = [line for line in front_table(report).splitlines() if line.startswith(NINE.point)]
    assert row.split()[6:9] == ["93.3", "0.188", "94.0"]


def test_the_same_tasks_are_not_called_other_tasks(tmp_path: Path) -> None:
    report = load_report(make_small(tmp_path, OTHER_IS_BEST, tasks=("same", "same")))
    assert headline(report).note.startswith("On the holdout documents, which had no part in the")


@pytest.mark.parametrize(
    ("chance", "level", "words"),
    [
        (0.25, 110, ["is 18 ± 2 points above chance", "is 0 ± 2 points above chance"]),
        (0.25, 95, ["is 14 ± 2 points above chance", "is 4 ± 2 points below chance"]),
        (0.0, 3, ["is 16 ± 2 points above chance"]),
        (None, 3, ["has an accuracy of 0.158 ± 0.018", "The best dense candidate has an accuracy"]),
    ],
)
def test_near_chance_there_are_no_percentages(
    tmp_path: Path, chance: float | None, level: int, words: list[str]
) -> None:
    models = near_chance(level, 5 if level > 10 else 1)
    report = load_report(make_small(tmp_path, models, chance=chance))
    assert report.search.is_near_chance and report.holdout.is_near_chance
    found = headline(report)
    for word in words:
        assert word in found.text + found.note
    said = found.text.replace("75 % of the layers", "") + found.note
    assert "%" not in said
    assert "so a percentage of it would say nothing" in found.note
    table = front_table(report)
    (row,) = [line for line in table.splitlines() if line.startswith(NINE.point)]
    above = "-" if chance is None else f"{100 * (report.front[0].search.accuracy - chance):.1f}"
    assert row.split()[6] == above
    assert "kept %" not in table and "points: of accuracy above chance" in table
    write_front(report, tmp_path)
    rows = list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
    assert all(r["retention_percent"] == r["holdout_retention_percent"] == "" for r in rows)
    data = json.loads((tmp_path / "front.json").read_text())
    for point in data["front"] + data["control_arms"]:
        for measured in (point["search"], point["holdout"]):
            assert measured["retention_percent"] is None
            assert all(score["retention_percent"] is None for score in measured["scores"])
            assert (measured["above_chance_points"] is None) == (chance is None)


def test_percentages_are_of_accuracy_if_it_is_clearly_above_chance(tmp_path: Path) -> None:
    report = load_report(make_small(tmp_path, OTHER_IS_BEST, chance=0.05))
    assert not report.search.is_near_chance
    point = next(p for p in report.points if p.id == NINE.point)
    assert point.search.retention == pytest.approx(100 * 280 / 300)
    assert point.search.above_chance == pytest.approx(51.0)


def test_a_task_is_compared_with_the_candidate_that_is_best_at_it(tmp_path: Path) -> None:
    """It has no percentage if that candidate is near chance, even if the accuracy has one."""
    values = {
        "dense:math": (dense("math"), right(300, 400), right(101, 400), right(9, 400)),
        "dense:code": (dense("code"), right(90, 400), right(200, 400), right(4, 400)),
        "search": (NINE, right(270, 400), right(190, 400), right(200, 400)),
    }
    with Archive(tmp_path) as archive:
        for name, (recipe, *tasks) in values.items():
            if ":" in name:
                archive.add_arm(name, recipe)
            scores = tuple(
                Score(task, "acc", sum(v) / 400, 0.02, 400, 1.0, tuple(v), (), 0.02)
                for task, v in zip(("count", "write", "fly"), tasks, strict=True)
            )
            accuracy = sum(s.value for s in scores) / 3
            add(archive, recipe, "search", Outcome("ok", accuracy, scores, "", Cost()))
    report = load_report(tmp_path)
    assert report.search.name == "math"
    point = next(p for p in report.points if p.id == NINE.point)
    kept = [report.search.kept_of_task(score) for score in point.search.scores]
    assert kept == [pytest.approx(90.0), pytest.approx(95.0), None]


def test_an_unfinished_holdout_has_no_best_yet(tmp_path: Path) -> None:
    """The best of some of the dense candidates may not be the best of all."""
    recipe, (search, _) = OTHER_IS_BEST["dense:code"]
    report = load_report(
        make_small(tmp_path, {**OTHER_IS_BEST, "dense:code": (recipe, (search, None))})
    )
    assert report.holdout.is_partial and not report.search.is_partial
    assert {p.holdout.retention for p in report.points if p.holdout} == {None}
    note = headline(report).note
    assert "the stitched model has an accuracy of 0.188 ± 0.008, the pruning has" in note
    assert "Not every dense candidate has been scored there yet, so there are no perc" in note
    with Archive(tmp_path) as archive:  # no waiting for one that can't be scored
        add(archive, recipe, "holdout", Outcome("failed", None, (), "no", Cost()))
    assert load_report(tmp_path).holdout.name == "math"


# Standard errors

Leaves = tuple[tuple[int, float], ...]


def measured(rng: np.random.Generator, skill: float, leaves: Leaves) -> Measured:
    """A task with weighted leaves, and one of another weight; a hard document is hard for all."""
    scores = []
    for task, weight, parts in (("a", 1.0, leaves), ("b", 3.0, ((150, 1.0),))):
        values: list[float] = []
        means = []
        for i, (count, _) in enumerate(parts):
            hard = np.random.default_rng([7, ord(task), i]).random(count)
            found = (hard + rng.normal(0, 0.1, count) < skill).astype(float)
            means.append(found.mean())
            values += found.tolist()
        value = sum(w * m for (_, w), m in zip(parts, means, strict=True))
        told = parts if len(parts) > 1 else ()
        scores.append(Score(task, "acc", value, 0.03, len(values), weight, tuple(values), told))
    accuracy = (scores[0].value + 3 * scores[1].value) / 4
    found_outcome = measured_of(Outcome("ok", accuracy, tuple(scores), "", Cost()))
    assert found_outcome is not None
    return found_outcome


def resampled(rng: np.random.Generator, models: list[Measured], leaves: Leaves) -> np.ndarray:
    """Accuracies of all models on the same documents, resampled within each leaf."""
    total = np.zeros(len(models))
    for i, (weight, parts) in enumerate(((0.25, leaves), (0.75, ((150, 1.0),)))):
        values = np.array([m.scores[i].values for m in models])
        begin = 0
        for count, part in parts:
            drawn = begin + rng.integers(0, count, count)
            total += weight * part * values[:, drawn].mean(1)
            begin += count
    return total


def test_errors_match_a_bootstrap_over_the_documents() -> None:
    leaves = ((60, 0.5), (200, 0.5))
    rng = np.random.default_rng(0)
    one, other, best = (measured(rng, skill, leaves) for skill in (0.55, 0.4, 0.7))
    drawn = np.array([resampled(rng, [one, other, best], leaves) for _ in range(4000)])
    a, b, c = (m.accuracy for m in (one, other, best))
    difference = figure(a - b, [(1.0, one), (-1.0, other)])
    assert difference.is_paired
    assert difference.stderr == pytest.approx((drawn[:, 0] - drawn[:, 1]).std(), rel=0.06)
    ratio = figure(a / c, [(1 / c, one), (-a / c**2, best)])
    assert ratio.stderr == pytest.approx((drawn[:, 0] / drawn[:, 2]).std(), rel=0.06)
    both = figure((a - b) / c, [(1 / c, one), (-1 / c, other), (-(a - b) / c**2, best)])
    assert both.stderr == pytest.approx(((drawn[:, 0] - drawn[:, 1]) / drawn[:, 2]).std(), rel=0.06)
    alone = [figure(m.accuracy, [(1.0, m)]).stderr or 0.0 for m in (one, other)]
    assert (difference.stderr or 1.0) < 0.7 * math.hypot(*alone)  # the gain from pairing


def test_the_paired_error_is_that_of_the_differences(tmp_path: Path) -> None:
    report = load_report(make_small(tmp_path, OTHER_IS_BEST))
    points = {p.id: p for p in report.points}
    one, other = points[NINE.point].search, points[CUT.point].search
    by_document = np.subtract(one.scores[0].values, other.scores[0].values)
    found = figure(0.0, [(1.0, one), (-1.0, other)]).stderr
    assert found == pytest.approx(by_document.std(ddof=1) / np.sqrt(len(by_document)))


def test_a_model_against_itself_has_no_error(tmp_path: Path) -> None:
    for keep in (True, False):
        report = load_report(make_small(tmp_path / str(keep), OTHER_IS_BEST, keep=keep))
        best = next(p for p in report.points if p.id == report.search.point)
        kept = report.search.kept(best.search)
        assert kept is not None and (kept.value, kept.stderr) == (100.0, 0.0)


def test_leaves_of_one_document_are_pooled() -> None:
    """A small rung may have one document of each of many tasks; lm-eval has no error then."""
    values = [(0.0, 1.0, 1.0, 0.0, 1.0), (0.0, 0.0, 1.0, 0.0, 0.0)]
    leaves = ((1, 0.4), (1, 0.3), (3, 0.3))
    scores = [
        Score("t", "acc", 0.4 * v[0] + 0.3 * v[1] + 0.1 * sum(v[2:]), None, 5, 1.0, v, leaves)
        for v in values
    ]
    one, other = (Measured(s.value, None, (s,)) for s in scores)
    found = figure(one.accuracy - other.accuracy, [(1.0, one), (-1.0, other)])
    weighted = 5 * np.array([0.4, 0.3, 0.1, 0.1, 0.1]) * (np.array(values[0]) - np.array(values[1]))
    assert found.stderr == pytest.approx(weighted.std(ddof=1) / np.sqrt(5))


def test_without_values_models_are_called_independent(tmp_path: Path) -> None:
    """Like in archives from before documents had values."""
    old = load_report(make_small(tmp_path / "old", OTHER_IS_BEST, keep=False))
    new = load_report(make_small(tmp_path / "new", OTHER_IS_BEST))
    said = "Its error treats the two models as independent"
    assert said in headline(old).note and said not in headline(new).note
    assert old.points[0].search.chance is None
    points = {p.id: p.search for p in old.points}
    one, other = points[NINE.point], points[CUT.point]
    found = figure(0.0, [(1.0, one), (-1.0, other)])
    assert not found.is_paired
    assert found.stderr == pytest.approx(np.hypot(one.stderr or 0, other.stderr or 0))


SCORE = Score("t", "acc", 0.5, 0.02, 500, 1.0, tuple(right(250, 500)), (), 0.0)


@pytest.mark.parametrize(
    "score",
    [
        replace(SCORE, task="other"),
        replace(SCORE, metric="acc_norm"),
        replace(SCORE, weight=2.0),
        replace(SCORE, values=tuple(right(10, 499))),
        replace(SCORE, values=()),
        replace(SCORE, leaves=((100, 0.5), (400, 0.5))),
    ],
)
def test_other_documents_are_not_compared_one_by_one(score: Score) -> None:
    one = Measured(0.5, 0.02, (SCORE,))
    other = Measured(0.5, 0.02, (score,))
    assert not figure(0.0, [(1.0, one), (-1.0, other)]).is_paired
    assert figure(0.0, [(1.0, one), (-1.0, replace(one, scores=(replace(SCORE),)))]).is_paired


def test_what_is_noise() -> None:
    assert Figure(0.0, 0.0).is_noise
    assert Figure(-2.0, 1.0).is_noise
    assert not Figure(2.1, 1.0).is_noise
    assert not Figure(0.0, None).is_noise


def test_a_difference_within_the_holdouts_noise_is_called_that(tmp_path: Path) -> None:
    """The search chose its model on its own documents, so the difference on them flatters it."""
    models = dict(OTHER_IS_BEST)
    models["search"] = (NINE, (right(280, 500), right(74, 2500, 30)))
    note = headline(load_report(make_small(tmp_path, models))).note
    assert "the difference is 1 ± 2 points. That" in note
    assert "That difference is within the noise (two standard errors)." in note


def test_of_equal_models_the_headline_has_the_one_with_a_holdout(tmp_path: Path) -> None:
    twin = recipe_of([Take("code", i + 3) for i in range(9)])
    models = {"random:0.75@code": (twin, (right(150, 500), None)), **OTHER_IS_BEST}
    found = headline(load_report(make_small(tmp_path, models)))
    assert found.control is not None and found.control.id == CUT.point
    assert len(CUT.src_layers) == LAYERS - 3


def test_what_is_scored_on_the_holdout(tmp_path: Path) -> None:
    """All dense candidates, even failed ones, and the best stitched model and arm of a size."""
    weak = recipe_of([Take("chat", i) for i in range(9)])
    models: dict[str, tuple[Recipe, Sets]] = {
        **{name: (recipe, (sets[0], None)) for name, (recipe, sets) in OTHER_IS_BEST.items()},
        "search": (NINE, (right(140, 500), None)),  # worse than the pruning of that size
        "search2": (weak, (right(130, 500), None)),
    }
    with Archive(make_small(tmp_path, models)) as archive:
        archive.add_arm("dense:chat", dense("chat"))
        add(archive, dense("chat"), "search", Outcome("failed", None, (), "no", Cost()))
        chosen = worth_a_holdout(archive.evaluations("search"))
    names = {e.recipe.hash for e in chosen}
    assert names == {r.hash for r in (*map(dense, ("math", "code", "chat")), NINE, CUT)}
    assert len(chosen) == len(names)


def test_names_in_the_headline_are_plain(tmp_path: Path) -> None:
    """A model or task may be called anything; none of it reaches a terminal as a command."""
    name = "\x1b[31m<img>\u202e" + "x" * 500
    models = dict(OTHER_IS_BEST)
    models[f"dense:{name}"] = models.pop("dense:code")
    report = load_report(make_small(tmp_path, models, tasks=("seen", "\x1b]0;\x07" + "y" * 500)))
    note = headline(report).note
    assert note.isprintable() and "[31m<img>" in note and len(note) < 600
    assert "\x1b" not in front_table(report) and "<img>" not in page_html(report)


@pytest.mark.parametrize("odd", [1e300, -1e300, 5e-324, 0.0])
@pytest.mark.parametrize("accuracy", [1e300, 5e-324, 0.5])
def test_absurd_numbers_break_nothing(tmp_path: Path, odd: float, accuracy: float) -> None:
    """Anybody may have written an island's journal."""
    with Archive(tmp_path) as archive:
        for recipe, arm, values in (
            (dense("math"), "dense:math", (odd, 1.0, 1.0)),
            (CUT, "angular:0.75@math", (1.0, odd, 0.0)),
            (NINE, "", (0.0, odd, -odd)),
        ):
            if arm:
                archive.add_arm(arm, recipe)
            leaves = ((1, 0.5), (2, 0.5)) if odd > 0.0 else ()
            score = Score("t", "acc", accuracy, None, 3, odd or 1.0, values, leaves, odd)
            add(archive, recipe, "search", Outcome("ok", accuracy, (score,), "", Cost()))
    report = load_report(tmp_path)
    assert headline(report).text and front_table(report)
    to_json(front_dict(report))
    assert front_csv(report)
