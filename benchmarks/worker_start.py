"""CPU time in which a worker of the demo starts and evaluates, with and without garbage collection.

    python benchmarks/worker_start.py [--rounds 5]

Each figure comes from a process of its own, with one thread. "collected" starts a worker like any
Python program; "uncollected" starts it as the pool and the MPI ranks do
(`execution/worker.py`, `without_garbage_collection`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

NUM_EVALUATIONS = 10


def measure(kind: str) -> None:
    """Prints the CPU seconds until a worker is ready, and those of an evaluation."""
    from gptailor.config import read_config
    from gptailor.demo import PATH
    from gptailor.evaluation.family import open_family
    from gptailor.execution.executor import EvaluationJob
    from gptailor.execution.worker import Worker, without_garbage_collection
    from gptailor.recipe import Recipe, Take

    os.chdir(PATH)
    config = read_config(PATH / "search.yaml")
    with without_garbage_collection() if kind == "uncollected" else nullcontext():
        worker = Worker(config, open_family(config.models, config.base))
    ready = time.process_time()
    layers = tuple(Take("sort", layer) for layer in range(8))
    recipe = Recipe(config.models, "base", layers, "base", "base", "float32")
    for _ in range(NUM_EVALUATIONS):
        worker.do(EvaluationJob(recipe, "search"))
    print(ready, (time.process_time() - ready) / NUM_EVALUATIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kind", choices=("collected", "uncollected"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        measure(arguments.kind)
        return
    found: dict[str, list[tuple[float, float]]] = {"collected": [], "uncollected": []}
    for _ in range(arguments.rounds):
        for kind, rows in found.items():
            done = subprocess.run(
                [sys.executable, __file__, "--kind", kind],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            start, evaluation = map(float, done.stdout.split())
            rows.append((start, evaluation))
    for kind, rows in found.items():
        for what, values in zip(("start", "evaluation"), zip(*rows, strict=True), strict=True):
            middle = statistics.median(values)
            print(f"{kind:12} {what:10} {min(values):.3f} {middle:.3f} {max(values):.3f} s of CPU")


if __name__ == "__main__":
    main()
