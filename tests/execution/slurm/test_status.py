"""`status` and `cancel` of runs without Slurm; tests/cluster has them with a real Slurm."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gptailor import cli, verbs
from gptailor.commands.status_text import status_text
from gptailor.errors import UsageError
from gptailor.evaluation.outcome import Cost, Outcome, Status
from gptailor.execution.slurm.status import STALE_S, look_at
from gptailor.recipe import Recipe, Take
from gptailor.run.archive import Archive
from gptailor.run.job_record import FailureRecord, JobRecord, WorkerRecord
from gptailor.run.journal import Journal
from gptailor.run.journal_entry import Header
from gptailor.search.progress import Progress

HERE = socket.gethostname()


@pytest.fixture(autouse=True)
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that reacts to signals like a search started by hand."""
    code = "import time\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code]) as started:
        yield started
        started.kill()


def recipe(layer: int, count: int = 1) -> Recipe:
    layers = tuple(Take("base", layer + i) for i in range(count))
    return Recipe({"base": "/m"}, "base", layers, "base", "base")


def outcome(status: Status, accuracy: float | None) -> Outcome:
    return Outcome(status, accuracy, (), "" if status == "ok" else "why", Cost())


def a_run(folder: Path) -> Path:
    with Archive(folder) as archive:
        archive.set_meta("config", json.dumps({"search": {"evaluations": 40}}))
        archive.set_meta("family", json.dumps({"num_layers": 9, "parameters": {"base": 100}}))
        archive.record(recipe(0), "search", 60, outcome("ok", 0.5))
        archive.record(recipe(1, count=7), "search", 80, outcome("ok", 0.6))  # of 9 layers
        archive.record(recipe(0, count=8), "search", 70, outcome("ok", 0.9))
        archive.record(recipe(3), "search", 70, outcome("failed", None))
        archive.record(recipe(4), "search", 70, outcome("infeasible", None))
        archive.record(recipe(1, count=7), "holdout", 80, outcome("ok", 0.95))
    return folder


def running() -> JobRecord:
    """The record of a search that has just reported."""
    now = time.time()
    return JobRecord(
        f"local-{HERE}-1",
        state="running",
        started_at=now - 3600,
        updated_at=now,
        host=HERE,
        workers=(
            WorkerRecord(1, "n1", 11, "cuda:0", "1f3a09bc", now - 100),
            WorkerRecord(2, "n1", 12, "cuda:1", None, now - 5),
            WorkerRecord(3, "n2", 13),
        ),
        evaluations_done=30,
        evaluations_new=20,
        evaluations_failed=1,
        evaluations_total=40,
        evaluations_per_hour=70.0,
        failures=(FailureRecord("aabbccdd", "ValueError: no", "logs/rank-001.log"),),
    )


def test_evaluations_are_counted_in_the_archive(tmp_path: Path) -> None:
    evaluated = look_at(a_run(tmp_path)).evaluated
    assert (evaluated.done, evaluated.failed, evaluated.infeasible) == (5, 1, 1)
    assert (evaluated.holdout, evaluated.total, evaluated.best) == (1, 40, 0.6)
    assert evaluated.note == ""


