"""A small run of the simulation in benchmarks/scale.py: whole searches in virtual time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"


def simulate(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "one", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert not found["has_torch"]
    curve = [quality for _, quality in found["quality"]]
    assert curve == sorted(curve)
    assert curve[-1] > 0.3
    return found


@pytest.mark.parametrize("mode", ["generational", "asynchronous", "islands"])
def test_nobody_waits_for_long(mode: str) -> None:
    islands = ("--islands", "2") if mode == "islands" else ()
    found = simulate("--mode", mode, "--workers", "16", "--hours", "0.25", *islands)
    assert found["evaluations"] >= 240
    # idle at the start and the end, and for workers that wait for the end of a generation
    assert found["utilisation"] > (0.6 if mode == "generational" else 0.75)
    assert found["middle"] > (0.7 if mode == "generational" else 0.95)
    assert found["rank0_ms"] < 60  # 3 on an idle machine


def test_a_lost_node_costs_no_finished_evaluations() -> None:
    found = simulate("--workers", "16", "--hours", "0.25", "--deaths", "0.15")
    assert found["evaluations"] == 240
    assert 0 < found["lost_s"] < 120
    assert found["hours"] < 0.25 + 480 / 3600  # start, end, and the loss
