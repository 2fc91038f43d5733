"""A job that is requeued again and again, and gets nowhere, is given up."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gptailor.errors import Interrupted, Requeue, StoppedEarly
from gptailor.execution.job_monitor import JobMonitor
from gptailor.execution.slurm.exit_code_file import gained, note_gain
from gptailor.execution.stop import Stop
from gptailor.run.job_record import read


def turn(folder: Path, results: int, error: Exception | None = None) -> None:
    """A step of a job that gains so much, and ends: before its time limit, or by an error."""
    progress = SimpleNamespace(done=results, reused=0, elsewhere=0)
    executor = SimpleNamespace(now=lambda: 0.0, num_workers=0, words=dict)
    run = SimpleNamespace(
        progress=progress,
        executor=executor,
        scheduler=SimpleNamespace(running={}),
        recorder=SimpleNamespace(failures=[], num_gained=results),
    )
    with JobMonitor(Stop(), 100, folder) as reporter:
        reporter.begin()
        if results:
            reporter.tick(cast(Any, run))
        raise error or Requeue("stopped")


def test_the_second_turn_in_a_row_without_a_result_is_the_last(
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


def test_what_counts_is_the_turn_not_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank was killed in a turn that had gained something: its last step need not gain more."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("GPTAILOR_GAINED", str(tmp_path / "gained"))
    for restarts in (0, 1, 2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        (tmp_path / "gained").write_bytes(b"")  # the supervisor's, of this turn
        note_gain(2)
        with pytest.raises(Interrupted):  # srun ends the others when a rank dies
            turn(tmp_path, 2, Interrupted(signal.SIGTERM))
        with pytest.raises(Requeue):
            turn(tmp_path, 0)
        record = read(tmp_path, "7")
        assert record is not None
        assert (record.results, record.idle_turns) == (2, 0)


def test_a_killed_step_does_not_hide_the_idle_turn_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(Requeue):
        turn(tmp_path, 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(Interrupted):
        turn(tmp_path, 0, Interrupted(signal.SIGTERM))
    with pytest.raises(StoppedEarly, match="twice in a row before the archive gained anything"):
        turn(tmp_path, 0)


def test_gains_are_told_only_to_a_supervisor_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPTAILOR_GAINED", raising=False)
    note_gain(3)
    assert gained() is None
    monkeypatch.setenv("GPTAILOR_GAINED", str(tmp_path / "gained"))
    note_gain(3)  # its folder has gone: nothing is made in its place
    assert gained() is None
    assert not list(tmp_path.iterdir())
    (tmp_path / "gained").touch()
    note_gain(3)
    note_gain(1)
    assert gained() == 4
