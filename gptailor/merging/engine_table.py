"""Generates the compiled engine's table of methods from the declarations.

The build runs `python -m gptailor.merging.engine_table FILE` with only the standard library
(csrc/CMakeLists.txt). An unknown formula or field is then a compile error. The extension keeps a
digest of the table, so an extension built from other declarations is refused.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from gptailor.errors import GptailorError
from gptailor.merging.method import Engine, Method
from gptailor.merging.parameter import BASE_FLAG, Parameter
from gptailor.merging.registry import MAX_SOURCES, METHODS


def table() -> str:
    """A C++ header with the macros from which csrc/methods.cpp and csrc/merge_cuda.cu are built."""
    text = "".join(f"{line}\n" for line in _lines())
    return f'{text}\n#define GPTAILOR_METHODS_DIGEST "{digest()}"\n'


def digest() -> str:
    """16 hex digits that identify everything the engine knows about the declarations."""
    text = "\n".join(line for line in _lines() if not line.startswith("//"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def check_engine() -> None:
    """Checks the compiled extension, once; to be called before it merges anything.

    Raises:
        GptailorError: it was built from other declarations.
    """
    from gptailor import _C

    if _C.build_info()["methods_digest"] != digest():
        raise GptailorError(
            f"{_C.__file__} was built for other merge methods than this version of gptailor has: "
            "rebuild it with `pip install .`."
        )


def _lines() -> Iterator[str]:
    yield "// Made from gptailor/merging/registry.py by gptailor/merging/engine_table.py."
    yield f"#define GPTAILOR_MAX_SOURCES {MAX_SOURCES}"
    yield f'#define GPTAILOR_BASE_FLAG "{BASE_FLAG}"'
    yield ""
    yield "// name, formula, keep, analysis, sphere, base, sources, statistics, GPU, parameters"
    yield "#define GPTAILOR_METHODS(METHOD, PARAMETER) \\"
    for method in METHODS.values():
        if method.engine is not None:
            yield from _method(method, method.engine)
    yield ""
    yield "// The kernels that the GPU's methods need: formula, keep."
    yield "#define GPTAILOR_GPU_KERNELS(KERNEL) \\"
    engines = [m.engine for m in METHODS.values() if m.engine is not None and m.engine.on_gpu]
    # "all" too: where every density is 1, nothing has to be kept
    kernels = {(e.formula, keep): None for e in engines for keep in ("all", e.keep)}
    for formula, keep in kernels:
        yield f"  KERNEL({formula}, {keep}) \\"
    yield ""


def _method(method: Method, engine: Engine) -> Iterator[str]:
    fields = (
        f'"{method.name}"', engine.formula, engine.keep, engine.analysis, engine.sphere,
        method.base, str(method.min_sources), str(method.max_sources),
        _bool(method.is_calibrated), _bool(engine.on_gpu),
    )  # fmt: skip
    yield f"  METHOD({', '.join(fields)}, \\"
    for parameter in method.parameters:
        yield f"    {_parameter(parameter)} \\"
    yield "  ) \\"


def _parameter(p: Parameter) -> str:
    default = "kNeeded" if p.default is None else repr(float(p.default))
    bounds = f"{float(p.low)!r}, {float(p.high)!r}"
    return f'PARAMETER("{p.name}", {default}, {bounds}, {_bool(p.per_source)}, {p.field})'


def _bool(value: bool) -> str:
    return str(value).lower()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table(), encoding="utf-8")
