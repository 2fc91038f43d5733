"""The model card of a stitched model: recipe, provenance, scores."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import yaml

from gptailor.merging.registry import get_method
from gptailor.models.family import Family
from gptailor.models.untrusted import is_folder
from gptailor.recipe import End, Layer, Merge, Recipe
from gptailor.stitching.plan import count_parameters


def model_card(recipe: Recipe, family: Family, notes: str = "", repair: str = "") -> str:
    """The text of `README.md`, with the front matter that the Hugging Face hub reads.

    Args:
        recipe: the recipe that was built.
        family: the opened candidates.
        notes: Markdown to put before the layer map, for example scores.
        repair: Markdown about the recipe's repair, to put after the layer map.
    """
    hub_ids = [ref for ref in recipe.models.values() if not is_folder(Path(ref))]
    front = {
        "base_model": hub_ids or None,
        "library_name": "transformers",
        "tags": ["merge", "pruned", "gptailor"],
    }
    front_matter = yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False)
    kept, total = recipe.num_layers, family.num_layers
    parameters = count_parameters(recipe, family)
    used = Counter(model for layer in recipe.layers for model in layer.used_models)
    models = "\n".join(
        f"| {name} | {_shown(ref)} | {used[name]} |" for name, ref in recipe.models.items()
    )
    lines = [
        f"---\n{front_matter}---",
        "# Stitched model",
        f"{kept} of {total} layers, {parameters:,} parameters ({recipe.dtype}). Cut, stitched and "
        "merged from the models below with gptailor, without training "
        "([arXiv 2506.20480](https://arxiv.org/abs/2506.20480)).",
        notes.strip(),
        f"| model | source | layers it contributes to |\n|---|---|---|\n{models}",
        f"Config, tokenizer: {recipe.base}. Embeddings: {_end(recipe.embeddings)}. "
        f"Final norm and head: {_end(recipe.head)}.",
        "Each line is an output layer, bottom to top; `gptailor_recipe.yaml` rebuilds the model.",
        "```\n" + "\n".join(_layer_lines(recipe)) + "\n```",
        repair.strip(),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def _shown(ref: str) -> str:
    """A model's reference; a local folder's name only, because a card is published."""
    path = Path(ref)
    return f"`{path.name}` (local)" if is_folder(path) else ref


def _end(end: End) -> str:
    return end if isinstance(end, str) else _what(end)


def _layer_lines(recipe: Recipe) -> list[str]:
    lines = []
    for out_layer, layer in enumerate(recipe.layers):
        scale = f" × {layer.scale:g}" if layer.scale != 1.0 else ""
        lines.append(f"{out_layer:3d} ← layer {layer.src_layer} of {_what(layer)}{scale}")
    return lines


def _what(entry: Layer) -> str:
    """ "math", or "slerp(math, code; t 0.5)", followed by what is different for modules."""
    what = entry.models[0]
    if isinstance(entry, Merge):
        sources, values = ", ".join(entry.models), []
        if get_method(entry.method).weighted:
            sources = ", ".join(f"{model} {weight:g}" for model, weight in entry.weights)
        for name, value in entry.parameters:
            each = value if isinstance(value, tuple) else (value,)
            values.append(f"{name} {'/'.join(f'{one:g}' for one in each)}")
        what = f"{entry.method}({'; '.join(filter(None, (sources, ', '.join(values))))})"
    return what + "".join(f"; {text}: {_what(part)}" for text, part in entry.modules)
