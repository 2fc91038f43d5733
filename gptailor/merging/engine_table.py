"""The compiled engine's table of methods, made from the declarations.

A build runs `python -m gptailor.merging.engine_table FILE`, with the standard library alone
(csrc/CMakeLists.txt). An unknown formula or field is then an error of the compiler. The extension
keeps a digest of the table, so that one that was built from other declarations is refused.
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
    """A C++ header: macros for what csrc/methods.cpp and csrc/merge_cuda.cu are made of."""
    text = "".join(f"{line}\n" for line in _lines())
    return f'{text}\n#define GPTAILOR_METHODS_DIGEST "{digest()}"\n'


def digest() -> str:
    """16 hex digits that stand for all that the engine knows of the declarations."""
    text = "\n".join(line for line in _lines() if not line.startswith("//"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def check_engine() -> None:
    """To be called before the compiled extension merges anything; looks once.

    Raises:
        GptailorError: it was built from other declarations.
    """
    from gptailor import _C

    if _C.build_info()["methods_digest"] != digest():
        raise GptailorError(
            f"{_C.__file__} was built for other merge methods than this version of gptailor has: "
            "build it again with `pip install .`."
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
