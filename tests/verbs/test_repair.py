"""Repairs as users meet them: `stitch` of a recipe with a repair, and a search that repairs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptailor import cli, verbs
from gptailor.errors import ModelError, UsageError
from gptailor.recipe import CalibrationDocuments, CalibrationTask, Recipe, Repair, Take
from gptailor.recipe.repair import RepairedLayers
from gptailor.report.front_model import load_report
from gptailor.run.archive import Archive

KEPT = (0, 1, 4, 5)
NUM_SCORED = 8


@pytest.fixture
def calibration(tasks_dir: Path) -> CalibrationDocuments:
    return CalibrationDocuments(
        (CalibrationTask("t_long"),), str(tasks_dir), documents=12, skip=NUM_SCORED
    )


def cut(models: dict[str, str], repair: Repair | None) -> Recipe:
    layers = tuple(Take("red", layer) for layer in KEPT)
    return Recipe(models, "base", layers, "base", "base", repair=repair)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def written(recipe: Recipe, path: Path) -> Path:
    path.write_text(recipe.to_yaml())
    return path


@pytest.mark.parametrize("layers", ["gaps", "alternate", "after", "all"])
def test_a_stitched_repair_is_a_stock_model(
    models: dict[str, str],
    calibration: CalibrationDocuments,
    tmp_path: Path,
    layers: RepairedLayers,
) -> None:
    from transformers import AutoModelForCausalLM

    recipe = cut(models, Repair(calibration, layers, ridge=0.01))
    out = verbs.stitch(written(recipe, tmp_path / "recipe.yaml"), tmp_path / "out")
    plain = verbs.stitch(
        written(cut(models, None), tmp_path / "plain.yaml"), tmp_path / "plain", verify=False
    )
    new = AutoModelForCausalLM.from_pretrained(out).state_dict()
    old = AutoModelForCausalLM.from_pretrained(plain).state_dict()
    changed = {name for name in new if not new[name].equal(old[name])}
    parts = {"gaps": (), "alternate": (3,), "after": (2, 3), "all": (0, 2, 3)}[layers]
    down = {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, *parts)}
    assert changed == down
    card = (out / "README.md").read_text()
    assert "Repaired without training" in card
    assert "| output layer | distance to the teachers before | after |" in card


def test_the_same_recipe_gives_the_same_bytes(
    models: dict[str, str], calibration: CalibrationDocuments, tmp_path: Path
) -> None:
    path = written(cut(models, Repair(calibration)), tmp_path / "recipe.yaml")
    first = verbs.stitch(path, tmp_path / "first", verify=False)
    again = verbs.stitch(path, tmp_path / "again", verify=False)
    assert digest(first) == digest(again)
    # the recipe in the result names teachers and documents, and builds the same model
    resolved = first / "gptailor_recipe.yaml"
    repair = yaml.safe_load(resolved.read_text())["repair"]
    assert repair["teachers"]["t_long"] in models
    assert len(repair["calibration"]["digest"]) == 16
    assert digest(verbs.stitch(resolved, tmp_path / "third", verify=False)) == digest(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again", "first", "recipe.yaml", "third",
    ]  # fmt: skip


def test_other_documents_than_the_recipes_are_refused(
    models: dict[str, str], calibration: CalibrationDocuments, tmp_path: Path
) -> None:
    from dataclasses import replace

    other = replace(calibration, digest="0123456789abcdef")
    path = written(cut(models, Repair(other)), tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match="not those that the recipe was made with"):
        verbs.stitch(path, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_scale_beside_a_repair_is_refused(
    models: dict[str, str], calibration: CalibrationDocuments, tmp_path: Path
) -> None:
    layers = (Take("red", 0, scale=0.9), Take("red", 2))
    recipe = Recipe(models, "base", layers, "base", "base", repair=Repair(calibration))
    with pytest.raises(UsageError, match="leave out scale or repair"):
        verbs.stitch(written(recipe, tmp_path / "recipe.yaml"), tmp_path / "out", verify=False)


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on there is no room for the file of a repair."""
    real = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        if "repair" in Path(f"/proc/self/fd/{fd}").readlink().name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)


