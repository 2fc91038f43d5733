from __future__ import annotations

import io
import time

import pytest

from gptailor import patience
from gptailor.evaluation.outcome import Evaluation
from gptailor.recipe import Take
from gptailor.search.progress import Progress
from tests.search.helpers import make_space, synthetic


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def evaluation(number: int, num_layers: int) -> Evaluation:
    recipe = make_space().recipe([Take("red", i) for i in range(num_layers)])
    return Evaluation(number, recipe, "search", synthetic(recipe), 100, (), 0.0)


def test_plain_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(20, 8, stream)
    for number in range(1, 21):
        now[0] += 1.0
        progress.update(evaluation(number, 6 if number > 3 else 8), is_new=True)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("1/20 evaluations · best at ≤ 75 % of the layers: –")
    assert lines[-1].startswith("20/20 evaluations")
    assert 4 <= len(lines) <= 6  # at most one in five seconds
    assert "s left" in lines[1]
    assert "left" not in lines[-1]
    best = synthetic(evaluation(4, 6).recipe).accuracy
    assert f"layers: {best:.3f}" in lines[-1]


def test_a_terminal_shows_one_line_that_is_rewritten() -> None:
    stream = Terminal()
    progress = Progress(3, 8, stream)
    progress.note("Hello.")
    for number in (1, 2, 3):
        progress.update(evaluation(number, 6), is_new=number > 1)
    text = stream.getvalue()
    assert text.count("\n") == 2  # after the note and at the end
    assert text.count("\r") == 4
    assert "1 from the archive" in text


def test_a_step_on_a_terminal_rewrites_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "EVERY_S", 0.05)
    stream = Terminal()
    logged: list[str] = []
    with Progress(3, 8, stream, logged.append) as progress:
        with progress.step("Loading", lambda: "half of it"):
            time.sleep(0.3)
        assert "\n" not in stream.getvalue()
    text = stream.getvalue()
    assert text.count("\r\x1b[KLoading: half of it (0 s)") >= 2
    assert text.endswith("\r\x1b[K")  # later output starts on a clean line
    assert logged[0] == "Loading: half of it (0 s)"


def test_a_step_without_a_terminal_prints_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "EVERY_S", 0.05)
    stream = io.StringIO()
    with Progress(3, 8, stream) as progress, progress.step("Loading"):
        time.sleep(0.3)
    assert stream.getvalue().splitlines()[:2] == ["Loading (0 s)"] * 2


def test_the_log_of_a_long_search_stays_short(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(1000, 8, stream)
    one = evaluation(1, 6)
    for _ in range(1000):
        now[0] += 60.0
        progress.update(one, is_new=True)
    assert 95 <= len(stream.getvalue().splitlines()) <= 102
