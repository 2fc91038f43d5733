"""Recorded results: the same seeds give the same recipes, archives, journals, bytes and reports.

A change that only moves code changes nothing here. A change that is meant to alter results records
them again, and its commit message says why:

    python -m tests.test_golden

The recorded results contain no float that depends on a processor's kernels: searches score recipes
by a formula, in simulated time, and the engine promises the same stitched weights everywhere.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptailor.config import Config, read_config
from gptailor.demo import PATH as DEMO
from gptailor.execution.executor import EvaluationJob, Finished
from gptailor.merging.registry import METHODS
from gptailor.models.calibration import Calibration
from gptailor.models.ends import Ends
from gptailor.models.family import Family
from gptailor.recipe import Recipe, Take
from gptailor.recipe.entry import Merge
from gptailor.report import write_report
from gptailor.run.archive import Archive
from gptailor.search.island_peers import IslandPeers
from gptailor.search.progress import Progress
from gptailor.search.run import Run
from gptailor.stitching.write import write_model
from gptailor.verbs.runs import worth_a_holdout
from tests.calibrations import save_statistics
from tests.models.tiny import save_family
from tests.report.report_runs import make_run
from tests.search.archipelago import Lost, make_config, open_archive
from tests.search.helpers import MODELS, synthetic
from tests.search.simulated import Simulated, family_of

FOLDER = Path(__file__).parent / "golden"
NUM_LAYERS = 8


def digest(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


@contextmanager
def counted_time() -> Iterator[None]:
    """A clock that advances by a second each time it is read."""
    clock = itertools.count(1_700_000_000)
    real = time.time
    time.time = lambda: float(next(clock))
    try:
        yield
    finally:
        time.time = real


def rows(archive: Archive) -> list[str]:
    """One line for each evaluation in an archive, to show where a difference begins."""
    return [
        f"{e.documents} {e.recipe.hash[:12]} {e.recipe.num_layers} {e.parameters} "
        f"{e.outcome.status} {e.outcome.accuracy} {' '.join(e.arms)}".rstrip()
        for e in archive.evaluations()
    ]


def searched(
    folder: Path,
    config: Config,
    family: Any,
    workers: int,
    score: Callable[[Recipe], float | None],
) -> list[str]:
    """A search and its holdout, in simulated time."""

    def seconds(job: EvaluationJob) -> float:
        return 1.0 + job.recipe.num_layers + int(job.recipe.hash[:4], 16) / 16**4

    simulated = Simulated(workers, family.num_layers, lambda j: score(j.recipe), seconds)
    with counted_time(), Archive(folder) as archive:
        progress = Progress(config.search.evaluations, family.num_layers, stream=io.StringIO())
        run = Run(config, family, archive, simulated, progress)
        run.search()
        run.holdout([e.recipe for e in worth_a_holdout(run.evaluations("search"))])
        return rows(archive)


def demo_score(recipe: Recipe) -> float | None:
    """A layer's use depends on its depth and source; a few recipes fail."""
    if recipe.hash.startswith("00"):
        return None
    value = 0.0
    for layer in recipe.layers:
        use = 1.0 + (layer.src_layer * 7 % 5) / 4
        value += use * (1.25 if isinstance(layer, Merge) else 1.0)
        value += 0.125 * len(layer.models) * ((layer.src_layer + len(layer.models[0])) % 3)
    return value / 64


def demo_generational(folder: Path) -> list[str]:
    """The demo's own search, by generations."""
    config = read_config(DEMO / "search.yaml")
    assert config.search.schedule == "auto"
    family = Family(config.models, config.base)
    # hashes cover the models' references, which must not be paths of this machine
    named = config.model_copy(update={"models": {name: f"demo/{name}" for name in config.models}})
    return searched(folder, named, family, 2, demo_score)


def asynchronous(folder: Path) -> list[str]:
    """Seven workers, with children made one at a time."""
    config = make_config(schedule="asynchronous", evaluations=120)
    return searched(folder, config, family_of(NUM_LAYERS), 7, lambda r: synthetic(r).accuracy)


def differing_ends(folder: Path) -> list[str]:
    """Models that differ in embeddings and head, so these are genes, too."""
    apart = {name: name for name in MODELS}
    ends = Ends(apart, apart)
    return searched(folder, make_config(), family_of(NUM_LAYERS, ends), 1, demo_score)


