"""How weights are read, and from where, is an argument of the verbs.

The environment only holds the default, which is nonsense here, so anything that uses it fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gptailor import _C, verbs
from gptailor.errors import UsageError
from gptailor.recipe import Recipe, Take


@pytest.fixture(autouse=True)
def nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTAILOR_IO", "nonsense")
    monkeypatch.setenv("GPTAILOR_STAGE", "/nowhere")


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes in which this process opens files."""
    seen: list[str] = []
    real = _C.open_input

    def open_input(path: str, io: str) -> _C.InputFile:
        seen.append(io)
        return real(path, io)

    monkeypatch.setattr(_C, "open_input", open_input)
    return seen


def test_stitch(models: dict[str, str], tmp_path: Path, modes: list[str]) -> None:
    recipe = Recipe(models, "base", (Take("red", 0), Take("base", 1)), "base", "base")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    with pytest.raises(UsageError, match="GPTAILOR_IO"):
        verbs.stitch(path, tmp_path / "out", verify=False)
    verbs.stitch(path, tmp_path / "out", verify=False, io="pread")
    assert set(modes) == {"pread"}


def test_evaluate(models: dict[str, str], tasks_dir: Path, modes: list[str]) -> None:
    def evaluate(io: str | None = None) -> object:
        return verbs.evaluate(
            models["red"], ["t_long"], include_path=str(tasks_dir), limit=2, device="cpu", io=io
        )

    with pytest.raises(UsageError, match="GPTAILOR_IO"):
        evaluate()
    assert evaluate(io="pread") == evaluate(io="mmap")
    assert set(modes) == {"pread", "mmap"}


@pytest.mark.parametrize("workers", [1, 2])
def test_search(
    workers: int,
    models: dict[str, str],
    tasks_dir: Path,
    tmp_path: Path,
    modes: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The search works on copies, but its archive names the originals."""
    config = {
        "models": models,
        "base": "base",
        "evaluation": {"tasks": ["t_long"], "include_path": str(tasks_dir), "device": "cpu"},
        "search": {"population": 4, "evaluations": 4, "arms": []},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(config))
    if workers == 1:  # with a pool, it only takes longer
        with pytest.raises(UsageError, match="GPTAILOR_IO"):
            verbs.search(path, workers=workers)
        with pytest.raises(UsageError, match=r"--stage: /nowhere is not a folder"):
            verbs.search(path, workers=workers, io="pread")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("NODE_DISK", str(scratch))
    run = verbs.search(path, workers=workers, io="pread", stage="$NODE_DISK")
    assert len(list(scratch.glob("*/*/model.safetensors"))) == len(models)
    written = (run / "archive.db").read_bytes() + (run / "config.yaml").read_bytes()
    assert str(scratch).encode() not in written
    assert models["red"].encode() in written
    assert set(modes) <= {"pread"}
