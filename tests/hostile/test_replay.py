"""The fuzz targets on the kept corpus and on seeded mutations: a few seconds, no atheris.

GPTAILOR_FUZZ_RUNS makes it longer, GPTAILOR_FUZZ_SEED changes its seed. `tools/fuzz.py` does the
coverage-guided run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hostile.targets import TARGETS, random_inputs

CORPUS = Path(__file__).parent / "corpus"
RUNS = int(os.environ.get("GPTAILOR_FUZZ_RUNS", "300"))
SEED = int(os.environ.get("GPTAILOR_FUZZ_SEED", "0"))


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name: str) -> None:
    files = sorted((CORPUS / name).glob("*"))
    assert files, f"tests/hostile/corpus/{name} is empty"
    for path in files:
        TARGETS[name].run(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_mutations(name: str) -> None:
    target = TARGETS[name]
    for data in target.seeds():
        target.run(data)
    for data in random_inputs(target, SEED, RUNS):
        try:
            target.run(data)
        except Exception as error:
            error.add_note(f"input: {data!r}") if hasattr(error, "add_note") else None
            raise


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 200_000
