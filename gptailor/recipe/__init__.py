"""Recipes: descriptions of stitched models, layer by layer; pure data, no weights."""

from gptailor.recipe.entry import NO_LAYER, Layer, Merge, Take
from gptailor.recipe.recipe import (
    DTYPES,
    SCHEMA,
    End,
    KnownLayers,
    Recipe,
    absolute_ref,
    dense_recipe,
    read_recipe,
)
from gptailor.recipe.repair import CalibrationDocuments, CalibrationTask, Repair

__all__ = [
    "DTYPES",
    "NO_LAYER",
    "SCHEMA",
    "CalibrationDocuments",
    "CalibrationTask",
    "End",
    "KnownLayers",
    "Layer",
    "Merge",
    "Recipe",
    "Repair",
    "Take",
    "absolute_ref",
    "dense_recipe",
    "read_recipe",
]
