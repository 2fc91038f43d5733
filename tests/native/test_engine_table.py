"""The engine's table of methods comes from the declarations, and a stale one is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gptailor.errors import GptailorError
from gptailor.merging import engine_table
from gptailor.merging.engine_table import check_engine, table
from gptailor.merging.registry import METHODS

ROOT = Path(__file__).resolve().parents[2]
needs_sources = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no source tree")


@pytest.fixture
def unknown_yet() -> Iterator[None]:
    check_engine.cache_clear()
    yield
    check_engine.cache_clear()


def test_the_extension_was_built_from_the_declarations(unknown_yet: None) -> None:
    check_engine()


@pytest.mark.parametrize("change", ["another name", "another bound", "another formula", "gone"])
def test_a_stale_extension_is_refused(
    change: str, unknown_yet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ties = METHODS["ties"]
    assert ties.engine is not None
    density, *others = ties.parameters
    wider = (replace(density, high=2.0), *others)
    plain = replace(ties.engine, formula="task_arithmetic")
    changed = {
        "another name": replace(ties, name="tise"),
        "another bound": replace(ties, parameters=wider),
        "another formula": replace(ties, engine=plain),
    }
    changed_to = {"ties": changed[change]} if change in changed else {}
    others_too = {name: m for name, m in METHODS.items() if name != "ties" or change != "gone"}
    monkeypatch.setattr(engine_table, "METHODS", others_too | changed_to)
    with pytest.raises(GptailorError, match=r"built for other merge methods.*rebuild it"):
        check_engine()


def test_prose_is_not_part_of_it(unknown_yet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes that do not concern the engine need no rebuild."""
    other = replace(METHODS["ties"], paper="", in_mergekit=False)
    monkeypatch.setattr(engine_table, "METHODS", METHODS | {"ties": other})
    check_engine()


@needs_sources
def test_a_build_needs_only_the_standard_library(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-S", "-m", "gptailor.merging.engine_table", tmp_path / "table.h"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert (tmp_path / "table.h").read_text() == table()


@needs_sources
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("", ""),
        ('"ties", ties,', '"ties", tise,'),
        ("ties, magnitude, trim", "ties, magnitude, trimmed"),
        ("false, densities)", "false, density_of_all)"),
        ("MAX_SOURCES 16", "MAX_SOURCES 32"),
    ],
)
def test_a_declaration_that_the_engine_can_not_meet_does_not_compile(
    right: str, wrong: str, tmp_path: Path
) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler")
    text = table().replace("true, densities)", "false, densities)")
    assert right in text
    (tmp_path / "declared_methods.h").write_text(text.replace(right, wrong, 1) if right else text)
    source = str(ROOT / "csrc/methods.cpp")
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{tmp_path}", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (not wrong), done.stderr
