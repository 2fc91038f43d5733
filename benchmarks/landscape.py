"""A made-up family and the scores of its stitched models: a rugged landscape with good recipes.

It imitates SmolLM2-135M and three finetunes (examples/smollm2): 30 layers, and three skills that
each belong to one variant. The value of a layer for a skill depends on where it comes from and on
the layer below it in the stitched model, through random numbers derived from names, so a recipe
scores the same in every process. Nothing here is measured; only the shape is that of the example:
an accuracy of 25 % for guessing, single variants at half of the achievable accuracy, a cliff below
20 layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

from gptailor.evaluation.outcome import Cost as ArchiveCost
from gptailor.evaluation.outcome import Outcome, Score
from gptailor.models.ends import Ends
from gptailor.models.family import Family
from gptailor.recipe import Recipe
from gptailor.recipe.entry import Layer, Take

NUM_LAYERS = 30
MIN_LAYERS = 20
MODELS = {name: f"/models/{name}" for name in ("base", "units", "grammar", "python")}
SKILLS = ("units", "grammar", "python")
PARAMETERS, LAYER_PARAMETERS = 134_515_008, 3_540_096
"""The parameter counts of SmolLM2-135M and of one of its layers."""

QUESTIONS = 720
CHANCE = 0.25


class PretendFamily(Family):
    """The parts of a family that a search uses, without files."""

    def __init__(self) -> None:
        self.ends = Ends.equal(list(MODELS), "base")
        self.uneven = frozenset()

    @property
    def num_layers(self) -> int:
        return NUM_LAYERS

    def parameters(self, src_layers: Iterable[int] | None = None, rows: int | None = None) -> int:
        del rows
        kept = NUM_LAYERS if src_layers is None else len(list(src_layers))
        return PARAMETERS - (NUM_LAYERS - kept) * LAYER_PARAMETERS


class Landscape:
    """Recipe → accuracy; caches the values of layers and pairs of layers."""

    def __init__(self) -> None:
        self._worth: dict[tuple[int, str, str], tuple[float, ...]] = {}
        self._fit: dict[str, float] = {}
        edges = [2.0, 1.4] + [1.0] * (NUM_LAYERS - 3) + [1.8]
        self._importance = [
            edge * (0.5 + chance(f"importance {i}")) for i, edge in enumerate(edges)
        ]
        self._total = sum(self._importance)

    def accuracy(self, recipe: Recipe) -> float:
        """The accuracy, from 0 to 1, in steps of one question."""
        layers = recipe.canonical().layers
        sums = [0.0] * len(SKILLS)
        below = -1, "", ""
        for layer in layers:
            key = _key(layer)
            worth = self._worth.get(key) or self._worth.setdefault(key, self._value(layer, key))
            fit = self._fits(below, key) * self._importance[layer.src_layer]
            gap = 0.06 * (layer.src_layer - below[0] - 1) ** 1.3
            for k, value in enumerate(worth):
                sums[k] += value + fit - gap
            below = key
        skills = [
            CHANCE + (1 - CHANCE) / (1 + math.exp(-(s / self._total - 0.66) / 0.055)) for s in sums
        ]
        noise = 0.012 * (chance(recipe.hash) + chance(recipe.hash[::-1]) - 1)
        return min(max(round((sum(skills) / 3 + noise) * QUESTIONS), 0), QUESTIONS) / QUESTIONS

    def outcome(self, recipe: Recipe, seconds: float) -> Outcome:
        """The outcome of an evaluation like the example's: three scores and their cost."""
        accuracy = self.accuracy(recipe)
        scores = tuple(
            Score(f"smollm2_{skill}", "acc,none", accuracy, 0.05, 80, 1.0) for skill in SKILLS
        )
        cost = ArchiveCost(seconds, 0.05 * seconds, 0.91 * seconds, 240, 3664)
        return Outcome("ok", accuracy, scores, "", cost)

    def _value(self, layer: Layer, key: tuple[int, str, str]) -> tuple[float, ...]:
        weights = {layer.model: 1.0} if isinstance(layer, Take) else dict(layer.weights)
        total = sum(weights.values()) or 1.0
        name = " ".join(map(str, key))
        values = []
        for skill in SKILLS:
            share = weights.get(skill, 0.0) / total
            knows = 0.5 + 0.42 * math.tanh(2.2 * share) - 0.06 * (1 - share)
            if not isinstance(layer, Take):
                knows += 0.10 * (chance(f"{layer.method} {layer.src_layer} {skill}") - 0.4)
                knows -= 0.15 * abs(total - 1.0)
            values.append(
                self._importance[layer.src_layer]
                * (knows + 0.25 * (chance(f"{name} {skill}") - 0.5))
            )
        return tuple(values)

    def _fits(self, below: tuple[int, str, str], key: tuple[int, str, str]) -> float:
        """How well a layer fits the one below it; neighbours from one model fit slightly better."""
        name = f"{below[0]} {below[1]} | {key[0]} {key[1]}"
        if name not in self._fit:
            same = 0.03 if below[1] == key[1] else 0.0
            self._fit[name] = same + 0.22 * (chance(name) - 0.5)
        return self._fit[name]


def chance(name: str) -> float:
    """A number from 0 to 1 derived from a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big") / 2**48


def _key(layer: Layer) -> tuple[int, str, str]:
    if isinstance(layer, Take):
        return layer.src_layer, layer.model, ""
    strongest = max(layer.weights, key=lambda item: item[1])[0]
    return layer.src_layer, f"{layer.method}:{strongest}", str(layer.weights + layer.parameters)
