"""The demo: its family is what it claims, and its report shows what gptailor is for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptailor import verbs
from gptailor.config import read_config
from gptailor.demo import PATH
from gptailor.models.family import Family
from gptailor.run.archive import Archive
from gptailor.stitching.write import RECIPE_FILE

SAID = re.compile(
    r"Searching 12 layers|Evaluations are computed in float32, |Documents: "
    r"|Measuring what the layers|\d+/320 evaluations|Scoring \d+ recipes on the"
    r"|.* \(\d+ (s|min)\)$"  # slow steps
)


@pytest.mark.long(minutes=1)  # 320 evaluations
@pytest.mark.timeout(900)
def test_the_demo(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "gptailor.cli", "demo", "--workers", "2", "--out", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    it_says_how_far_it_is_and_nothing_else(done.stderr)
    each_variant_is_best_at_a_skill_of_its_own(run)
    a_stitched_model_beats_every_simple_cut(run)
    it_ends_with_a_report_and_a_model(run)


def it_says_how_far_it_is_and_nothing_else(stderr: str) -> None:
    """No warnings from Python or a library, such as the one about leaked semaphores."""
    for line in stderr.splitlines():
        assert SAID.match(line), line


def test_the_family_is_small_and_real() -> None:
    config = read_config(PATH / "search.yaml")
    family = Family(config.models, config.base)
    assert len(config.models) == 4
    assert family.num_layers >= 8
    assert 100_000 < family.parameters() < 1_000_000
    size = sum(p.stat().st_size for p in PATH.rglob("*") if p.is_file() and p.suffix != ".pyc")
    assert size < 4_000_000


def each_variant_is_best_at_a_skill_of_its_own(run: Path) -> None:
    with Archive(run, readonly=True) as archive:
        evaluations = archive.evaluations("search")
    dense = {
        arm.removeprefix("dense:"): {s.task: s.value for s in e.outcome.scores}
        for e in evaluations
        for arm in e.arms
        if arm.startswith("dense:")
    }
    tasks = next(iter(dense.values()))
    best = {task: max(dense, key=lambda m: dense[m][task]) for task in tasks}
    assert sorted(best.values()) == sorted(set(dense) - {"base"})
    for task, model in best.items():
        others = max(scores[task] for name, scores in dense.items() if name != model)
        assert dense[model][task] > others + 0.2


def a_stitched_model_beats_every_simple_cut(run: Path) -> None:
    """At about 75 % of the layers, on the documents of the search and on the holdout's."""
    report = json.loads((run / "front.json").read_text())
    with Archive(run, readonly=True) as archive:
        evaluations = archive.evaluations()
    num_layers = report["num_layers"]

    def best(documents: str, *, arms: bool) -> float:
        return max(
            e.outcome.accuracy or 0.0
            for e in evaluations
            if e.documents == documents
            and e.recipe.num_layers <= 0.76 * num_layers
            and bool(e.arms) == arms
        )

    assert best("search", arms=False) > best("search", arms=True) + 0.1
    assert best("holdout", arms=False) > best("holdout", arms=True) + 0.1


def it_ends_with_a_report_and_a_model(run: Path) -> None:
    assert (run / "report" / "index.html").is_file()
    (model,) = (run / "models").iterdir()
    assert (model / RECIPE_FILE).is_file()
    verbs.demo(run)  # a second run finds everything done
