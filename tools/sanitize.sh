#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a scratch copy of the
# tree and runs the tests that exercise it. The normal build is left alone. `make sanitize` runs it.
#   tools/sanitize.sh [pytest arguments]      default: the tests that exercise the extension
# PYTHON is an interpreter with the build tools and the tests' packages; SANITIZE_DIR keeps object
# files between runs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
scratch=$(realpath -m "${SANITIZE_DIR:-build/sanitize}")
tree=$scratch/tree

rm -rf "$tree"
mkdir -p "$tree"
tar -c --exclude='*.so' --exclude=__pycache__ gptailor tests csrc setup.py pyproject.toml README.md LICENSE |
  tar -x -C "$tree"
GPTAILOR_SANITIZE=${GPTAILOR_SANITIZE:-address,undefined} "$python" setup.py -q build_ext \
  --build-temp "$scratch/build" --build-lib "$scratch/lib"
cp "$scratch"/lib/gptailor/_C*.so "$tree/gptailor/"

# The interpreter is not instrumented, so the runtime must be preloaded, and libstdc++ with it,
# because ASan looks for __cxa_throw when it starts.
compiler=${CXX:-c++}
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so.6)"
export LD_PRELOAD
# Leaks are not checked: the interpreter and torch keep memory until the process ends. Some tests
# ask for more memory than there is, which must be std::bad_alloc, as without ASan.
# A SIGBUS is left to the extension's own handler, which turns a shrunk file into an error.
export ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:allocator_may_return_null=1:strict_string_checks=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$tree PYTHONMALLOC=malloc
cd "$tree"
"$python" - <<'PY'
from pathlib import Path

from gptailor import _C

assert Path(_C.__file__).is_relative_to(Path.cwd()), _C.__file__
print("under test:", _C.__file__, _C.build_info())
PY
[ $# -gt 0 ] || set -- tests/native tests/hostile/test_native_boundary.py \
  tests/hostile/test_folders.py --ignore tests/native/test_build.py
# pytest must leave descriptor 2 alone, or the sanitizer's report is lost with the process.
exec "$python" -m pytest -q -p no:cacheprovider -p no:faulthandler --capture=sys \
  -m "not slow and not gpu" "$@"
