"""What repairing the recipes of a search buys: whole searches that differ only in their repairs.

    python benchmarks/repair_search.py FOLDER [--seeds 4] [--layers 9,8,7,6] [key=value ...]

The folder holds a `search.yaml` with a holdout; `key=value` changes one of its settings, as for
`gptailor search`. For each seed there are three searches:

- `alternate`, the default: recipes are repaired in every second layer from each gap on,
- `after`: in every layer from the first gap on,
- `front`: not at all, but the refitted merge of the first search is one of its candidates.

The front of each is repaired like that of the first one. The table has, for each number of layers,
the best stitched recipe with at most so many: its accuracy on the search's documents, by which it
was chosen, and on the holdout; means of all seeds. Seconds are those of the search's evaluations.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptailor import verbs
from gptailor.config import REFIT, Config, read_config
from gptailor.evaluation.evaluator import Evaluator
from gptailor.evaluation.family import open_family
from gptailor.evaluation.outcome import Evaluation
from gptailor.recipe import Recipe, Repair
from gptailor.run.folder import read_run
from gptailor.verbs.runs import worth_a_holdout

REFITTED = "refitted"
"""What the refitted merge is called where the search has not made it."""


def searched(config: Config, out: Path, repair: Any, **models: str) -> list[Evaluation]:
    """Searches with this `space.repair` and more candidates; returns all evaluations."""
    data = config.model_dump()
    data["models"] |= models
    data["space"]["repair"] = repair
    run = verbs.search(Config.model_validate({**data, "output": str(out)}))
    return list(read_run(run).evaluations)


def repaired_front(evaluations: list[Evaluation], repair: Repair) -> list[Recipe]:
    """The stitched recipes of an unrepaired front, repaired."""
    teachers = repair.teachers
    assert not isinstance(teachers, str)
    names = tuple((group, REFITTED if name == REFIT else name) for group, name in teachers)
    best = worth_a_holdout([e for e in evaluations if e.documents == "search"])
    chosen = [e.recipe for e in best if not e.arms]
    return [recipe.with_repair(replace(repair, teachers=names)) for recipe in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--layers", default="9,8,7,6")
    arguments = parser.parse_intermixed_args()
    sizes = [int(size) for size in arguments.layers.split(",")]
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    for seed in range(arguments.seeds):
        overrides = [*arguments.overrides, f"search.seed={seed}"]
        config = read_config(arguments.folder / "search.yaml", overrides)
        with tempfile.TemporaryDirectory() as scratch:
            first, second, third = (Path(scratch) / name for name in ("1", "2", "3"))
            runs = {"alternate": searched(config, first, "auto")}
            runs["after"] = searched(config, second, {"layers": "after"})
            runs["front"] = searched(config, third, False, **{REFITTED: str(first / REFIT)})
            fronts = {
                kind: [e.recipe for e in rows if e.documents == "front" and not e.arms]
                for kind, rows in runs.items()
            }
            repair = fronts["alternate"][0].repair
            assert repair is not None
            fronts["front"] = repaired_front(runs["front"], repair)
            for kind, run in zip(runs, (first, second, third), strict=True):
                opened = read_config(run / "config.yaml")
                if opened.has_refit:
                    opened = opened.with_refit()
                family = open_family(opened.models, opened.base)
                evaluator = Evaluator(family, opened.evaluation, seed=seed)
                rows = [e for e in runs[kind] if e.documents == "search"]
                seconds[kind].append(sum(e.outcome.cost.seconds for e in rows))
                scored = [(r, evaluator.evaluate(r).accuracy or 0.0) for r in fronts[kind]]
                for size in sizes:
                    small = [(value, r) for r, value in scored if r.num_layers <= size]
                    if not small:
                        continue
                    value, recipe = max(small, key=lambda one: one[0])
                    held_out = evaluator.evaluate(recipe, "holdout").accuracy or 0.0
                    found[kind, size].append((value, held_out))
    print(f"{'layers':>6} {'repairs':10} {'search':>7} {'holdout':>8} {'seeds':>6} {'seconds':>8}")
    for (kind, size), pairs in sorted(found.items(), key=lambda item: -item[0][1]):
        search, holdout = (statistics.mean(one) for one in zip(*pairs, strict=True))
        print(
            f"{size:6} {kind:10} {search:7.3f} {holdout:8.3f} {len(pairs):6} "
            f"{statistics.median(seconds[kind]):8.0f}"
        )


if __name__ == "__main__":
    main()
