"""Long steps report progress, every ten seconds at first; quick ones print nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from gptailor import patience, verbs
from gptailor.evaluation import evaluator
from gptailor.evaluation.lm import ResidentLM
from gptailor.evaluation.resident import ResidentModel
from gptailor.patience import Patience, duration, slowly
from tests.search.test_run import write_config


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second between lines instead of ten seconds."""
    monkeypatch.setattr(patience, "EVERY_S", 0.1)


def test_a_quick_step_prints_nothing() -> None:
    said: list[str] = []
    with slowly("Working", said.append):
        pass
    assert said == []


def test_a_long_step_reports_progress(quick: None) -> None:
    said: list[str] = []
    done = 0
    with slowly("Reading", said.append, lambda: f"{done} of 3 files"):
        for number in (1, 2, 3):
            done = number
            time.sleep(0.25)
    assert 3 <= len(said) <= 7
    assert said[0] == "Reading: 1 of 3 files (0 s)"
    assert said[-1].startswith("Reading: 3 of 3 files (")
    time.sleep(0.2)
    assert said[-1].startswith("Reading: 3")  # no more lines after its end


def test_an_inner_step_replaces_the_outer_one(quick: None) -> None:
    said: list[str] = []
    with Patience(said.append) as waiting, waiting.step("Outside"):
        with waiting.step(lambda: "Inside"):
            time.sleep(0.3)
        inside = len(said)
        time.sleep(0.3)
    assert set(said[:inside]) == {"Inside (0 s)"}
    assert len(said) > inside
    assert all(text.startswith("Outside (") for text in said[inside:])


def test_no_lines_while_others_print(quick: None) -> None:
    said: list[str] = []
    with Patience(said.append) as waiting, waiting.step("Working"):
        for _ in range(30):
            waiting.spoke()
            time.sleep(0.01)
    assert said == []


def test_a_long_step_takes_few_lines() -> None:
    said: list[str] = []
    waiting = Patience(said.append)
    with waiting.step("Evaluating"):
        began = waiting._spoke_at = time.monotonic()
        lines = []
        for second in range(3600):
            if waiting._line(began + second):
                waiting._spoke_at = began + second
                lines.append(second)
    assert lines[:3] == [10, 20, 30]
    assert lines[10:14] == [110, 170, 230, 290]
    assert len(lines) < 75


def test_an_error_while_looking_is_retried(quick: None) -> None:
    """The state may change while it is read; an error there must not end anything."""
    said: list[str] = []
    looks = 0

    def how_far() -> str:
        nonlocal looks
        looks += 1
        if looks < 3:
            raise RuntimeError("dictionary changed size during iteration")
        return "here"

    with slowly("Working", said.append, how_far):
        time.sleep(0.6)
    assert said[0].startswith("Working: here")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (11_100, "3 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_search_reports_how_far_a_candidate_is_measured(
    quick: None,
    models: dict[str, str],
    tasks_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def slow(lm: ResidentLM, input_BT: Any) -> None:
        time.sleep(0.15)
        fast(lm, input_BT)

    fast = ResidentLM.hidden_states_only
    monkeypatch.setattr(ResidentLM, "hidden_states_only", slow)

    def slowly_loaded(*args: Any, **options: Any) -> ResidentModel:
        time.sleep(0.5)
        return ResidentModel(*args, **options)

    monkeypatch.setattr(evaluator, "ResidentModel", slowly_loaded)
    config = write_config(
        tmp_path, models, tasks_dir, tmp_path / "run", evaluations=2, arms=["angular"]
    )
    verbs.search(config)
    said = capsys.readouterr().err
    assert "Measuring what the layers of base, blue, green, red do, for the control arms." in said
    for done, name in enumerate(sorted(models)):
        line = f"Measuring what layers do, {done} of 4 candidates done: layers of {name} ("
        assert f"{line}16 of 48 contexts) (" in said, said
    assert "Starting: loading the base (" in said