def islands(folder: Path) -> list[str]:
    """Three islands in turn, each of which dies once and resumes later: the journals' lines."""
    config = make_config(evaluations=90)
    clock = itertools.count(step=40)  # an island that is silent for two looks is lost

    class Mortal(Simulated):
        """Dies after `left` jobs."""

        left = 10**9

        def finished(self, timeout_s: float) -> list[Finished]:
            if self.left <= 0:
                raise Lost
            found = super().finished(timeout_s)
            self.left -= len(found)
            return found

    class Impatient(IslandPeers):
        def wait(self) -> None:
            pass

    def seconds(job: EvaluationJob) -> float:
        return 1.0 + job.recipe.num_layers

    def score(job: EvaluationJob) -> float | None:
        return synthetic(job.recipe).accuracy

    def visit(island: int, jobs: int) -> None:
        mortal = Mortal(2, NUM_LAYERS, score, seconds)
        mortal.left = jobs
        with open_archive(folder, island, config) as archive:
            others = Impatient(folder, island, 3, archive, now=lambda: float(next(clock)))
            progress = Progress(config.search.evaluations, NUM_LAYERS, stream=io.StringIO())
            run = Run(config, family_of(NUM_LAYERS), archive, mortal, progress, peers=others)
            try:
                run.search()
                run.holdout([e.recipe for e in worth_a_holdout(run.evaluations("search"))])
            except Lost:
                return  # like kill -9: without notice to the others
            with others:
                pass

    with counted_time():
        for island, jobs in [(0, 17), (1, 25), (2, 9), (0, 11), (1, 10**9), (2, 10**9), (0, 10**9)]:
            visit(island, jobs)
    lines = []
    for island in range(3):
        journal = folder / "islands" / str(island) / "journal.jsonl"
        lines += [
            f"{island} {line[:60]} {digest(line)}" for line in journal.read_text().split("\n")
        ]
        with Archive(journal.parent, readonly=True) as archive:
            lines += [f"{island} {row}" for row in rows(archive)]
    return lines


def entry(method: str, number: int, models: list[str], rng: np.random.Generator) -> Merge:
    """A merge with values drawn from those the method allows."""
    declared = METHODS[method]
    most = min(declared.max_sources, len(models))
    count = int(rng.integers(declared.min_sources, most + 1))
    sources = [models[i] for i in sorted(rng.permutation(len(models))[:count])]
    weights = [float(rng.choice([0.0, 0.25, 0.5, 1.0, 1.5])) for _ in sources]
    if not any(weights):
        weights[0] = 1.0
    values: dict[str, Any] = {}
    for p in declared.parameters:
        choices = [*p.search, p.default, *((0.0, 1.0) if p.kind != "number" else ())]
        chosen = rng.choice([float(c) for c in choices if c is not None])
        if p.name == "density":
            chosen = rng.choice([0.5, 0.5, 1.0])
        values[p.name] = float(chosen)
    weighted = declared.weighted
    named = tuple((s, w if weighted else 1.0) for s, w in zip(sources, weights, strict=True))
    return Merge(method, number, named, tuple(values.items()))


def canonical(folder: Path) -> list[str]:
    """The hashes of recipes with every method."""
    del folder
    rng = np.random.default_rng(0)
    lines = []
    for method in sorted(METHODS):
        takes_base = METHODS[method].uses_base and not METHODS[method].weighted
        models = [m for m in MODELS if not (takes_base and m == "base")]
        if METHODS[method].base == "optional":
            models.remove("base")
        hashes = []
        for _ in range(40):
            layers = (entry(method, 0, models, rng), Take("red", 1))
            hashes.append(Recipe(MODELS, "base", layers, "base", "base").hash)
        lines.append(f"{method} {len(set(hashes))} {digest(' '.join(hashes))}")
    return lines


def stitched(folder: Path) -> list[str]:
    """Every file of folders stitched with each method."""
    before = Path.cwd()
    os.chdir(folder)  # keeps names independent of the machine
    try:
        models = {n: f"models/{n}" for n in save_family(Path("models"), list(MODELS), num_layers=4)}
        for method in ("fisher", "regmean"):
            save_statistics(folder / "statistics", method, models)
        family = Family(models, "base")
        rng = np.random.default_rng(1)
        lines = []
        for method in sorted(METHODS):
            declared = METHODS[method]
            names = [m for m in models if declared.base == "never" or m != "base"]
            layers = tuple(entry(method, i, names, rng) for i in range(3))
            calibration = Calibration("statistics") if declared.is_calibrated else None
            if calibration is not None:
                calibration = calibration.found([(method, name) for name in models])
            recipe = Recipe(
                models, "base", layers, "base", "base", "bfloat16", calibration=calibration
            )
            out = Path("out") / method
            write_model(recipe, family, out, sync=False)
            for path in sorted(out.iterdir()):
                lines.append(f"{method} {path.name} {digest(path.read_bytes())}")
        return lines
    finally:
        os.chdir(before)


def report(folder: Path) -> list[str]:
    """Every file of a report except pictures, whose bytes depend on matplotlib."""
    run = make_run(folder / "run", seed=3, count=60)
    write_report(run)
    found = [p for p in sorted(run.rglob("*")) if p.suffix in (".html", ".csv", ".json", ".yaml")]
    texts = {p: p.read_text().replace(str(folder), "FOLDER") for p in found}
    return [f"{p.relative_to(run)} {digest(text)}" for p, text in texts.items()]


RECORDED = (
    demo_generational, asynchronous, differing_ends, islands, canonical, stitched, report
)  # fmt: skip


@pytest.mark.parametrize("made", RECORDED, ids=lambda made: made.__name__)
def test_results_are_as_recorded(made: Callable[[Path], list[str]], tmp_path: Path) -> None:
    recorded = json.loads((FOLDER / "results.json").read_text())[made.__name__]
    assert made(tmp_path) == recorded


def bless(folder: Path) -> None:
    """Records the current results."""
    results = {}
    for made in RECORDED:
        place = folder / made.__name__
        place.mkdir()
        results[made.__name__] = made(place)
    text = json.dumps(results, indent=0, ensure_ascii=False)
    (FOLDER / "results.json").write_text(text + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        bless(Path(scratch))
