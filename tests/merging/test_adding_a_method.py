"""Adding a method takes a declaration, a formula, a reference and a row in the docs.

The test adds one to a copy of the tree, builds it, and runs the conformance tests there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

DECLARATION = """
_CLIPPED = _method(
    "clipped",
    "b + the sum of w_i (x_i - b), held within -t and t",
    "Nobody 2026, in this test",
    LAMBDA,
    Parameter("t", 0.2, 0.0, 10.0, (0.1,), "no element moves further", field="params.t"),
    engine=Engine("clipped", on_gpu=True),
    in_mergekit=False,
)

_TABLE = (
    _CLIPPED,
"""

FORMULA = """
// base + lambda * sum_i w_i d_i, the sum within -t and t.
struct Clipped {
  static constexpr bool kUsesBase = true, kTakesDelta = true;
  static constexpr int kState = 1;
  GPTAILOR_HD static void step(float (&sum)[kState], float d, float weight, const Params&) {
    sum[0] += weight * d;
  }
  GPTAILOR_HD static float end(const float (&sum)[kState], float base, const Params& p) {
    const float low = sum[0] < -p.t ? -p.t : sum[0];
    return p.factor * (base + p.lambda * (low > p.t ? p.t : low));
  }
};

// The struct of a formula.
"""

REFERENCE = '''
"""Sums of differences that go no further than a bound."""

import numpy as np

from .averages import weighted_sum
from .formulas import computes


@computes("clipped", lam="lambda")
def clipped(x_SN, base_N, w_S, *, lam, t, dtype=np.float64):
    base = np.asarray(base_N, dtype)
    sum_N = weighted_sum(np.asarray(x_SN, dtype) - base, np.asarray(w_S, dtype))
    return base + dtype(lam) * np.clip(sum_N, dtype(-t), dtype(t))
'''

ROW = "| `clipped` | b + Σ wᵢ δᵢ within ±t | `lambda` (1), `t` (0.2) | a test | not in mergekit |\n"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


def files(tree: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tree)): path.read_bytes()
        for folder in ("gptailor", "csrc", "docs", "tests")
        for path in (tree / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree")
def test_a_method_is_a_declaration_a_formula_and_a_reference(tmp_path: Path) -> None:
    for folder in ("gptailor", "csrc", "docs", "tests"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    before = files(tmp_path)
    edit(tmp_path / "gptailor/merging/registry.py", "\n_TABLE = (\n", DECLARATION)
    formulas = tmp_path / "csrc/formulas.h"
    edit(
        formulas,
        "FORMULA(fisher, Fisher)\n",
        "FORMULA(fisher, Fisher) \\\n  FORMULA(clipped, Clipped)\n",
    )
    edit(formulas, "\n// The struct of a formula.\n", FORMULA)
    (tmp_path / "gptailor/merging/reference/clipped.py").write_text(REFERENCE.lstrip())
    docs = tmp_path / "docs/merge_methods.md"
    row = next(line for line in docs.read_text().splitlines(True) if line.startswith("| `fisher`"))
    edit(docs, row, ROW + row)
    after = files(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {
        "gptailor/merging/registry.py",
        "csrc/formulas.h",
        "gptailor/merging/reference/clipped.py",
        "docs/merge_methods.md",
    }

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "GPTAILOR_CUDA": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python("setup.py", "build_ext", "--inplace")
    tests = ("tests/merging/test_conformance.py", "tests/search/test_space.py")
    said = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "clipped", *tests)
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None
    assert int(passed[1]) >= 12, said
    assert "skipped" not in said
    everything = python("-m", "pytest", "-q", "-p", "no:cacheprovider", tests[0])
    assert "failed" not in everything
