"""Checks that the demo family shows what gptailor is for. Prints a table; does not use gptailor.

    python tools/check_demo.py [FOLDER]

The table has the accuracy on the three tasks of the search, and its mean on the held-out ones, of:
each model alone; each model pruned to 9 of its 12 layers; averages and task arithmetic, whole and
pruned; and models whose layers were chosen one by one, by a plain hill climb. Greedy pruning and
the climb use only the search's documents.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

NAMES = ("base", "translate", "sort", "clock")
TASKS = NAMES[1:]
NUM_KEPT = 9

Mixture = tuple[float, ...]  # one weight for each of NAMES; they sum to 1
Recipe = list[tuple[int, Mixture]]  # (source layer, mixture) for each output layer


def alone(name: str) -> Mixture:
    """The mixture that is this model alone."""
    return tuple(float(name == other) for other in NAMES)


def task_arithmetic(*weights: float) -> Mixture:
    """base + Σ weight · (finetune − base)."""
    return (1 - sum(weights), *weights)


class Bench:
    """Holds the models and the documents, and computes the accuracy of any recipe."""

    def __init__(self, folder: Path) -> None:
        self.model, *others = (
            LlamaForCausalLM.from_pretrained(folder / "models" / name, dtype=torch.float32)
            for name in NAMES
        )
        self.layers = list(self.model.model.layers)
        self.weights: list[list[dict[str, Tensor]]] = [
            [{key: value.clone() for key, value in layer.state_dict().items()} for layer in layers]
            for layers in (self.layers, *(other.model.layers for other in others))
        ]
        tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "base", padding_side="right")
        self.docs = {}
        for suffix in ("", "_holdout"):
            for task in TASKS:
                text = (folder / "tasks" / f"demo_{task}{suffix}.jsonl").read_text(encoding="utf-8")
                rows = [json.loads(line) for line in text.splitlines()]
                contexts = tokenizer([row["context"] for row in rows], padding=True)
                lengths = torch.tensor(contexts["attention_mask"]).sum(1)
                choices = [tokenizer.convert_tokens_to_ids(row["choices"]) for row in rows]
                gold = torch.tensor([row["gold"] for row in rows])
                ids = torch.tensor(contexts["input_ids"])
                self.docs[task + suffix] = ids, lengths - 1, torch.tensor(choices), gold

    @torch.no_grad()
    def accuracy(self, recipe: Recipe, *, holdout: bool = False) -> list[float]:
        """Accuracy on each task, in float32."""
        for layer, (source, mixture) in zip(self.layers, recipe, strict=False):
            parts = [(w, self.weights[i][source]) for i, w in enumerate(mixture) if w]
            layer.load_state_dict({key: sum(w * p[key] for w, p in parts) for key in parts[0][1]})
        self.model.model.layers = nn.ModuleList(self.layers[: len(recipe)])
        result = []
        for task in TASKS:
            ids, last, choices, gold = self.docs[task + "_holdout" * holdout]
            logits = self.model(ids, use_cache=False).logits[torch.arange(len(ids)), last]
            right = logits.gather(1, choices).argmax(1) == gold
            result.append(right.float().mean().item())
        return result

    def mean(self, recipe: Recipe) -> float:
        """Mean accuracy on the search's documents."""
        return sum(self.accuracy(recipe)) / len(TASKS)

    def best(self, recipes: Iterable[Recipe]) -> Recipe:
        """The recipe with the highest mean, the first one on a tie."""
        return max(recipes, key=self.mean)

    def greedy(self, recipe: Recipe) -> Recipe:
        """Drop the layer whose loss hurts least until `NUM_KEPT` are left."""
        while len(recipe) > NUM_KEPT:
            recipe = self.best(recipe[:i] + recipe[i + 1 :] for i in range(len(recipe)))
        return recipe

    def climb(self, options: list[Mixture], evaluations: int, seed: int = 0) -> Recipe:
        """Change one layer of a random recipe at a time, and keep changes that do not hurt."""
        rng = random.Random(seed)
        num_layers = len(self.layers)
        chosen = sorted(rng.sample(range(num_layers), NUM_KEPT))
        best = [(layer, rng.choice(options)) for layer in chosen]
        best_mean = self.mean(best)
        for _ in range(evaluations):
            recipe = list(best)
            place = rng.randrange(NUM_KEPT)
            source, mixture = recipe[place]
            if rng.random() < 0.3:
                kept = [layer for layer, _ in recipe]
                source = rng.choice([i for i in range(num_layers) if i not in kept])
            else:
                mixture = rng.choice(options)
            recipe[place] = (source, mixture)
            recipe.sort()
            mean = self.mean(recipe)
            if mean >= best_mean:
                best, best_mean = recipe, mean
        return best

    def show(self, name: str, recipe: Recipe) -> None:
        """Print a row of the table."""
        searched = self.accuracy(recipe)
        held_out = self.accuracy(recipe, holdout=True)
        cells = [*searched, sum(searched) / len(TASKS), sum(held_out) / len(TASKS)]
        cells_text = " ".join(f"{cell:9.1%}" for cell in cells)
        print(f"{name:38} {len(recipe):2} {cells_text}", flush=True)


def report(folder: Path) -> None:
    """Print the whole table."""
    bench = Bench(folder)
    num_layers = len(bench.layers)

    def whole(mixture: Mixture) -> Recipe:
        return [(layer, mixture) for layer in range(num_layers)]

    def blocks(mixture: Mixture) -> Iterable[Recipe]:
        full, gap = whole(mixture), num_layers - NUM_KEPT
        return (full[:i] + full[i + gap :] for i in range(NUM_KEPT + 1))

    headings = " ".join(f"{name:>9}" for name in (*TASKS, "mean", "holdout"))
    print(f"{'':35}layers {headings}")
    mixtures = {name: alone(name) for name in NAMES}
    mixtures["uniform average of all four"] = (0.25,) * 4
    mixtures["uniform average of the finetunes"] = (0.0, *(1 / 3,) * 3)
    for weight in (0.5, 0.7, 1.0):
        mixtures[f"task arithmetic, {weight} of each"] = task_arithmetic(*(weight,) * 3)
    for name, mixture in mixtures.items():
        bench.show(name, whole(mixture))
    for name, mixture in mixtures.items():
        bench.show(f"{name}, block cut", bench.best(blocks(mixture)))
    for name, mixture in mixtures.items():
        bench.show(f"{name}, greedy", bench.greedy(whole(mixture)))
    selection = [alone(name) for name in NAMES]
    merges = [mixtures[name] for name in mixtures if name.startswith(("uni", "task"))]
    merges += [
        tuple((a + b) / 2 for a, b in zip(x, y, strict=True))
        for i, x in enumerate(selection)
        for y in selection[:i]
    ]
    bench.show("climb, selection only", bench.climb(selection, 250))
    bench.show("climb, selection and merges", bench.climb(selection + merges, 250))


if __name__ == "__main__":
    torch.set_num_threads(1)
    default = Path(__file__).resolve().parent.parent / "gptailor" / "demo"
    report(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
