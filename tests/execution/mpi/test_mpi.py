"""Searches as MPI programs: real ranks, real messages; mostly with workers that invent scores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from gptailor import verbs
from gptailor.run.archive import Archive
from gptailor.run.job_record import read_all
from tests.execution.mpi import mpi_tools as mpi

CLI = ("-m", "gptailor.cli")


def front(run: Path) -> list[str]:
    return [point["point"] for point in json.loads((run / "front.json").read_text())["front"]]


@pytest.mark.long  # three ranks load models and libraries
def test_real_evaluations_find_the_front_of_one_process(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    config = {
        "models": models,
        "base": "base",
        "space": {"layers": {"min": 2}},
        "evaluation": {"tasks": ["t_long"], "include_path": str(tasks_dir), "device": "cpu"},
        "search": {
            "population": 8, "evaluations": 30, "arms": ["random"], "schedule": "generational"
        },
    }  # fmt: skip
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(config))
    scratch = tmp_path / "scratch"  # ranks evaluate with copies, but report the originals
    scratch.mkdir()
    words = ["search", str(path), "--stage", str(scratch), f"output={tmp_path / 'mpi'}"]
    words += ["--io", "pread"]
    nonsense = {"GPTAILOR_IO": "nonsense", "GPTAILOR_STAGE": "/nowhere"}  # overruled by rank 0
    ended = mpi.wait(mpi.start(words, 3, program=CLI, env=nonsense), 250)
    assert ended.code == 0, ended.stderr
    assert len(list(scratch.glob("*/*/model.safetensors"))) == len(models)
    assert str(scratch).encode() not in (tmp_path / "mpi" / "archive.db").read_bytes()
    verbs.search(path, overrides=[f"output={tmp_path / 'one'}"])
    assert front(tmp_path / "mpi") == front(tmp_path / "one")
    scored = [
        {e.recipe.hash: e.outcome.accuracy for e in mpi.evaluations(tmp_path / run)}
        for run in ("mpi", "one")
    ]
    assert scored[0] == scored[1]


@pytest.mark.long  # three ranks load models and libraries
def test_repairs_are_those_of_one_process(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"  # the refitted candidate's place is part of a recipe's hash
    config = {
        "models": {name: models[name] for name in ("base", "red", "green")},
        "base": "base",
        "space": {"layers": {"min": 3}, "repair": {"layers": "all"}},
        "evaluation": {
            "tasks": ["t_long"],
            "include_path": str(tasks_dir),
            "rungs": [8],
            "device": "cpu",
        },
        "search": {
            "population": 6,
            "evaluations": 20,
            "arms": ["random", "block_influence"],
            "arm_sizes": [0.67],
            "schedule": "generational",
        },
        "output": str(run),
    }
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(config))
    ended = mpi.wait(mpi.start(["search", str(path)], 3, program=CLI), 250)
    assert ended.code == 0, ended.stderr
    run.rename(tmp_path / "mpi")
    verbs.search(path)
    assert front(tmp_path / "mpi") == front(run)
    scored = [
        {e.recipe.hash: e.outcome.accuracy for e in mpi.evaluations(place)}
        for place in (tmp_path / "mpi", run)
    ]
    assert scored[0] == scored[1]
    assert sum(e.recipe.repair is not None for e in mpi.evaluations(run)) >= 10


def test_an_asynchronous_search(tmp_path: Path) -> None:
    path = mpi.write_search(tmp_path, schedule="asynchronous")
    faults = {"worker": [1, 1, "speaks"]}
    ended = mpi.wait(mpi.start(["search", str(path), "--log-json"], 4, faults=faults))
    assert ended.code == 0, ended.stderr
    assert "heavy modules of rank 0: []" in ended.stderr
    run = tmp_path / "run"
    found = mpi.evaluations(run)
    assert len(found) == len({e.recipe.hash for e in found}) == 60
    assert ended.stdout.count("The report is") == 1
    # the logs, one for each rank: what libraries print goes there, not to the screen
    assert "60/60 evaluations" in mpi.log(run, 0)
    for rank in (1, 2, 3):
        assert f"Rank {rank} on" in mpi.log(run, rank)
        assert "ok, accuracy" in mpi.log(run, rank)
    assert "what a library says" in mpi.log(run, 1)
    assert "what a program says" in mpi.log(run, 1)
    assert "says" not in ended.stdout + ended.stderr
    events = [json.loads(line) for line in (run / "logs/rank-000.jsonl").read_text().splitlines()]
    assert {"joined", "ready", "job", "result", "note"} <= {event["event"] for event in events}
    assert sum(event["event"] == "result" for event in events) == 60
    # the job's record
    (record,) = read_all(run)
    assert (record.state, record.exit_code, record.log) == ("ended", 0, "logs/rank-000.log")
    assert [worker.rank for worker in record.workers] == [1, 2, 3]
    assert (record.evaluations_done, record.evaluations_new) == (60, 60)


def test_ranks_report_their_progress(tmp_path: Path) -> None:
    """On rank 0's screen, in its log, and in the job's record."""
    path = mpi.write_search(tmp_path, evaluations=4, schedule="asynchronous")
    process = mpi.start(["search", str(path)], 3, faults={"seconds": 2.0, "words": 0.2})
    seen: set[str] = set()
    while process.poll() is None and not any(": half of it" in job for job in seen):
        for record in read_all(tmp_path / "run"):
            seen |= {worker.job for worker in record.workers if worker.job is not None}
        time.sleep(0.05)
    ended = mpi.wait(process)
    assert ended.code == 0, ended.stderr
    assert any(": half of it" in job for job in seen), seen
    assert "/4 evaluations" in ended.stderr and " (half of it)" in ended.stderr
    assert " (half of it)" in mpi.log(tmp_path / "run", 0)


def test_all_ranks_use_the_type_that_suits_the_slowest(tmp_path: Path) -> None:
    """One of the machines has no instructions for bfloat16, even if the others do."""
    path = mpi.write_search(tmp_path, evaluations=10)
    parts = [["env", "ONEDNN_MAX_CPU_ISA=AVX2"]]
    ended = mpi.wait(mpi.start(["search", str(path)], 3, parts=parts))
    assert ended.code == 0, ended.stderr
    assert ended.stderr.count("Evaluations are computed in float32, as the CPU of") == 1
    assert "Evaluations are computed in float32" in mpi.log(tmp_path / "run", 0)
    for rank in (1, 2, 3):
        assert "Invents in float32." in mpi.log(tmp_path / "run", rank)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["evaluation"][
        "dtype"
    ] == ("float32")


@pytest.mark.parametrize(
    ("faults", "code", "words"),
    [
        ({"worker": [2, 3, "bug"]}, 1, "rank 2"),
        ({"worker": [2, 3, "model"]}, 3, "the model is unusable"),
        ({"rank 0": 1}, 1, "ZeroDivisionError: a fault of this test"),
        ({"documents": 2}, 2, "The documents differ"),
    ],
)
def test_an_error_ends_all_ranks_with_one_sentence(
    faults: dict[str, object], code: int, words: str, tmp_path: Path
) -> None:
    path = mpi.write_search(tmp_path, evaluations=400, schedule="asynchronous")
    began = time.monotonic()
    ended = mpi.wait(mpi.start(["search", str(path)], 3, faults={"seconds": 0.05, **faults}))
    assert ended.code == code, ended.stderr
    assert time.monotonic() - began < 30
    (sentence,) = ended.sentences
    assert words in sentence
    assert ended.stderr.count("Traceback") == (code == 1)
    if "bug" in str(faults):
        assert "ZeroDivisionError: a fault of this test" in ended.stderr
        assert "ZeroDivisionError" in mpi.log(tmp_path / "run", 2)
    (record,) = read_all(tmp_path / "run")
    assert (record.state, record.exit_code) == ("ended", code)


def test_an_error_does_not_wait_for_a_worker_that_is_busy(tmp_path: Path) -> None:
    path = mpi.write_search(tmp_path, schedule="asynchronous")
    exit_code = tmp_path / "exit_code"
    process = mpi.start(
        ["search", str(path)],
        3,
        faults={"seconds": 60, "slow": 2, "worker": [1, 1, "bug"]},
        env={"GPTAILOR_VERDICT": str(exit_code)},
    )
    ended = mpi.wait(process, 25)  # rank 2 is still loading
    assert ended.code != 0
    assert len(ended.sentences) == 1, ended.stderr
    assert exit_code.read_text().strip() == "1"


def test_a_failed_evaluation_is_noted_with_its_log(tmp_path: Path) -> None:
    path = mpi.write_search(tmp_path, evaluations=20)
    ended = mpi.wait(mpi.start(["search", str(path)], 3, faults={"worker": [2, 2, "fails"]}))
    assert ended.code == 0, ended.stderr
    run = tmp_path / "run"
    (failed,) = [e for e in mpi.evaluations(run) if e.outcome.status == "failed"]
    (record,) = read_all(run)
    (failure,) = record.failures
    assert failure.point == failed.recipe.point
    assert failure.reason == "ValueError: of this test"
    assert failure.log == "logs/rank-002.log"
    assert f"{failed.recipe.point}: failed: Traceback" in mpi.log(run, 2)


def test_usr2_asks_for_a_requeue_and_resume_continues(tmp_path: Path) -> None:
    path = mpi.write_search(tmp_path, schedule="asynchronous")
    process = mpi.start(["search", str(path)], 3, faults={"seconds": 0.2})
    run = tmp_path / "run"
    _wait_for(process, run, 6)
    for pid in _pids(run):  # to every rank, like Slurm
        os.kill(pid, signal.SIGUSR2)
    ended = mpi.wait(process, 20)
    assert ended.code == 75, ended.stderr
    assert len(ended.sentences) == 1
    kept = {e.recipe.hash: e.number for e in mpi.evaluations(run)}
    assert 6 <= len(kept) < 60
    (record,) = read_all(run)
    assert (record.state, record.exit_code) == ("ended", 75)
    _resumed(path, run, kept)


def test_term_waits_for_running_evaluations(tmp_path: Path) -> None:
    path = mpi.write_search(tmp_path, schedule="asynchronous")
    exit_code = tmp_path / "exit_code"
    env = {"GPTAILOR_VERDICT": str(exit_code)}
    process = mpi.start(["search", str(path)], 3, faults={"seconds": 1}, env=env)
    run = tmp_path / "run"
    _wait_for(process, run, 3)
    before = mpi.count(run)
    for pid in _pids(run):
        os.kill(pid, signal.SIGTERM)
    ended = mpi.wait(process, 20)
    assert ended.code == 143, ended.stderr
    assert not exit_code.exists()  # the supervisor knows whether this was wanted
    assert mpi.count(run) >= before + 1


def test_a_killed_worker_ends_the_job_and_nothing_is_repeated(tmp_path: Path) -> None:
    path = mpi.write_search(tmp_path, schedule="asynchronous")
    exit_code = tmp_path / "exit_code"
    env = {"GPTAILOR_VERDICT": str(exit_code)}
    process = mpi.start(["search", str(path)], 3, faults={"seconds": 0.2}, env=env)
    run = tmp_path / "run"
    _wait_for(process, run, 6)
    os.kill(_pids(run)[-1], signal.SIGKILL)
    ended = mpi.wait(process, 20)
    assert ended.code != 0
    assert not exit_code.exists()  # this end was not intended
    kept = {e.recipe.hash: e.number for e in mpi.evaluations(run)}
    assert len(kept) >= 6
    _resumed(path, run, kept)


def _wait_for(process: subprocess.Popen[str], run: Path, evaluations: int) -> None:
    deadline = time.monotonic() + 60
    while mpi.count(run) < evaluations and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, mpi.wait(process)
    assert mpi.count(run) >= evaluations


def _pids(run: Path) -> list[int]:
    """Process ids of the ranks, in order of rank."""
    (record,) = [record for record in read_all(run) if record.state != "ended"]
    return [record.pid, *(worker.pid for worker in record.workers)]


def _resumed(path: Path, run: Path, kept: dict[str, int]) -> None:
    ended = mpi.wait(mpi.start(["search", str(path), "--resume"], 3))
    assert ended.code == 0, ended.stderr
    found = {e.recipe.hash: e.number for e in mpi.evaluations(run)}
    assert len(found) == 60
    assert kept.items() <= found.items()  # no evaluation was repeated
    with Archive(run) as archive:
        assert archive._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
