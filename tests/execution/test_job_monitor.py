"""A job's record shows what its workers do; a job that makes no progress for two turns ends."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gptailor.errors import Interrupted, Requeue, StoppedEarly
from gptailor.execution.executor import WorkerInfo
from gptailor.execution.job_monitor import JobMonitor, SearchState, Work
from gptailor.execution.slurm.exit_code_file import gained, note_gain
from gptailor.execution.stop import Stop
from gptailor.run.job_record import FailureRecord, WorkerRecord, read

NOTHING = SearchState(0, {}, num_done=0, num_new=0, num_gained=0, failures=())


@dataclass
class Search:
    """A search with a given state and time."""

    said: SearchState
    seconds: float = 0.0

    def now(self) -> float:
        return self.seconds

    def state(self) -> SearchState:
        return self.said


def turn(folder: Path, results: int, error: Exception | None = None) -> None:
    """A job step with this many new results, which ends before its time limit or by an error."""
    with JobMonitor(Stop(), 100, folder) as monitor:
        monitor.begin()
        if results:
            state = replace(NOTHING, num_done=results, num_new=results, num_gained=results)
            monitor.tick(Search(state))
        raise error or Requeue("stopped")


def test_a_second_turn_in_a_row_without_a_result_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for results in (0, 3, 0):
        with pytest.raises(Requeue):
            turn(tmp_path, results)
    with pytest.raises(StoppedEarly, match="give it more time") as caught:
        turn(tmp_path, 0)
    assert caught.value.exit_code == 5
    record = read(tmp_path, "7")
    assert record is not None
    assert record.exit_code == 5
    with pytest.raises(Requeue):  # submitted again: a new job
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        turn(tmp_path, 0)


def test_the_whole_turn_counts_not_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a rank was killed, the last step of a turn with results need not gain any more."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("GPTAILOR_GAINED", str(tmp_path / "gained"))
    for restarts in (0, 1, 2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        (tmp_path / "gained").write_bytes(b"")  # written by this turn's supervisor
        note_gain(2)
        with pytest.raises(Interrupted):  # when a rank dies, srun ends the others
            turn(tmp_path, 2, Interrupted(signal.SIGTERM))
        with pytest.raises(Requeue):
            turn(tmp_path, 0)
        record = read(tmp_path, "7")
        assert record is not None
        assert (record.results, record.idle_turns) == (2, 0)


def test_a_killed_step_does_not_hide_an_idle_turn_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(Requeue):
        turn(tmp_path, 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(Interrupted):
        turn(tmp_path, 0, Interrupted(signal.SIGTERM))
    with pytest.raises(StoppedEarly, match="twice in a row without a new result"):
        turn(tmp_path, 0)


def test_gains_are_reported_only_if_a_supervisor_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPTAILOR_GAINED", raising=False)
    note_gain(3)
    assert gained() is None
    monkeypatch.setenv("GPTAILOR_GAINED", str(tmp_path / "gained"))
    note_gain(3)  # the file does not exist, and is not created
    assert gained() is None
    assert not list(tmp_path.iterdir())
    (tmp_path / "gained").touch()
    note_gain(3)
    note_gain(1)
    assert gained() == 4


def test_the_record_shows_what_each_worker_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("GPTAILOR_GAINED", raising=False)
    workers = [WorkerInfo(1, "n1", 11), WorkerInfo(2, "n1", 12), WorkerInfo(3, "n2", 13)]
    with JobMonitor(Stop(), 100, tmp_path, island=2) as monitor:
        monitor.begin(log="logs/rank-000.log", workers=lambda: workers)
        monitor.loading({1: "loading the base"})
        workers[:2] = [replace(workers[0], device="cuda:0", since=30.0),
                       replace(workers[1], device="cuda:1", since=40.0)]  # fmt: skip
        work = {0: Work("1f3a09bc: 3 tokens", 50.0)}
        failures = [(1, "aabbccdd", "ValueError: no")]
        search = Search(SearchState(3, work, 9, 5, 6, failures), seconds=60.0)
        ago = time.time() - 60.0
        monitor.tick(search)
        record = read(tmp_path, "7")
        assert record is not None
        assert (record.log, record.hosts[1:]) == ("islands/2/logs/rank-000.log", ("n1", "n2"))
        began, free = (worker.since for worker in record.workers[:2])
        assert began == pytest.approx(ago + 50, abs=2)
        assert free == pytest.approx(ago + 40, abs=2)
        assert record.workers == (
            WorkerRecord(1, "n1", 11, "cuda:0", "1f3a09bc: 3 tokens", began),
            WorkerRecord(2, "n1", 12, "cuda:1", None, free),
            WorkerRecord(3, "n2", 13),
        )  # fmt: skip
        search.said = replace(search.said, num_done=10, num_new=6, num_gained=7)
    record = read(tmp_path, "7")
    assert record is not None
    assert (record.evaluations_done, record.evaluations_new, record.results) == (10, 6, 7)
    assert record.failures == (
        FailureRecord("aabbccdd", "ValueError: no", "islands/2/logs/rank-002.log"),
    )
    assert (record.state, record.exit_code) == ("ended", 0)


def test_workers_without_info_have_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with JobMonitor(Stop(), 100, tmp_path) as monitor:
        monitor.begin()
        monitor.loading({0: "nobody is told"})
        work = {1: Work("layers of base", 0.0)}
        monitor.tick(Search(replace(NOTHING, num_workers=2, running=work)))
        record = read(tmp_path, "7")
        assert record is not None
        assert [(w.rank, w.host, w.job) for w in record.workers] == [
            (0, "", None), (1, "", "layers of base"),
        ]  # fmt: skip
