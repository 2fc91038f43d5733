"""What the build decides, and whether a build with CUDA works without a GPU."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptailor import _C

ROOT = Path(__file__).resolve().parents[2]
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree")


def build(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", out / "t", "--build-lib", out],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_build_info() -> None:
    info = _C.build_info()
    assert info["cuda"] == (info["cuda_version"] is not None) == bool(info["cuda_archs"])
    assert info["simd"] in {"portable", "avx2", "avx512"}
    assert info["max_sources"] == 16
    assert _C.cuda_device_count() >= 0


def test_without_cuda_the_error_says_how_to_get_it() -> None:
    if _C.build_info()["cuda"]:
        pytest.skip("built with CUDA")
    with pytest.raises(RuntimeError, match=r"built without CUDA.*GPTAILOR_CUDA=1"):
        _C.merge_cuda("linear", [], [])


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[str | None, str, str]]:
    """`decide_cuda` of setup.py."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    own = ("GPTAILOR_CUDA", "GPTAILOR_SANITIZE", "GPTAILOR_CUDA_ARCHS")
    for key in (*own, "CUDA_HOME", "CUDA_PATH", "CUDACXX"):
        monkeypatch.delenv(key, raising=False)
    decide_cuda: Callable[[], tuple[str | None, str, str]]
    decide_cuda = runpy.run_path(str(ROOT / "setup.py"))["decide_cuda"]
    return decide_cuda


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake CUDA toolkit that only prints its version."""
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.131\n")
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(path.parents[1]))
    return path


@needs_sources
def test_without_nvcc(decide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert decide() == (None, "", "CPU only: nvcc not found")
    monkeypatch.setenv("GPTAILOR_CUDA", "1")
    with pytest.raises(Exception, match="GPTAILOR_CUDA=1, but no nvcc"):
        decide()


@needs_sources
def test_with_nvcc(decide: Any, nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide() == (str(nvcc), "80;90", "with CUDA 12.4 for 80, 90 + PTX")
    monkeypatch.setenv("GPTAILOR_CUDA_ARCHS", "90, 100a")
    assert decide()[1:] == ("90;100a", "with CUDA 12.4 for 90, 100a + PTX")
    monkeypatch.setenv("GPTAILOR_CUDA_ARCHS", "sm_90")
    with pytest.raises(Exception, match="must look like '80;90', not 'sm_90'"):
        decide()
    monkeypatch.setenv("GPTAILOR_CUDA", "0")
    assert decide() == (None, "", "CPU only: GPTAILOR_CUDA=0")


@needs_sources
def test_a_build_for_the_sanitizers_has_no_cuda(
    decide: Any, nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTAILOR_SANITIZE", "address, undefined")
    assert decide() == (None, "", "CPU only: GPTAILOR_SANITIZE")
    assert decide.__globals__["decide_sanitizers"]() == "address,undefined"
    monkeypatch.setenv("GPTAILOR_SANITIZE", "adress")
    with pytest.raises(Exception, match=r"GPTAILOR_SANITIZE takes address, .*, not 'adress'"):
        decide()


@needs_sources
@pytest.mark.slow
def test_a_cuda_build_imports_without_a_gpu(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    result = build(tmp_path, GPTAILOR_CUDA="1", GPTAILOR_CUDA_ARCHS="90")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "for 90 + PTX" in result.stdout
    assert "warning" not in result.stdout
    (path,) = (tmp_path / "gptailor").glob("_C*.so")
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("gptailor._C", {str(path)!r})
c = importlib.util.module_from_spec(spec)
spec.loader.exec_module(c)
assert c.build_info()["cuda"] and c.build_info()["cuda_archs"] == "90"
print(c.cuda_device_count())
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "0"


@needs_sources
@pytest.mark.skipif(_C.cuda_device_count() > 0, reason="there is a GPU")
def test_the_gpu_benchmark_says_that_there_is_no_gpu() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert re.fullmatch(r"There is no usable GPU here.*: nothing to measure\.\n", done.stderr)
