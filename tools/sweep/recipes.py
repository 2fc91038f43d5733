"""The recipes to try with every family: whole, cut at each end and in the middle, repeated,
reordered, from two candidates, merged, scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cut:
    """One recipe, as names of models and indices of layers.

    Attributes:
        name: the recipe's name.
        layers: (model, source layer) of each output layer; the model "merge" is the mean of both.
        ends: the model of embeddings and head.
        scale: (index of an output layer, factor on its output).
    """

    name: str
    layers: tuple[tuple[str, int], ...]
    ends: str = "base"
    scale: tuple[int, float] | None = None


QUICK = (
    "all", "no first", "no third", "no last", "odd", "swapped", "third other", "mixed", "merged",
    "scaled", "arms",
)  # fmt: skip
"""Names of recipes that find nearly all faults."""


def cuts(num_layers: int) -> list[Cut]:
    """The recipes to try with every family."""
    every = range(num_layers)

    def base(name: str, layers: Sequence[int]) -> Cut:
        return Cut(name, tuple(("base", i) for i in layers))

    return [
        base("all", every),
        base("no first", every[1:]),
        base("no second", [0, *every[2:]]),
        base("no third", [*every[:2], *every[3:]]),
        base("no last", every[:-1]),
        base("first two", every[:2]),
        base("last two", every[-2:]),
        base("even", every[::2]),
        base("odd", every[1::2]),
        base("twice", [0, 1, 1, *every[2:]]),
        base("swapped", [0, 2, 1, *every[3:]]),
        Cut("dense other", tuple(("other", i) for i in every), "other"),
        Cut("second other", tuple(("other" if i == 1 else "base", i) for i in every)),
        Cut("third other", tuple(("other" if i == 2 else "base", i) for i in every)),
        Cut("mixed", tuple(("other" if i % 2 else "base", i) for i in every if i != 2)),
        Cut("merged", tuple(("merge" if i == 1 else "base", i) for i in every)),
        Cut("scaled", tuple(("base", i) for i in every), scale=(1, 0.8)),
    ]


def recipe_of(cut: Cut, models: Mapping[str, str], dtype: str) -> Any:
    """The cut as a gptailor recipe."""
    from gptailor.recipe import Merge, Recipe, Take

    layers: list[Any] = []
    for number, (model, src_layer) in enumerate(cut.layers):
        if model == "merge":
            weights = tuple((name, 0.5) for name in models)
            layers.append(Merge("linear", src_layer, weights, (("normalize", 1.0),)))
        else:
            scale = cut.scale[1] if cut.scale and cut.scale[0] == number else 1.0
            layers.append(Take(model, src_layer, scale=scale))
    return Recipe(dict(models), "base", tuple(layers), cut.ends, cut.ends, dtype)
