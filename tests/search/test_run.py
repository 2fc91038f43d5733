"""Whole searches on the tiny family: resumed after kill -9, with crashes, in a pool."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from gptailor import verbs
from gptailor.errors import TaskError, UsageError
from gptailor.evaluation.outcome import Evaluation
from gptailor.run.archive import Archive

EVALUATIONS = 70


def write_config(
    folder: Path, models: dict[str, str], tasks_dir: Path, output: Path, **search: object
) -> Path:
    data = {
        "models": models,
        "base": "base",
        "space": {
            "layers": {"min": 2},
            "merge": {"methods": ["linear", "task_arithmetic", "slerp", "ties"]},
        },
        "evaluation": {
            "tasks": ["t_shared", "t_long"],
            "include_path": str(tasks_dir),
            "holdout": {"tasks": ["t_differing"]},
            "device": "cpu",
        },
        "search": {"population": 12, "evaluations": EVALUATIONS, **search},
        "output": str(output),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def evaluations(run: Path) -> list[Evaluation]:
    with Archive(run, readonly=True) as archive:
        return archive.evaluations()


def front(run: Path) -> list[tuple[str, float, int]]:
    rows = json.loads((run / "front.json").read_text())["front"]
    return [(row["point"], row["search"]["accuracy"], row["parameters"]) for row in rows]


@pytest.fixture(scope="module")
def finished(
    models: dict[str, str], tasks_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An uninterrupted run."""
    root = tmp_path_factory.mktemp("finished")
    return verbs.search(write_config(root, models, tasks_dir, root / "run"))


def test_a_run_is_whole(finished: Path) -> None:
    found = evaluations(finished)
    scored = [e for e in found if e.documents == "search"]
    assert len(scored) == EVALUATIONS
    assert all(e.outcome.status == "ok" for e in found), [e.outcome.reason for e in found]
    assert len({e.recipe.hash for e in scored}) == EVALUATIONS
    names = ("config.yaml", "environment.json", "front.csv", "front.json", "report/index.html")
    for name in (*names, "report/front.png"):
        candidates = [finished / name, finished / Path(name).name]
        assert any(path.is_file() for path in candidates), name
    held = {e.recipe.hash for e in found if e.documents == "holdout"}
    assert {e.recipe.point for e in found if e.recipe.hash in held} >= {
        r[0] for r in front(finished)
    }
    for point, *_ in front(finished):
        assert (finished / "recipes" / f"{point}.yaml").is_file()


def test_accuracy_is_the_weighted_mean(finished: Path) -> None:
    for evaluation in evaluations(finished):
        scores = evaluation.outcome.scores
        mean = sum(s.value * s.weight for s in scores) / sum(s.weight for s in scores)
        assert evaluation.outcome.accuracy == pytest.approx(mean)