def test_status_and_progress_agree_on_the_best(tmp_path: Path) -> None:
    """With at most 75 % of the layers, whatever the sizes of embeddings and layers."""
    status = status_text(look_at(a_run(tmp_path)))
    progress = Progress(40, 9, io.StringIO())
    with Archive(tmp_path) as archive:
        for evaluation in archive.evaluations("search"):
            progress.update(evaluation, is_new=False)
    best = "best at ≤ 75 % of the layers: 0.600"
    assert best in status and best in progress.line(0.0)


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        look_at(tmp_path)
    assert cli.main(["status", str(tmp_path)]) == 2
    assert cli.main(["cancel", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_search_that_runs_here(
    tmp_path: Path, process: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path)
    record = replace(running(), pid=process.pid, started_at=time.time())
    record.write(tmp_path)
    (job,) = look_at(tmp_path).jobs
    assert (job.state, job.runs, job.note) == ("RUNNING", True, "")
    assert cli.main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "5 of 40 evaluations · 1 failed · 1 infeasible · 1 on the holdout" in out
    assert "best at ≤ 75 % of the layers: 0.600 · 70 per hour · about 30 min left" in out
    assert "1/3 busy" in out
    assert "ValueError: no" in out
    assert "logs/rank-001.log" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["1", "n1", "cuda:0", "1f3a09bc", "2", "min"] in lines
    assert any(line[:4] == ["2", "n1", "cuda:1", "waits"] for line in lines)
    assert any(line[:2] == ["3", "n2"] and line[-1] == "starts" for line in lines)

    assert cli.main(["status", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["evaluated"]["done"] == 5
    assert data["jobs"][0]["state"] == "RUNNING"
    assert data["jobs"][0]["record"]["workers"][0]["job"] == "1f3a09bc"


def test_a_search_that_was_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    replace(running(), pid=gone.pid).write(tmp_path)
    (job,) = look_at(tmp_path).jobs
    assert (job.state, job.is_live) == ("LOST", False)
    assert job.note == "it was killed while it was running"


def test_a_process_with_the_id_of_a_killed_one(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    replace(running(), pid=process.pid, started_at=time.time() - 86400).write(tmp_path)
    (job,) = look_at(tmp_path).jobs
    assert job.state == "LOST"
    assert verbs.cancel(tmp_path).ended == ()
    assert process.poll() is None


def test_a_search_that_ended(tmp_path: Path) -> None:
    replace(running(), state="ended", exit_code=75).write(tmp_path)
    status = look_at(tmp_path)
    assert (status.jobs[0].state, status.jobs[0].exit_code) == ("ENDED", 75)
    assert status.evaluations_per_hour is None


def test_the_last_of_many_ended_jobs_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        name = f"local-far-{number:02}"
        over = replace(
            running(), job_id=name, state="ended", exit_code=5, started_at=time.time() + number
        )
        over.write(tmp_path)
    assert cli.main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert [number for number in range(12) if f"local-far-{number:02}" in out] == [*range(4, 12)]
    assert "and 4 earlier ones" in out


def test_a_search_on_another_machine_is_alive_while_it_reports(tmp_path: Path) -> None:
    there = replace(running(), job_id="local-far-7", host="far", pid=7, updated_at=time.time())
    there.write(tmp_path)
    assert look_at(tmp_path).jobs[0].runs
    done = verbs.cancel(tmp_path)
    assert done.elsewhere == (("local-far-7", "far"),)
    replace(there, updated_at=time.time() - STALE_S - 60).write(tmp_path)
    (job,) = look_at(tmp_path).jobs
    assert job.state == "LOST"
    assert job.note == "it is on far, and it has said nothing for 3 min"


def test_a_slurm_job_on_a_machine_without_slurm(tmp_path: Path) -> None:
    replace(running(), job_id="71", updated_at=time.time()).write(tmp_path)
    replace(running(), job_id="72", updated_at=time.time() - STALE_S - 60).write(tmp_path)
    replace(running(), job_id="73", state="submitted", updated_at=time.time()).write(tmp_path)
    states = {job.record.job_id: (job.state, job.note) for job in look_at(tmp_path).jobs}
    assert states["71"] == ("RUNNING", "")
    assert states["72"] == (
        "LOST", "there is no Slurm here, and it has said nothing for 3 min",
    )  # fmt: skip
    assert states["73"] == ("LOST", "there is no Slurm here, and its search has not begun")


def test_the_rates_of_jobs_add_up(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    a_run(tmp_path)
    for number in (1, 2):
        name = f"local-{HERE}-{number}"
        record = replace(running(), job_id=name, pid=process.pid, started_at=time.time())
        replace(record, island=number).write(tmp_path)
    status = look_at(tmp_path)
    assert status.evaluations_per_hour == 140.0
    assert status.time_left_s == pytest.approx(35 / 140 * 3600)


def test_cancel_ends_a_search_of_this_machine(
    tmp_path: Path, process: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    record = replace(running(), pid=process.pid, started_at=time.time())
    record.write(tmp_path)
    assert cli.main(["cancel", str(tmp_path)]) == 0
    assert f"Ended: {record.job_id}" in capsys.readouterr().out
    assert process.wait(5) == -signal.SIGTERM
    assert cli.main(["cancel", str(tmp_path)]) == 0
    assert "No job of" in capsys.readouterr().out


def test_cancel_reports_what_lives_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('x', flush=True)\n"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}time.sleep(60)"], stdout=subprocess.PIPE
    ) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        record = replace(running(), pid=stubborn.pid, started_at=time.time())
        record.write(tmp_path)
        assert cli.main(["cancel", str(tmp_path), "--wait", "0.3"]) == 5
        assert f"still running: {record.job_id}" in capsys.readouterr().out
        stubborn.kill()


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in [folder, *folder.rglob("*")]}


def test_status_writes_nothing_and_waits_for_nobody(tmp_path: Path) -> None:
    a_run(tmp_path)
    running().write(tmp_path)
    before = listing(tmp_path)
    with Archive(tmp_path):  # holds the lock
        inside = listing(tmp_path)
        began = time.monotonic()
        look_at(tmp_path)
        assert time.monotonic() - began < 2
        assert listing(tmp_path) == inside
    assert before.keys() == listing(tmp_path).keys()


def test_an_archive_with_an_interrupted_write_is_left_alone(tmp_path: Path) -> None:
    """A reader must not repair it, as the writer may be alive on another node."""
    a_run(tmp_path)
    running().write(tmp_path)
    code = (
        "import os, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1] + '/archive.db', isolation_level=None)\n"
        "db.execute('PRAGMA cache_size = 1'); db.execute('BEGIN IMMEDIATE')\n"
        "for i in range(200): db.execute('INSERT INTO meta VALUES (?, ?)', (str(i), 'x' * 4000))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / "archive.db-journal").stat().st_size > 0
    before = listing(tmp_path)
    evaluated = look_at(tmp_path).evaluated
    assert listing(tmp_path) == before
    assert "can't be read at the moment" in evaluated.note
    assert (evaluated.done, evaluated.total) == (30, 40)  # from the job's record
    with Archive(tmp_path) as archive:  # the next search repairs it
        assert len(archive.evaluations("search")) == 5
    assert look_at(tmp_path).evaluated.done == 5


def test_islands_are_counted_together(tmp_path: Path) -> None:
    """From their journals, as other nodes may be writing to their archives."""
    (tmp_path / "islands" / "0").mkdir(parents=True)
    assert look_at(tmp_path).evaluated.done == 0
    assert look_at(tmp_path).evaluated.note == ""
    family = {"num_layers": 9, "models": {"base": "/m"}, "parameters": {"base": 100}}
    for island in (0, 1):
        folder = tmp_path / "islands" / str(island)
        header = Header(island, 2, {"search": {"evaluations": 40}}, "f", "d", family)
        with Archive(folder) as archive:
            archive.record(recipe(0), "search", 60, outcome("ok", 0.5))  # in both, by coincidence
            archive.record(recipe(0, count=8), "search", 60, outcome("ok", 0.9))
            archive.record(recipe(1 + island), "search", 70, outcome("ok", 0.6 + island / 10))
            archive.record(recipe(5 + island), "search", 70, outcome("failed", None))
            evaluations = archive.evaluations()
        Journal(folder, header, evaluations).close()
    evaluated = look_at(tmp_path).evaluated
    assert (evaluated.done, evaluated.failed, evaluated.total) == (6, 2, 40)
    assert evaluated.best == 0.7
    with (tmp_path / "islands" / "0" / "journal.jsonl").open("a") as file:
        file.write("[]\n")
    assert "can't be read at the moment" in look_at(tmp_path).evaluated.note


def test_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "5.json").write_text("{")
    with sqlite3.connect(tmp_path / "archive.db") as db:
        db.execute("CREATE TABLE other (a)")
    assert look_at(tmp_path).evaluated.done == 0
    (tmp_path / "archive.db").write_bytes(os.urandom(5000))
    assert look_at(tmp_path).jobs == ()
