"""The CUDA sources run on the CPU, with `emulated_cuda/cuda_runtime.h` in place of CUDA's header.

Without a GPU, this tests everything except the hardware: indices, barriers, the order of sums and
the host's code. It can't test races between blocks, or speed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = [
    "tests/native/test_merge_gpu.py",
    "tests/native/test_load.py",
    "tests/evaluation/test_device_merge.py",
]
RUN = """
import importlib.util, sys
import gptailor
spec = importlib.util.spec_from_file_location("gptailor._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["gptailor._C"] = gptailor._C = module
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree")
def test_kernels_on_the_cpu(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    find_tool = _setup()["find_tool"]
    cmake = find_tool("cmake")
    configure = [
        cmake, "-S", ROOT / "csrc", "-B", tmp_path, "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DGPTAILOR_EMULATED_CUDA={ROOT / 'tests/native/emulated_cuda'}",
        "-DGPTAILOR_WERROR=ON",
    ]  # fmt: skip
    for command in (configure, [cmake, "--build", tmp_path]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("_C*.so")
    result = subprocess.run(
        [sys.executable, "-c", RUN, built, "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed.group(1)) > 100, result.stdout


def _setup() -> dict[str, Any]:
    import runpy

    import setuptools

    real, setuptools.setup = setuptools.setup, lambda **_: None
    try:
        return runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = real
