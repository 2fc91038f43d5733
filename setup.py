"""Builds gptailor._C from csrc/ with CMake and Ninja; the rest of the package is in pyproject.toml.

Environment: GPTAILOR_CUDA=0 leaves CUDA out, =1 fails without nvcc, unset builds CUDA if nvcc is
found; GPTAILOR_CUDA_ARCHS="80;90" names the compute capabilities. CXX, CXXFLAGS, CUDACXX and
CUDA_HOME work as usual. GPTAILOR_SANITIZE=address,undefined builds with those sanitizers, without
CUDA and in a separate build folder; tools/sanitize.sh runs the tests with them.
"""

from __future__ import annotations

import contextlib
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
SANITIZERS = ("address", "undefined", "thread", "leak", "float-cast-overflow")


def find_tool(name: str) -> str:
    """The tool that pip installed for this interpreter, or the one on PATH."""
    directories = []
    with contextlib.suppress(ImportError):
        module = importlib.import_module(name)  # cmake.CMAKE_BIN_DIR, ninja.BIN_DIR
        directories += [getattr(module, key, "") for key in ("CMAKE_BIN_DIR", "BIN_DIR")]
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


def decide_sanitizers() -> str:
    """The argument of -fsanitize, or the empty string."""
    names = [name for name in re.split(r"[,\s]+", os.environ.get("GPTAILOR_SANITIZE", "")) if name]
    for name in names:
        if name not in SANITIZERS:
            known = ", ".join(SANITIZERS)
            raise CompileError(f"gptailor: GPTAILOR_SANITIZE takes {known}, not {name!r}")
    return ",".join(names)


def decide_cuda() -> tuple[str | None, str, str]:
    """Returns (path of nvcc or None, architectures, one line for the user)."""
    wish = os.environ.get("GPTAILOR_CUDA", "").strip().lower()
    if wish in ("0", "off", "no", "false"):
        return None, "", "CPU only: GPTAILOR_CUDA=0"
    if decide_sanitizers():
        return None, "", "CPU only: GPTAILOR_SANITIZE"
    nvcc = find_nvcc()
    if nvcc is None:
        if wish in ("1", "on", "yes", "true"):
            raise CompileError(
                "gptailor: GPTAILOR_CUDA=1, but no nvcc: put it on PATH or set CUDA_HOME"
            )
        return None, "", "CPU only: nvcc not found"
    wanted = os.environ.get("GPTAILOR_CUDA_ARCHS", "").strip() or DEFAULT_CUDA_ARCHS
    archs = re.split(r"[;,\s]+", wanted)
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise CompileError(f"gptailor: GPTAILOR_CUDA_ARCHS must look like '80;90', not {wanted!r}")
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    version = match.group(1) if match else "(unknown version)"
    return nvcc, ";".join(archs), f"with CUDA {version} for {', '.join(archs)} + PTX"


def install(built: Path, target: Path) -> None:
    """Copies to a temporary name and renames: a running process may have the old file mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(built, temporary)
    temporary.chmod(0o755)
    temporary.replace(target)


class CMakeBuild(build_ext):  # type: ignore[misc]
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        nvcc, archs, decision = decide_cuda()
        print(f"gptailor: building _C {decision}", flush=True)
        sanitizers = decide_sanitizers()
        kind = "sanitize" if sanitizers else "cuda" if nvcc else "cpu"
        build = (Path(self.build_temp) / f"cmake-{kind}").resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake")
        arguments = [
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DGPTAILOR_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DGPTAILOR_SANITIZE={sanitizers}",
        ]
        if nvcc:
            arguments += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DGPTAILOR_CUDA_ARCHS={archs}"]
        environment = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
        jobs = str(self.parallel or environment or os.cpu_count() or 1)
        try:
            subprocess.run([cmake, "-S", CSRC, "-B", build, "-G", "Ninja", *arguments], check=True)
            subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            hint = "; GPTAILOR_CUDA=0 builds without CUDA" if nvcc else ""
            raise CompileError(f"gptailor: cmake failed, see its output above{hint}") from error

        (built,) = build.glob(f"_C*{sysconfig.get_config_var('EXT_SUFFIX')}")
        install(built, Path(self.get_ext_fullpath(ext.name)).resolve())

    def copy_extensions_to_source(self) -> None:
        """The last step of `--inplace` and editable installs; replaces files by renaming."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            install(built, Path(self.get_ext_fullpath(ext.name)))

    def get_source_files(self) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in CSRC.iterdir() if path.is_file())


setup(ext_modules=[Extension("gptailor._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
