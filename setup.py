"""Builds gptailor._C from csrc/ with CMake and Ninja; everything else about the package is in pyproject.toml.

Environment: GPTAILOR_CUDA=0 leaves CUDA out, =1 fails where there is no nvcc, unset takes what is there;
GPTAILOR_CUDA_ARCHS="80;90" names the compute capabilities. CXX, CXXFLAGS, CUDACXX and CUDA_HOME count as usual.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_CUDA_ARCHS = "80;90"


def find_tool(name: str) -> str:
    """The tool that pip installed for this interpreter, or the one on PATH."""
    try:
        module = importlib.import_module(name)
        directories = [getattr(module, f"{name.upper()}_BIN_DIR", None) or getattr(module, "BIN_DIR", "")]
    except ImportError:
        directories = []
    directories += [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    path = shutil.which(name, path=os.pathsep.join(filter(None, directories)))
    if path is None:
        raise CompileError(f"gptailor: {name} is needed to build the extension: pip install {name}")
    return path


def find_nvcc() -> str | None:
    homes = [os.environ.get(key) for key in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.environ.get("CUDACXX")] + [f"{home}/bin/nvcc" for home in homes if home] + ["nvcc"]
    places.append("/usr/local/cuda/bin/nvcc")
    return next((path for place in places if place and (path := shutil.which(place))), None)


def decide_cuda() -> tuple[str | None, str, str]:
    """(path of nvcc or None, architectures, one line for the user)."""
    wish = os.environ.get("GPTAILOR_CUDA", "").strip().lower()
    if wish in ("0", "off", "no", "false"):
        return None, "", "CPU only: GPTAILOR_CUDA=0"
    nvcc = find_nvcc()
    if nvcc is None:
        if wish in ("1", "on", "yes", "true"):
            raise CompileError("gptailor: GPTAILOR_CUDA=1, but there is no nvcc: put it on PATH or set CUDA_HOME")
        return None, "", "CPU only: nvcc not found"
    archs = re.split(r"[;,\s]+", os.environ.get("GPTAILOR_CUDA_ARCHS", "").strip() or DEFAULT_CUDA_ARCHS)
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise CompileError(f"gptailor: GPTAILOR_CUDA_ARCHS must look like '80;90', not {';'.join(archs)!r}")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    version = match.group(1) if match else "(unknown version)"
    return nvcc, ";".join(archs), f"with CUDA {version} for {', '.join(archs)} + PTX"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        nvcc, archs, decision = decide_cuda()
        print(f"gptailor: building _C {decision}", flush=True)
        build = (Path(self.build_temp) / ("cmake-cuda" if nvcc else "cmake-cpu")).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake")
        arguments = [
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DGPTAILOR_CUDA={'ON' if nvcc else 'OFF'}",
        ]
        if nvcc:
            arguments += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DGPTAILOR_CUDA_ARCHS={archs}"]
        jobs = str(self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1)
        try:
            subprocess.run([cmake, "-S", CSRC, "-B", build, "-G", "Ninja", *arguments], check=True)
            subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            hint = "; GPTAILOR_CUDA=0 builds without CUDA" if nvcc else ""
            raise CompileError(f"gptailor: cmake failed, see its output above{hint}") from error

        (built,) = build.glob(f"_C*{sysconfig.get_config_var('EXT_SUFFIX')}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # A process may have the old one mapped: put the new one beside it and swap names.
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(built, temporary)
        temporary.chmod(0o755)
        temporary.replace(target)

    def copy_extensions_to_source(self) -> None:
        """What `--inplace` and editable installs do after the build; again without writing over a mapped file."""
        for ext in self.extensions:
            inplace, regular = self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext)
            temporary = f"{inplace}.{os.getpid()}.tmp"
            shutil.copy2(regular, temporary)
            os.replace(temporary, inplace)

    def get_source_files(self) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in CSRC.iterdir() if path.is_file())


setup(ext_modules=[Extension("gptailor._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
