"""Three evaluations that measure the cost of one in a search: dense, half merged, smallest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gptailor.errors import UsageError
from gptailor.evaluation.evaluator import Evaluator
from gptailor.recipe import Recipe
from gptailor.search.space import KEEP, LEVELS, METHOD, SearchSpace


@dataclass(frozen=True)
class Probe:
    """One measured evaluation.

    Attributes:
        name: dense, half merged or smallest.
        layers: number of layers that the recipe keeps.
        seconds: from the recipe to its scores.
        assemble_s: of these, until the model was ready.
        forward_s: of these, inside the model.
        tokens: number of tokens in forward passes, padding included.
    """

    name: str
    layers: int
    seconds: float
    assemble_s: float
    forward_s: float
    tokens: int


def probe_recipes(space: SearchSpace) -> dict[str, Recipe]:
    """The recipes that are measured.

    With repairs, the half merged one lacks a layer in the middle, if it may: most recipes of a
    search have something to repair.
    """
    dense = space.blank()
    half = dense.copy()
    if space.methods:  # ends that differ, too: they are the largest merges
        is_merged = np.ones(len(half), dtype=bool)
        is_merged[space.layer_rows] = np.arange(space.num_layers) % 2 == 1
        half[is_merged, METHOD] = 1
        half[is_merged, LEVELS:] = 1 + len(space.weights) // 2
    smallest = dense.copy()
    free = np.setdiff1d(np.arange(space.num_layers), space.protected)
    count = max(space.min_layers - len(space.protected), 0)
    gone = np.delete(free, np.linspace(0, len(free) - 1, count).round().astype(int))
    smallest[space.layer_rows][gone, KEEP] = 0
    if space.repair is not None and len(gone):
        half[space.layer_rows][gone[len(gone) // 2], KEEP] = 0
    genomes = {"dense": dense, "half merged": half, "smallest": smallest}
    return {name: space.decode(genome) for name, genome in genomes.items()}


def measure_probes(evaluator: Evaluator, space: SearchSpace) -> list[Probe]:
    """Evaluates the probes on the documents of the search; records nothing.

    Raises:
        UsageError: one of them has no scores.
        ModelError: the architecture can't be repaired.
        ResourceError: memory is exhausted.
    """
    requests = evaluator.workloads["search"].requests()
    evaluator.lm.encoded(requests.get("loglikelihood", []))  # a worker does this only once
    probes = []
    recipes = probe_recipes(space)
    for recipe in recipes.values():
        if recipe.repair is not None:  # teachers run only once, too
            evaluator.repairs.lessons(evaluator.repairs.resolved(recipe))
    for name, recipe in recipes.items():
        outcome = evaluator.evaluate(recipe)
        if outcome.status != "ok":
            reason = outcome.reason.strip().splitlines()[-1]
            raise UsageError(f"The probe evaluation ({name}) ended as {outcome.status}: {reason}")
        cost = outcome.cost
        probes.append(
            Probe(
                name,
                recipe.num_layers,
                cost.seconds,
                cost.assemble_s,
                cost.forward_s,
                cost.num_tokens,
            )
        )
    return probes
