"""slurm/README.md: checks that need no Slurm; tests/cluster runs its commands."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from gptailor import cli
from gptailor.demo import PATH as DEMO

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "slurm" / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def test_every_launch_in_the_readme_makes_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "search.yaml").write_text((DEMO / "search.yaml").read_text())
    for name in ("models", "tasks"):
        (tmp_path / name).symlink_to(DEMO / name)
    monkeypatch.chdir(tmp_path)
    launches = [line for line in commands() if line.startswith("gptailor launch")]
    assert len(launches) >= 5
    for line in launches:
        words = shlex.split(line)[1:]
        assert cli.main([*words, *([] if "--dry-run" in words else ["--dry-run"])]) == 0, line
    assert not (tmp_path / "runs").exists()


def test_the_verbs_have_the_options_in_the_readme(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = ""
    for verb in ("launch", "search"):
        with pytest.raises(SystemExit):
            cli.main([verb, "-h"])
        shown += capsys.readouterr().out
    for option in ("--signal-before", "--gpus-per-worker", "--stage", "--islands", "--setup",
                   "--slurm", "--mem", "--island"):  # fmt: skip
        assert option in README
        assert option in shown


@pytest.mark.parametrize("name", ["search.sh", "stitch.sh"])
def test_batch_scripts_are_executable_shell(name: str) -> None:
    path = ROOT / "slurm" / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.stat().st_mode & 0o100
    assert path.read_text().startswith("#!/bin/bash\n")
