"""Faults on one machine: a worker that dies, signals; finished evaluations are kept."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from gptailor import cli
from gptailor.config import parse_config
from gptailor.errors import ModelError
from gptailor.evaluation.similarity import Similarity
from gptailor.execution import pool as processes
from gptailor.execution.executor import EvaluationJob, Job, SimilarityJob
from gptailor.execution.local import InProcess
from gptailor.execution.pool import LocalPool
from gptailor.recipe import Recipe, Take
from gptailor.run.archive import Archive

CODES = {"worker": 5, "int": 130, "term": 143}


def children(pid: int) -> list[int]:
    """A pool's worker processes, oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_text()
        except (OSError, IndexError):
            continue
        if parent == pid and "spawn_main" in command:
            found.append(int(stat.parent.name))
    return sorted(found)


def count(run: Path) -> int:
    if not (run / "archive.db").exists():
        return 0
    try:
        with Archive(run, readonly=True) as archive:
            return len(archive.evaluations())
    except Exception:  # it is being created
        return 0


@pytest.mark.parametrize(
    "fault",
    # the first two use a pool of two workers
    [
        pytest.param("worker", marks=pytest.mark.long),
        pytest.param("int", marks=pytest.mark.long),
        "term",
    ],
)
def test_a_fault_ends_the_search_cleanly(
    fault: str, models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = {
        "models": models,
        "base": "base",
        "space": {"layers": {"min": 2}},
        "evaluation": {"tasks": ["t_long"], "include_path": str(tasks_dir), "device": "cpu"},
        "search": {"population": 12, "evaluations": 5000, "arms": ["random"]},
        "output": str(run),
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
    workers = "1" if fault == "term" else "2"
    command = [sys.executable, "-m", "gptailor.cli", "search", str(tmp_path / "search.yaml")]
    process = subprocess.Popen(
        [*command, "--workers", workers], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    deadline = time.monotonic() + 120
    while count(run) < 8 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    if fault == "worker":
        os.kill(children(process.pid)[0], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGINT if fault == "int" else signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == CODES[fault], stderr
    (said,) = [line for line in stderr.splitlines() if line.startswith("gptailor: ")]
    assert "kept" in said
    assert "Traceback" not in stderr
    assert "resource_tracker" not in stderr  # no leaked semaphores
    kept = count(run)
    assert kept >= 8
    with Archive(run) as archive:  # the lock is free again
        assert archive.get_meta("config") is not None


class Odd(Exception):
    """Like the errors of many libraries: it can be pickled, but not unpickled."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


def test_an_error_that_cannot_be_unpickled_is_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the pool would report that a worker was killed."""
    monkeypatch.setattr(processes, "_words", SimpleNamespace(value=b""), raising=False)
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(Odd("no network", "the hub")))
    odd = pytest.raises(RuntimeError, match="Odd: no network at the hub")
    with odd as caught, processes._portable_errors():
        raise Odd("no network", "the hub")
    assert str(pickle.loads(pickle.dumps(caught.value))) == "Odd: no network at the hub"
    for error in (ModelError("torn"), MemoryError(), OSError(28, "full")):
        with pytest.raises(type(error)) as kept, processes._portable_errors():
            raise error
        assert kept.value is error


def test_workers_report_their_progress(
    models: dict[str, str], tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through shared memory, while they start and in the middle of a job."""
    evaluation = {"tasks": ["t_long"], "include_path": str(tasks_dir), "device": "cpu"}
    config = parse_config({"models": models, "base": "base", "evaluation": evaluation}, "test")
    pool = LocalPool(config, 2)
    try:
        assert [a.device for a in pool.abilities()] == ["cpu", "cpu"]
        pool.load("float32")
        started: set[str] = set()
        while not all(future.done() for future in pool._begun):
            started |= set(pool.words().values())
            time.sleep(0.005)
        assert {"loading libraries", "loading the base", "loading tokenizer and tasks"} <= started
        assert pool.words() == {}
        layers = tuple(Take("red", layer) for layer in range(6))
        recipe = Recipe(config.models, "base", layers, "base", "base", "bfloat16")
        jobs: list[Job] = [
            EvaluationJob(recipe, "search"),
            EvaluationJob(recipe, "search"),
            SimilarityJob("red"),
        ]
        heard: set[tuple[int, str]] = set()
        for job in jobs:
            pool.start(1, job)
            while not (finished := pool.finished(0.0)):
                heard |= set(pool.words().items())
        assert pool.words() == {}
        (measured,) = finished
        assert isinstance(measured.result, Similarity)
        alone = InProcess(config)
        for dtype in ("float32", "bfloat16"):  # it computes in the type it was given
            alone.load(dtype)
            alone.start(0, measured.job)
            (one,) = alone.finished(0.0)
            assert isinstance(one.result, Similarity)
            same = one.result.block_influence == pytest.approx(
                measured.result.block_influence, abs=1e-6
            )
            assert same == (dtype == "float32")
        assert {worker for worker, _ in heard} == {1}
        texts = " ".join(text for _, text in heard)
        assert re.search(r"\d+ tokens", texts) or "contexts" in texts
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        pytest.param(
            "evaluation.tasks=[t_sharde]",
            2,
            "did you mean 't_shared'",
            marks=pytest.mark.slow,  # each worker reads the names of all tasks of lm-eval
        ),
        ("evaluation.device=cuda:77", 2, "evaluation.device"),
    ],
)
def test_a_pool_that_cannot_start_says_why(
    override: str,
    code: int,
    words: str,
    models: dict[str, str],
    tasks_dir: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = {
        "models": models,
        "base": "base",
        "evaluation": {"tasks": ["t_long"], "include_path": str(tasks_dir)},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["search", str(tmp_path / "search.yaml"), override, "--workers", "2"]) == code
    stderr = capfd.readouterr().err
    assert words in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "run").exists()
