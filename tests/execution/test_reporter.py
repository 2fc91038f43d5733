"""A job that is requeued again and again, and gets nowhere, is given up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gptailor.errors import Requeue, StoppedEarly
from gptailor.execution.job_record import read
from gptailor.execution.reporter import Reporter
from gptailor.execution.stop import Stop


def turn(folder: Path, results: int) -> None:
    """A turn of a job that ends before its time limit, after so many evaluations."""
    progress = SimpleNamespace(done=results, reused=0, elsewhere=0)
    executor = SimpleNamespace(now=lambda: 0.0, num_workers=0)
    run = SimpleNamespace(
        progress=progress,
        executor=executor,
        scheduler=SimpleNamespace(running={}),
        failures=[],
        num_recorded=results,
    )
    with Reporter(Stop(), 100, folder) as reporter:
        reporter.begin()
        if results:
            reporter.tick(cast(Any, run))
        raise Requeue("stopped")


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
