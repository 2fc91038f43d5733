"""Shows where an evaluation's time goes: assembling the model, the forward pass, and the rest.

    python benchmarks/evaluate.py              # the demo family, a few seconds
    python benchmarks/evaluate.py SEARCH.YAML  # another family, a dozen evaluations
    python benchmarks/evaluate.py RUN          # a finished run, from its archive

The first two print the time from a recipe to a model that is ready to evaluate, for layers that
are only selected and for layers that are all merged, the first time and again (from the cache).
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from gptailor.config import read_config
from gptailor.evaluation.outcome import Cost
from gptailor.recipe import Layer, Merge, Recipe, Take
from gptailor.run.archive import Archive


def shares(costs: list[Cost]) -> None:
    seconds = sum(c.seconds for c in costs)
    forward = sum(c.forward_s for c in costs)
    assemble = sum(c.assemble_s for c in costs)
    print(f"{len(costs)} evaluations, {seconds:.1f} s, {sum(c.num_tokens for c in costs)} tokens")
    print(f"  inside the forward pass   {forward / seconds:6.1%}")
    print(f"  assembling the model      {assemble / seconds:6.1%}")
    print(f"  the rest                  {(seconds - forward - assemble) / seconds:6.1%}")
    print(f"  not in the forward pass   {(seconds - forward) / seconds:6.1%}")


def from_archive(run: Path) -> None:
    with Archive(run, readonly=True) as archive:
        evaluations = archive.evaluations("search")
    shares([e.outcome.cost for e in evaluations if e.outcome.status == "ok"])


def from_config(path: Path) -> None:
    from gptailor.evaluation.evaluator import Evaluator
    from gptailor.models.family import Family

    config = read_config(path)
    family = Family(config.models, config.base)
    began = time.perf_counter()
    evaluator = Evaluator(family, config.evaluation, seed=config.search.seed)
    print(f"open and build requests      {time.perf_counter() - began:8.2f} s")
    names = list(config.models)
    variants = [name for name in names if name != config.base] or names

    def recipe(layers: list[Layer]) -> Recipe:
        dtype = config.space.dtype
        return Recipe(config.models, config.base, tuple(layers), config.base, config.base, dtype)

    def selected(shift: int) -> Recipe:
        kept = [i for i in range(family.num_layers) if (i + shift) % 4]
        return recipe([Take(names[(i + shift) % len(names)], i) for i in kept])

    def merged(weight: float) -> Recipe:
        values = (("lambda", 1.0), ("normalize", 0.0))
        weights = tuple((name, weight) for name in variants)
        return recipe(
            [Merge("task_arithmetic", i, weights, values) for i in range(family.num_layers)]
        )

    def ready(recipes: list[Recipe], what: str) -> None:
        taken = []
        for one in recipes:
            began = time.perf_counter()
            evaluator.resident.assemble(one)
            taken.append((time.perf_counter() - began) * 1e3)
        middle = statistics.median(taken)
        print(f"{what:28} {min(taken):8.1f} {middle:8.1f} {max(taken):8.1f} ms (min median max)")

    for name in names:  # so that all files are mapped and all pages are in memory
        evaluator.evaluate(recipe([Take(name, i) for i in range(family.num_layers)]))
    ready([selected(i % 8) for i in range(20)], "ready: layers selected")
    ready([merged(0.3 + 0.01 * i) for i in range(8)], "ready: all layers merged")
    ready([merged(0.37)] * 8, "ready: merged, cached")
    shares([evaluator.evaluate(selected(i)).cost for i in range(8)])


def main() -> None:
    from gptailor.demo import PATH

    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PATH / "search.yaml"
    if target.is_dir():
        from_archive(target)
    else:
        from_config(target)


if __name__ == "__main__":
    main()
