"""Records of jobs: written whole or not at all, and read whatever else is in their folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gptailor.run.job_record import (
    MAX_FAILURES,
    FailureRecord,
    JobRecord,
    JobRecorder,
    WorkerRecord,
    job_id_here,
    path_of,
    read_all,
)

FULL = JobRecord(
    "71_2",
    state="running",
    island=2,
    exit_code=None,
    started_at=1000.5,
    updated_at=1001.0,
    ends_at=4600.0,
    host="n1",
    pid=77,
    hosts=("n1", "n2"),
    workers=(
        WorkerRecord(1, "n1", 78, "cuda:0", "1f3a09bc", 1000.9),
        WorkerRecord(2, "n2", 99, "cuda:0"),
    ),
    evaluations_done=12,
    evaluations_new=10,
    evaluations_failed=1,
    evaluations_total=500,
    evaluations_per_hour=33.5,
    failures=(FailureRecord("aabbccdd", "ValueError: no", "logs/rank-001.log"),),
    log="logs/rank-000.log",
    restarts=1,
)


def test_round_trip(tmp_path: Path) -> None:
    assert FULL.write(tmp_path)
    assert read_all(tmp_path) == [FULL]
    assert json.loads(path_of(tmp_path, "71_2").read_text())["schema"] == "gptailor/job/1"
    assert [p.name for p in (tmp_path / "jobs").iterdir()] == ["71_2.json"]


def test_records_are_in_the_order_in_which_jobs_began(tmp_path: Path) -> None:
    for job_id, started_at in (("9", 30.0), ("10", 20.0), ("8", 10.0)):
        JobRecord(job_id, started_at=started_at).write(tmp_path)
    assert [r.job_id for r in read_all(tmp_path)] == ["8", "10", "9"]


def test_a_run_without_jobs_has_no_records(tmp_path: Path) -> None:
    assert read_all(tmp_path) == []
    assert read_all(tmp_path / "missing") == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"schema": "gptailor/job/1", "job_id": "5", "sta',
        "[]",
        "null",
        "[" * 100_000,
        '{"schema": "gptailor/job/2", "job_id": "5"}',
        '{"schema": "gptailor/job/1"}',
        '{"schema": "gptailor/job/1", "job_id": 5}',
        '{"schema": "gptailor/job/1", "job_id": "6"}',
        '{"schema": "gptailor/job/1", "job_id": "5", "state": "happy"}',
        '{"schema": "gptailor/job/1", "job_id": "5", "pid": true}',
        '{"schema": "gptailor/job/1", "job_id": "5", "workers": 3}',
        '{"schema": "gptailor/job/1", "job_id": "5", "workers": [3]}',
        '{"schema": "gptailor/job/1", "job_id": "5", "workers": [{"host": "n1"}]}',
        '{"schema": "gptailor/job/1", "job_id": "5", "ends_at": "soon"}',
        "\udcff",
    ],
)
def test_invalid_records_are_skipped(tmp_path: Path, text: str) -> None:
    FULL.write(tmp_path)
    path_of(tmp_path, "5").write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "jobs" / "folder.json").mkdir()
    assert read_all(tmp_path) == [FULL]


def test_unknown_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    data = {**JobRecord("5").to_dict(), "mood": "fine"}
    path = path_of(tmp_path, "5")
    path.parent.mkdir()
    path.write_text(json.dumps(data))
    assert read_all(tmp_path) == [JobRecord("5")]


def test_a_full_disk_raises_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk: both make write(2) fail."""
    code = (
        "import resource, signal, sys\n"
        "from gptailor.run.job_record import JobRecord, JobRecorder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "recorder = JobRecorder(sys.argv[1], JobRecord('5'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "recorder.update(state='running')\n"
        "print(recorder.flush())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
    assert [r.state for r in read_all(tmp_path)] == ["starting"]  # the last complete one
    assert [p.name for p in (tmp_path / "jobs").iterdir()] == ["5.json"]


def test_readers_never_see_half_a_record(tmp_path: Path) -> None:
    recorder = JobRecorder(tmp_path, FULL)
    ended = threading.Event()

    def write() -> None:
        for number in range(300):
            recorder.record = JobRecord("71_2", log="x" * number * 50, started_at=0.0)
            recorder.flush()
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not ended.is_set():
        assert [r.job_id for r in read_all(tmp_path)] == ["71_2"]
    thread.join()


def test_a_recorder_writes_at_most_every_two_seconds(tmp_path: Path) -> None:
    clock = [100.0]
    recorder = JobRecorder(tmp_path, JobRecord("5"), lambda: clock[0])
    (first,) = read_all(tmp_path)
    assert first.host == socket.gethostname()
    assert first.pid == os.getpid()
    assert first.started_at is not None

    recorder.update(evaluations_done=1)
    assert read_all(tmp_path)[0].evaluations_done == 0
    clock[0] += 2.0
    recorder.update(evaluations_done=2)
    assert read_all(tmp_path)[0].evaluations_done == 2
    recorder.update(state="draining", evaluations_done=3)  # news that can't wait
    assert read_all(tmp_path)[0].evaluations_done == 3


def test_the_final_record_of_a_job(tmp_path: Path) -> None:
    recorder = JobRecorder(tmp_path, JobRecord("5", workers=FULL.workers), lambda: 0.0)
    for number in range(MAX_FAILURES + 5):
        recorder.failed(f"{number:08x}", "Traceback\n  File …\nValueError: no\n", "logs/a.log")
    recorder.end(75)
    (record,) = read_all(tmp_path)
    assert (record.state, record.exit_code) == ("ended", 75)
    assert [w.job for w in record.workers] == [None, None]
    assert record.evaluations_failed == MAX_FAILURES + 5
    assert len(record.failures) == MAX_FAILURES
    assert record.failures[-1] == FailureRecord("00000018", "ValueError: no", "logs/a.log")


def test_a_job_knows_its_name() -> None:
    assert job_id_here({"SLURM_JOB_ID": "73"}) == "73"
    element = {"SLURM_JOB_ID": "73", "SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "2"}
    assert job_id_here(element) == "71_2"
    assert job_id_here({}) == f"local-{socket.gethostname()}-{os.getpid()}"