def test_kill_9_and_resume_find_the_same_front(
    finished: Path,
    models: dict[str, str],
    tasks_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both parts of the run also report to a supervisor what the archive gains."""
    gained = tmp_path / "gained"
    gained.touch()
    monkeypatch.setenv("GPTAILOR_GAINED", str(gained))
    config = write_config(tmp_path, models, tasks_dir, tmp_path / "run")
    command = [sys.executable, "-m", "gptailor.cli", "search", str(config)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
    archive = tmp_path / "run" / "archive.db"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
        if archive.exists() and _count(archive) >= 45:  # in the middle of the generations
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = _count(archive)
    assert 45 <= before < EVALUATIONS, (tmp_path / "log").read_text()
    # plus four measured candidates; it may have been killed before it reported the last result
    assert before + 4 - 1 <= gained.stat().st_size <= before + 4
    numbers = {(e.recipe.hash, e.documents): e.number for e in evaluations(tmp_path / "run")}
    verbs.search(config, resume=True)
    after = {(e.recipe.hash, e.documents): e.number for e in evaluations(tmp_path / "run")}
    assert all(after[key] == number for key, number in numbers.items())
    assert len(after) + 4 - 1 <= gained.stat().st_size <= len(after) + 4
    assert front(tmp_path / "run") == front(finished)
    scored = [
        {e.recipe.hash: e.outcome.accuracy for e in evaluations(run) if e.documents == "search"}
        for run in (finished, tmp_path / "run")
    ]
    assert scored[0] == scored[1]


def _count(archive: Path) -> int:
    try:
        with sqlite3.connect(f"{archive.as_uri()}?mode=ro", uri=True, timeout=10) as db:
            return int(db.execute("SELECT COUNT(*) FROM evaluations").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def test_a_pool_finds_the_same_front(
    finished: Path, models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, models, tasks_dir, tmp_path / "run")
    verbs.search(config, workers=2)
    assert front(tmp_path / "run") == front(finished)


def test_asynchronous_with_a_pool_uses_the_budget_and_resumes(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path, models, tasks_dir, tmp_path / "run", evaluations=30, schedule="asynchronous"
    )
    verbs.search(config, workers=2)
    before = evaluations(tmp_path / "run")
    assert len([e for e in before if e.documents == "search"]) == 30
    assert len({e.recipe.hash for e in before if e.documents == "search"}) == 30
    assert {"dense", "paper"} <= {arm.partition(":")[0] for e in before for arm in e.arms}
    verbs.search(config, overrides=["search.evaluations=40"], resume=True)  # without the pool
    after = evaluations(tmp_path / "run")
    assert len({e.recipe.hash for e in after if e.documents == "search"}) == 40
    assert [e.number for e in after[: len(before)]] == [e.number for e in before]


def test_usr2_ends_cleanly_and_resume_completes(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, models, tasks_dir, tmp_path / "run", evaluations=60)
    command = [sys.executable, "-m", "gptailor.cli", "search", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    archive = tmp_path / "run" / "archive.db"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
        if archive.exists() and _count(archive) >= 5:
            break
    process.send_signal(signal.SIGUSR2)
    began = _count(archive)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, (began, said)
    assert "Stopped before the time limit" in said
    assert 5 <= _count(archive) < 60
    verbs.search(config, resume=True)
    assert len([e for e in evaluations(tmp_path / "run") if e.documents == "search"]) == 60


def test_a_larger_budget_resumes(models: dict[str, str], tasks_dir: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, models, tasks_dir, tmp_path / "run", evaluations=12)
    verbs.search(config)
    with pytest.raises(UsageError, match="already holds a run"):
        verbs.search(config)
    verbs.search(config, overrides=["search.evaluations=20"], resume=True)
    assert len([e for e in evaluations(tmp_path / "run") if e.documents == "search"]) == 20
    with pytest.raises(UsageError, match=r"search.seed was 0, but is 1"):
        verbs.search(config, overrides=["search.seed=1"], resume=True)


CRASHING = """
def process_results(doc, results):
    scores = [score for score, _ in results]
    if scores[0] > scores[1] + 0.2:
        raise RuntimeError("this document broke the task")
    return {"acc": float(scores[0] < scores[1])}
"""


def crashing_task(folder: Path, tasks_dir: Path, condition: str) -> Path:
    folder.mkdir()
    for name in ("data.json", "load.py"):
        (folder / name).write_text((tasks_dir / name).read_text())
    code = CRASHING.replace("scores[0] > scores[1] + 0.2", condition)
    (folder / "crash.py").write_text(code)
    (folder / "t_crash.yaml").write_text(
        "task: t_crash\ncustom_dataset: !function load.rows\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{ctx}}'\ndoc_to_choice: '{{options}}'\n"
        "doc_to_target: '{{gold}}'\nprocess_results: !function crash.process_results\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return folder


def test_a_crash_is_a_failed_evaluation_without_a_score(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    condition = "doc['ctx'][:1] == 'w' and round(scores[0] * 1e4) % 40 == 0"
    tasks = crashing_task(tmp_path / "tasks", tasks_dir, condition)
    config = write_config(tmp_path, models, tasks, tmp_path / "run", evaluations=40)
    only = ["evaluation.tasks=[t_crash]", "evaluation.holdout=null"]
    verbs.search(config, overrides=only)
    found = evaluations(tmp_path / "run")
    failed = [e for e in found if e.outcome.status == "failed"]
    assert failed
    assert len(failed) < len(found)
    for evaluation in failed:
        assert evaluation.outcome.accuracy is None
        assert evaluation.outcome.scores == ()
        assert "this document broke the task" in evaluation.outcome.reason
        assert "Traceback" in evaluation.outcome.reason
    assert "this document broke the task" in capfd.readouterr().err
    assert not {e.recipe.point for e in failed} & {point for point, *_ in front(tmp_path / "run")}


def test_when_everything_fails_the_search_stops_and_says_why(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    # true for all of a model's results, but not for a trial without a model
    tasks = crashing_task(tmp_path / "tasks", tasks_dir, "scores[0] != -1.2345678")
    config = write_config(tmp_path, models, tasks, tmp_path / "run")
    only = ["evaluation.tasks=[t_crash]", "evaluation.holdout=null"]
    with pytest.raises(TaskError, match="this document broke the task"):
        verbs.search(config, overrides=only)


def test_changed_weights_are_noticed(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    import shutil

    mine = {name: str(tmp_path / name) for name in models}
    for name, folder in models.items():
        shutil.copytree(folder, mine[name])
    config = write_config(tmp_path, mine, tasks_dir, tmp_path / "run", evaluations=5)
    verbs.search(config)
    path = tmp_path / "red" / "model.safetensors"
    os.utime(path, ns=(1, 1))
    with pytest.raises(UsageError, match="the model files changed"):
        verbs.search(config, resume=True)