def test_a_full_disk_leaves_nothing_behind(
    models: dict[str, str],
    calibration: CalibrationDocuments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = written(cut(models, Repair(calibration)), tmp_path / "recipe.yaml")
    fill_disk(monkeypatch)
    assert cli.main(["stitch", str(path), str(tmp_path / "out"), "--no-verify"]) == 4
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.fixture
def configured(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    def make(**changes: Any) -> dict[str, Any]:
        evaluation = {
            "tasks": ["t_long"],
            "include_path": str(tasks_dir),
            "holdout": {"tasks": ["t_differing"]},
            "rungs": [NUM_SCORED],
            "device": "cpu",
        }
        config: dict[str, Any] = {
            "models": {name: models[name] for name in ("base", "red", "green")},
            "base": "base",
            "space": {"layers": {"min": 3}},
            "evaluation": evaluation,
            "search": {
                "population": 4,
                "evaluations": 22,
                "arms": ["block_influence", "uniform"],
                "arm_sizes": [0.67],
                "schedule": "generational",
            },
            "output": str(tmp_path / "run"),
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            config[section][name] = value
        (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
        return config

    return make


def search(tmp_path: Path, *words: str) -> int:
    return cli.main(["search", str(tmp_path / "search.yaml"), *words])


def test_a_search_repairs(
    configured: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configured()
    assert search(tmp_path) == 0
    run = tmp_path / "run"
    with Archive(run, readonly=True) as archive:
        rows = archive.evaluations("search")
        front = archive.evaluations("front")
        holdout = archive.evaluations("holdout")
    arms = {arm: row for row in rows for arm in row.arms}
    assert "refit:1" in arms
    assert {"block_influence:0.67@refit", "block_influence:0.67@refit+repair"} <= set(arms)
    assert "uniform:0.67+repair" in arms
    assert "uniform:1+repair" not in arms  # nothing is cut
    children = [row for row in rows if not row.arms]
    assert children
    for row in children:  # all that drop a layer have one repair, with named teachers
        is_cut = row.recipe.src_layers != tuple(range(6))
        assert (row.recipe.repair is not None) == is_cut
    repairs = {row.recipe.repair for row in rows} - {None}
    assert len(repairs) == 1
    (repair,) = repairs
    assert repair is not None
    assert isinstance(repair.teachers, tuple)
    teachers = dict(repair.teachers)
    assert set(teachers) == {"t_long", "text"}
    assert teachers["t_long"] in ("base", "red", "green", "refit")
    assert teachers["text"] == "base"
    assert all(row.outcome.status == "ok" for row in rows)
    # the front is repaired again with more documents
    assert front
    for row in front:
        more = row.recipe.repair
        assert more is not None
        assert row.recipe.with_repair(repair).hash in {other.recipe.hash for other in rows}
        assert more.teachers == repair.teachers
        assert (repair.layers, more.layers) == ("alternate", "after")
        assert more.calibration.documents > repair.calibration.documents
        assert more.calibration.tokens > repair.calibration.tokens
        assert all(arm.endswith(f"+repair({more.calibration.documents})") for arm in row.arms)
    dense = {row.recipe.hash for arm, row in arms.items() if arm.startswith("dense:")}
    assert len(dense) == 3
    assert dense <= {row.recipe.hash for row in holdout}
    # the base's text is measured, but does not count
    for row in holdout:
        task, language = row.outcome.scores
        assert language.task == "language"
        assert language.value > 1.0
        assert row.outcome.accuracy == task.value
    # what is scored on the holdout is scored there without its repair, too
    plain = {row.recipe.hash for row in holdout}
    assert all(row.recipe.with_repair(None).hash in plain for row in holdout)
    point = next(p for p in load_report(run).front if p.recipe.repair is not None)
    assert point.plain is not None
    (shown,) = [p for p in json.loads((run / "front.json").read_text())["front"]
                if p["point"] == point.id]  # fmt: skip
    assert shown["repair"]["out_layers"][-1] == point.layers - 1
    assert shown["repair"]["teachers"] == dict(point.recipe.repair.teachers)  # type: ignore[union-attr, arg-type]
    # a stitched point scores what the search has recorded
    best = max(
        (row for row in rows if row.recipe.repair), key=lambda row: row.outcome.accuracy or 0
    )
    out = verbs.stitch(run, tmp_path / "out", point=best.recipe.point, verify=False)
    scores = verbs.evaluate(str(out), like=str(run / "config.yaml"))
    assert scores[0].value == best.outcome.scores[0].value
    assert scores[0].values == best.outcome.scores[0].values
    # the same search again is refused, and resumed it has nothing to do
    assert search(tmp_path) == 2
    capsys.readouterr()
    assert search(tmp_path, "--resume") == 0
    assert cli.main(["search", str(run / "config.yaml"), "--resume"]) == 0


def test_a_resumed_search_ends_at_the_same_front(
    configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    configured()
    assert search(tmp_path, "search.evaluations=13") == 0
    assert search(tmp_path, "--resume") == 0
    whole = str(tmp_path / "whole")
    assert search(tmp_path, f"output={whole}", "--workers", "2") == 0
    fronts = []
    for place in ("run", "whole"):
        with Archive(tmp_path / place, readonly=True) as archive:
            rows = archive.evaluations("search")
        # the refitted candidate lies in another folder, so hashes differ
        fronts.append([(row.recipe.src_layers, row.outcome.accuracy) for row in rows])
    assert sorted(fronts[0]) == sorted(fronts[1])


def test_a_search_that_is_killed_while_it_refits_begins_again(
    configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    configured(search__evaluations=10)
    words = [sys.executable, "-m", "gptailor.cli", "search", str(tmp_path / "search.yaml")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Making one more candidate"):
            break
    time.sleep(0.5)
    process.kill()
    process.wait()
    run = tmp_path / "run"
    assert not (run / "refit").exists()
    assert not (run / "archive.db").exists()
    assert search(tmp_path) == 0  # without --resume: nothing had begun
    assert not [path for path in run.iterdir() if "repair" in path.name]


def test_automatic_repairs_are_off_where_nothing_is_left_to_read(
    configured: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configured(evaluation__rungs=[24], search__evaluations=8)
    assert search(tmp_path) == 0
    assert "Nothing is repaired: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "refit").exists()
    with Archive(tmp_path / "run", readonly=True) as archive:
        assert all(row.recipe.repair is None for row in archive.evaluations())
    assert search(tmp_path, "--resume", "search.evaluations=10") == 0


def test_a_full_disk_ends_a_search_only_if_it_asks_for_repairs(
    configured: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill_disk(monkeypatch)
    configured(space__repair={"layers": "gaps"}, search__evaluations=6)
    assert search(tmp_path) == 4
    configured(search__evaluations=6)
    assert search(tmp_path) == 0
    assert "Nothing is repaired: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "refit").exists()


def test_a_run_of_an_earlier_version_is_resumed_without_repairs(
    configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    configured(space__repair=False, search__evaluations=8)
    assert search(tmp_path) == 0
    path = tmp_path / "run" / "config.yaml"
    recorded = yaml.safe_load(path.read_text())
    del recorded["space"]["repair"]
    path.write_text(yaml.safe_dump(recorded))
    configured(search__evaluations=10)
    assert search(tmp_path, "--resume") == 0
    with Archive(tmp_path / "run", readonly=True) as archive:
        assert all(row.recipe.repair is None for row in archive.evaluations())


@pytest.mark.parametrize(
    ("repair", "rungs", "message"),
    [
        ({"layers": "all"}, [], "space.repair has nothing to read"),
        ({"layers": "all"}, [24], "t_long has no documents left besides the 24"),
        ({"calibration": {"tasks": ["t_lnog"]}}, [8], "t_lnog"),
        ({"calibration": {"text": "nowhere.txt"}}, [8], "nowhere.txt can't be read"),
        ({"layer": "all"}, [8], "did you mean 'layers'"),
        ({"ridge": 0}, [8], "space.repair.ridge"),
    ],
)
def test_what_a_search_refuses(
    configured: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    repair: dict[str, Any],
    rungs: list[int],
    message: str,
) -> None:
    configured(space__repair=repair, evaluation__rungs=rungs)
    assert search(tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "archive.db").exists()


def test_the_name_of_the_refitted_candidate_is_taken(
    configured: Callable[..., dict[str, Any]],
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configured(models__refit=models["blue"])
    assert search(tmp_path) == 2
    assert "the name refit is taken" in capsys.readouterr().err
    configured(models__refit=models["blue"], space__repair={"refit": False})
    assert search(tmp_path, "search.evaluations=6") == 0


def test_one_model_is_repaired_without_a_refit(
    configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = configured(search__evaluations=8)
    config["models"] = {"base": config["models"]["base"]}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
    assert search(tmp_path) == 0
    with Archive(tmp_path / "run", readonly=True) as archive:
        repaired = [row for row in archive.evaluations("search") if row.recipe.repair]
    assert repaired
    assert not (tmp_path / "run" / "refit").exists()


def test_one_model_of_an_architecture_that_cannot_be_repaired(
    configured: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There is no refit that would have found it out before the search."""

    def differ(*_: object) -> None:
        raise ModelError("The layers of this architecture depend on more.")

    monkeypatch.setattr("gptailor.evaluation.repair.repairer.check_replay", differ)
    config = configured(search__evaluations=6)
    config["models"] = {"base": config["models"]["base"]}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
    assert search(tmp_path) == 0
    assert "Nothing is repaired: The layers of this" in capsys.readouterr().err
    with Archive(tmp_path / "run", readonly=True) as archive:
        assert all(row.recipe.repair is None for row in archive.evaluations())
    assert search(tmp_path, f"output={tmp_path / 'asked'}", "space.repair={layers: gaps}") == 3


# What is made before a search


def texts(tmp_path: Path) -> dict[str, list[dict[str, str]]]:
    folder = tmp_path / "run" / "texts"
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.iterdir())
    }


def test_the_base_writes_a_text_once(
    configured: Callable[..., dict[str, Any]], models: dict[str, str], tmp_path: Path
) -> None:
    configured(search__evaluations=6)
    assert search(tmp_path) == 0
    written = texts(tmp_path)
    assert set(written) == {"calibration", "holdout"}
    assert len(written["calibration"]) == 4096 // 128
    assert all(row["by"] == models["base"] for rows in written.values() for row in rows)
    ours, theirs = ({row["text"] for row in rows} for rows in written.values())
    assert ours.isdisjoint(theirs)
    assert search(tmp_path, "--resume", "search.evaluations=8") == 0
    assert texts(tmp_path) == written


@pytest.mark.parametrize("given", ["file", False])
def test_a_text_of_the_user_or_none(
    configured: Callable[..., dict[str, Any]], tmp_path: Path, tasks_dir: Path, given: Any
) -> None:
    text = str(tasks_dir / "data.json") if given == "file" else False
    configured(space__repair={"calibration": {"text": text}}, search__evaluations=14)
    assert search(tmp_path) == 0
    assert set(texts(tmp_path)) == {"holdout"}
    with Archive(tmp_path / "run", readonly=True) as archive:
        repairs = [row.recipe.repair for row in archive.evaluations("search")]
    found = {repair.calibration.text for repair in repairs if repair is not None}
    assert found == {text or None}


def test_a_holdout_with_a_text_gets_no_other(
    configured: Callable[..., dict[str, Any]], tmp_path: Path, tasks_dir: Path
) -> None:
    own = {"task": "own", "text": str(tasks_dir / "data.json"), "weight": 0}
    configured(
        evaluation__holdout={"tasks": ["t_differing", own]},
        space__repair={"calibration": {"text": False}},
        search__evaluations=6,
    )
    assert search(tmp_path) == 0
    assert not (tmp_path / "run" / "texts").exists()
    with Archive(tmp_path / "run", readonly=True) as archive:
        for row in archive.evaluations("holdout"):
            assert [score.task for score in row.outcome.scores] == ["t_differing", "own"]


def test_a_text_that_is_scored_is_not_read(
    configured: Callable[..., dict[str, Any]],
    tmp_path: Path,
    tasks_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = str(tasks_dir / "data.json")
    configured(
        evaluation__holdout={"tasks": ["t_differing", {"task": "own", "text": text, "weight": 0}]},
        space__repair={"calibration": {"text": text}},
        search__evaluations=6,
    )
    assert search(tmp_path) == 2
    assert "A document of the text" in capsys.readouterr().err


def test_a_refit_of_another_configuration_is_made_again(
    configured: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A search that was stopped after making it, before anything was recorded."""
    configured(search__evaluations=6)
    assert search(tmp_path) == 0
    run = tmp_path / "run"
    (run / "archive.db").unlink()
    made = digest(run / "refit")
    capsys.readouterr()
    assert search(tmp_path) == 0
    assert "Making one more candidate" not in capsys.readouterr().err
    assert digest(run / "refit") == made
    (run / "archive.db").unlink()
    assert search(tmp_path, "space.repair={ridge: 3.0}") == 0
    assert "made with another configuration: making it again" in capsys.readouterr().err
    assert digest(run / "refit") != made


def test_no_more_is_read_for_the_front_if_that_is_off(
    configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    configured(space__repair={"calibration": {"front": False}}, search__evaluations=8)
    assert search(tmp_path) == 0
    with Archive(tmp_path / "run", readonly=True) as archive:
        assert archive.evaluations("front") == []
