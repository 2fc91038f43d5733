"""Each command of slurm/README.md, unchanged, on a real Slurm with the demo family."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gptailor.demo import PATH as DEMO
from gptailor.run.archive import Archive
from tests.cluster.cluster import ROOT, Cluster
from tests.cluster.processes import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.long(minutes=4)]  # nine searches

BLOCKS = re.findall(
    r"^```bash\n(.*?)^```", (ROOT / "slurm" / "README.md").read_text(), re.DOTALL | re.MULTILINE
)


def place(folder: Path) -> None:
    """A user's files: a configuration with its models and tasks, and the batch scripts."""
    config = yaml.safe_load((DEMO / "search.yaml").read_text())
    config["search"] |= {"evaluations": 12, "population": 6, "arms": ["random"]}
    config["output"] = "runs/mine"
    (folder / "search.yaml").write_text(yaml.safe_dump(config))
    for name in ("models", "tasks"):
        (folder / name).symlink_to(DEMO / name)
    (folder / "slurm").symlink_to(ROOT / "slurm")
    (folder / "scratch").mkdir()


@pytest.mark.timeout(1800)
def test_every_command_of_the_page_does_what_it_says(cluster: Cluster, tmp_path: Path) -> None:
    place(tmp_path)
    bin_folder = Path(sys.executable).parent
    env = {
        **cluster.env,
        "PATH": f"{bin_folder}:{cluster.env['PATH']}",
        "TMPDIR": str(tmp_path / "scratch"),
    }
    seen: set[str] = set()
    states: dict[str, str] = {}
    for text in BLOCKS:
        block = text
        if "POINT" in text:
            with Archive(tmp_path / "runs" / "mine", readonly=True) as archive:
                block = text.replace("POINT", archive.evaluations("search")[-1].recipe.point)
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", block],
            cwd=tmp_path, env=env, check=False, text=True, timeout=240,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, (block, done.stdout)
        if "mpi4py" in block:
            assert sorted(re.findall(r"(\d) of 4", done.stdout)) == ["0", "1", "2", "3"]
        jobs = set(cluster.jobs()) - seen
        seen |= jobs
        for job in jobs:
            if "afternotok" in block and states and cluster.squeue(job)[1].startswith("Depend"):
                continue  # it never runs, as the chain's first job succeeds
            states[job] = cluster.wait(job, timeout_s=300)
            logs = "".join(path.read_text() for path in tmp_path.rglob(f"*{job}*.log"))
            assert states[job] == "COMPLETED", (block, logs)
    for run in ("mine", "by-hand", "laptop", "cpu", "chain", "islands", "staged"):
        wait_until((tmp_path / "runs" / run / "front.json").exists, 5, f"the front of {run}")
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
