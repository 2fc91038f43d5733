"""Coverage-guided fuzzing, with atheris, of the code that reads files from the internet.

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris pydantic PyYAML numpy pytest
    PYTHONPATH=. /tmp/fuzz/bin/python tools/fuzz.py header /tmp/corpus/header -runs=1000000
    PYTHONPATH=. /tmp/fuzz/bin/python tools/fuzz.py minimize /tmp/corpus

The first argument is a target in tests/hostile/targets.py, the second a folder for the corpus
(created from the seeds if missing); further arguments are libFuzzer's. A finding is written to the
working directory as crash-*, timeout-* or oom-*: add it to tests/hostile/corpus/TARGET with the
fix. `minimize` chooses for each target small inputs that together reach all the lines that the
folder reaches, and copies them there. atheris is not one of the package's dependencies.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

MAX_KEPT = 60
"""The most inputs per target to commit."""


def main() -> None:
    """Runs libFuzzer; it does not return."""
    import atheris

    with atheris.instrument_imports(include=["gptailor", "yaml"]):
        from tests.hostile.targets import TARGETS

    name, corpus = sys.argv[1], Path(sys.argv[2])
    target = TARGETS[name]
    if not corpus.exists():
        corpus.mkdir(parents=True)
        kept = Path(__file__).parent.parent / "tests" / "hostile" / "corpus" / name
        old = [path.read_bytes() for path in kept.glob("*")]
        for i, data in enumerate([*target.seeds(), *old]):
            (corpus / f"seed-{i}").write_bytes(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        mutated = target.mutate(rng, data) if rng.random() < 0.7 else atheris.Mutate(data, max_size)
        return mutated[:max_size]

    limits = ["-timeout=10", "-rss_limit_mb=2000", "-max_len=4096", "-print_final_stats=1"]
    words = [sys.argv[0], *limits, *sys.argv[3:], str(corpus)]
    atheris.Setup(words, target.run, custom_mutator=mutate)
    atheris.Fuzz()


def minimize(folder: Path) -> None:
    """Copies to tests/hostile/corpus small inputs that together reach every line."""
    from tests.hostile.targets import TARGETS

    for name, target in TARGETS.items():
        reached: set[tuple[str, int]] = set()
        out = Path(__file__).parent.parent / "tests" / "hostile" / "corpus" / name
        out.mkdir(parents=True, exist_ok=True)
        found = [path for path in (folder / name).glob("*") if path.stat().st_size < 3000]
        kept = 0
        for path in sorted(found, key=lambda p: (p.stat().st_size, p.name)):
            lines = _lines(target.run, path.read_bytes())
            if not lines <= reached and kept < MAX_KEPT:
                reached |= lines
                kept += 1
                (out / path.name[:12]).write_bytes(path.read_bytes())
        print(f"{name}: {kept} of {len(found)} inputs, {len(reached)} lines")


def _lines(run: object, data: bytes) -> set[tuple[str, int]]:
    """The lines of gptailor that an input reaches."""
    lines: set[tuple[str, int]] = set()

    def trace(frame: object, event: str, argument: object) -> object:
        del argument
        code = frame.f_code  # type: ignore[attr-defined]
        if "/gptailor/" not in code.co_filename:
            return None
        if event == "line":
            lines.add((code.co_filename, frame.f_lineno))  # type: ignore[attr-defined]
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        run(data)  # type: ignore[operator]
    finally:
        sys.settrace(None)
    return lines


if __name__ == "__main__":
    if sys.argv[1] == "minimize":
        minimize(Path(sys.argv[2]))
    else:
        main()
