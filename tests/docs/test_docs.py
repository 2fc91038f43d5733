"""The README is correct: its configuration, its recipe and each of its commands work unchanged."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gptailor import cli
from gptailor.commands import COMMANDS
from gptailor.recipe import DTYPES, Recipe
from gptailor.recipe.repair import read_repair
from gptailor.run.archive import Archive

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()

NEEDS_SLURM = {"launch"}
"""Verbs that only get a `--dry-run` here: tests/cluster runs them with a real Slurm."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def place(folder: Path, family_dir: Path, tasks_dir: Path) -> None:
    """The files that the README's configuration names."""
    for name, like in (("base", "base"), ("math", "red"), ("code", "green")):
        shutil.copytree(family_dir / like, folder / "models" / name)
    (folder / "tasks").mkdir()
    for path in tasks_dir.iterdir():
        if path.is_file():
            shutil.copy(path, folder / "tasks" / path.name)
    for name, like in (("reasoning", "t_shared"), ("reading", "t_long"), ("fresh", "t_differing")):
        text = (tasks_dir / f"{like}.yaml").read_text().replace(f"task: {like}", f"task: {name}")
        (folder / "tasks" / f"{name}.yaml").write_text(text)


def test_every_command_of_the_readme_runs(
    family_dir: Path,
    tasks_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place(tmp_path, family_dir, tasks_dir)
    config = next(block for block in blocks("yaml") if block.startswith("# search.yaml"))
    (tmp_path / "search.yaml").write_text(config)
    merge = next(block for block in blocks("yaml") if block.startswith("# merge.yml"))
    (tmp_path / "merge.yml").write_text(merge)
    recipe = next(block for block in blocks("yaml") if block.startswith("schema:"))
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "sample.txt").write_text("w01 w02 w03\nw04 w05\n")
    monkeypatch.chdir(tmp_path)
    commands = [
        line
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("gptailor ")
    ]
    assert {line.split()[1] for line in commands} == set(COMMANDS) - {"demo"}
    for line in commands:
        words = line.split()[1:]
        if words[0] in NEEDS_SLURM:
            words.append("--dry-run")
        if "POINT" in words:
            with Archive("runs/mine", readonly=True) as archive:
                words[words.index("POINT")] = archive.evaluations("search")[-1].recipe.point
        assert cli.main(words) == 0, (line, capsys.readouterr().err)


def test_the_python_of_the_readme_runs(
    family_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path, family_dir, tasks_dir)
    config = yaml.safe_load(next(b for b in blocks("yaml") if b.startswith("# search.yaml")))
    config["search"]["evaluations"] = 6
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "mine" / "report" / "index.html").is_file()


def test_the_recipe_of_the_readme_builds(
    family_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path, family_dir, tasks_dir)
    text = next(block for block in blocks("yaml") if block.startswith("schema:"))
    assert Recipe.from_yaml(text).num_layers == 5
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    command = re.search(r"`(gptailor stitch recipe.yaml [^`]*)`", README)
    assert command is not None
    assert cli.main(command[1].split()[1:]) == 0
    assert (tmp_path / "my-model" / "config.json").is_file()


def test_make_has_the_targets_of_the_readme() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


PAGES = ["README.md", "slurm/README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES)
def test_links_have_targets(path: str) -> None:
    file = ROOT / path
    for target in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), target


def test_help_answers_at_once_and_shows_an_example() -> None:
    code = (
        "import sys; from gptailor import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'pymoo', 'pydantic', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for verb in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-c", code, verb, "-h"], capture_output=True, text=True, check=True
        )
        assert "example: gptailor" in done.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/repair.md"])
def test_the_repairs_of_the_pages_are_read(page: str) -> None:
    text = (ROOT / page).read_text()
    found = re.findall(r"^```yaml\n(repair:.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found
    for block in found:
        repair = read_repair(yaml.safe_load(block)["repair"], ["base", "math"], DTYPES, page)
        assert repair.calibration.groups == ("reasoning", "reading", "text")
