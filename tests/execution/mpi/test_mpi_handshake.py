"""Ranks that don't belong together are refused in one sentence, before anything is evaluated."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from gptailor.errors import UsageError
from gptailor.execution.mpi import launcher
from tests.execution.mpi import mpi_tools as mpi
from tests.models.tiny import save_model


def test_another_gptailor(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(
        mpi.ROOT / "gptailor", other / "gptailor", ignore=shutil.ignore_patterns("demo")
    )
    with (other / "gptailor" / "errors.py").open("a") as file:
        file.write("# another one\n")
    path = mpi.write_search(tmp_path)
    part = ["env", f"PYTHONPATH={other}{os.pathsep}{mpi.ROOT}"]
    ended = mpi.wait(mpi.start(["search", str(path)], 2, parts=[part]), 60)
    assert ended.code == 2, ended.stderr
    (sentence,) = ended.sentences
    assert "gptailor's files differ" in sentence
    assert str(other) in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("shift_s", "code"), [(3600, 2), (-60, 0)])
def test_clocks_that_differ(shift_s: int, code: int, tmp_path: Path) -> None:
    path = mpi.write_search(tmp_path, evaluations=12)
    (tmp_path / "sitecustomize.py").write_text(
        f"import time\nright = time.time\ntime.time = lambda: right() + {shift_s}\n"
    )
    part = ["env", f"PYTHONPATH={tmp_path}{os.pathsep}{mpi.ROOT}"]
    ended = mpi.wait(mpi.start(["search", str(path)], 2, parts=[part]), 60)
    assert ended.code == code, ended.stderr
    if code:
        (sentence,) = ended.sentences
        assert "The clock of" in sentence
        assert "3600 s ahead" in sentence or "3599 s ahead" in sentence
    else:
        assert "behind that of" in mpi.log(tmp_path / "run", 0)
        assert mpi.count(tmp_path / "run") == 12


def test_models_that_differ(tmp_path: Path) -> None:
    """A copy's different timestamps don't matter; different weights of the same size do."""
    path = mpi.write_search(tmp_path, evaluations=12)
    family, copy = tmp_path / "family", tmp_path / "copy"
    shutil.copytree(family, copy)
    part = hiding(f"mount --bind {copy} {family}")
    ended = mpi.wait(mpi.start(["search", str(path)], 2, parts=[part]), 60)
    assert ended.code == 0, ended.stderr
    save_model(copy / "green", 8, name="another")
    ended = mpi.wait(mpi.start(["search", str(path), "--resume"], 2, parts=[part]), 60)
    assert ended.code == 2, ended.stderr
    (sentence,) = ended.sentences
    assert f"green ({family / 'green'}) is not the same everywhere" in sentence
    assert "rank 2 on" in sentence
    shutil.rmtree(copy / "green")
    ended = mpi.wait(mpi.start(["search", str(path), "--resume"], 2, parts=[part]), 60)
    assert ended.code == 3, ended.stderr
    (sentence,) = ended.sentences
    assert "rank 2 on" in sentence
    assert "does not exist" in sentence


@pytest.mark.slow  # over NFS a file can take half a minute to appear, so the refusal takes as long
def test_a_run_folder_that_is_not_shared(tmp_path: Path) -> None:
    path = mpi.write_search(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    part = hiding(f"mount -t tmpfs none {run}")
    began = time.monotonic()
    ended = mpi.wait(mpi.start(["search", str(path)], 2, parts=[part]), 90)
    assert ended.code == 2, ended.stderr
    assert time.monotonic() - began < 60
    (sentence,) = ended.sentences
    assert f"The run folder {run} is not shared" in sentence


def hiding(mount: str) -> list[str]:
    """Words to put before a command so that it sees another file system."""
    hide = ["unshare", "--mount"]
    if subprocess.run([*hide, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs permission to create mount namespaces")
    return [*hide, "sh", "-c", f'{mount} && exec "$@"', "sh"]


def test_a_mistake_is_reported_once(tmp_path: Path) -> None:
    path = mpi.write_search(tmp_path)
    for words, what in (
        (["search", str(path), "search.populaton=3"], "did you mean 'population'"),
        (["search", str(tmp_path / "none.yaml")], "can't be read"),
        (["serch", str(path)], "did you mean 'search'"),
    ):
        ended = mpi.wait(mpi.start(words, 3, program=("-m", "gptailor.cli")), 60)
        assert ended.code == 2, ended.stderr
        (sentence,) = ended.sentences
        assert what in sentence


def test_one_rank(tmp_path: Path) -> None:
    path = mpi.write_search(tmp_path)
    ended = mpi.wait(mpi.start(["search", str(path), "--executor", "mpi"], 1), 60)
    assert ended.code == 2, ended.stderr
    (sentence,) = ended.sentences
    assert "at least two ranks" in sentence


def test_a_launcher_without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert launcher.join("local") is None
    with pytest.raises(UsageError, match=r"pip install 'gptailor\[mpi\]'"):
        launcher.join("auto")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    with pytest.raises(SystemExit):  # only one of them reports it
        launcher.join("auto")
