"""A model far larger than memory: what the process itself uses, not counting the page cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
def test_a_model_of_70_billion_parameters(io: str, tmp_path: Path) -> None:
    words = [sys.executable, str(BENCHMARK), "--json", "--io", io, "--work", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["passthrough"]["gb"] > 140
    assert figures["passthrough"]["allocated_gb"] < 0.1
    assert figures["merged"]["allocated_gb"] > 3
    for row in figures.values():
        assert row["peak_mb"] < 250, figures  # the promise is 1 GB
