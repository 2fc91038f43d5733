"""Made-up but plausible runs: seeded archives for the tests of the report."""

from __future__ import annotations

import json
import math
import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from gptailor.evaluation.outcome import Cost, Outcome, Score
from gptailor.recipe import Layer, Merge, Recipe, Take
from gptailor.run.archive import Archive

LAYERS = 12
PER_LAYER, REST = 25_000, 60_000
TASKS = (("piqa", "acc,none", 1.0), ("arc_easy", "acc_norm,none", 1.0), ("gsm", "em,none", 2.0))
HOLDOUT = (("winogrande", "acc,none", 1.0), ("boolq", "acc,none", 1.0))
NAMES = ("base", "math", "code", "chat")
SKILL = {"piqa": (0.63, 0.6, 0.59, 0.66), "arc_easy": (0.55, 0.58, 0.52, 0.57)}
SKILL |= {"gsm": (0.22, 0.48, 0.33, 0.27)}
SKILL |= {"winogrande": (0.56, 0.55, 0.54, 0.58), "boolq": (0.6, 0.63, 0.59, 0.64)}
CRASH = """Traceback (most recent call last):
  File "worker.py", line 10, in evaluate
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"""


def dense(name: str, names: tuple[str, ...] = NAMES) -> Recipe:
    return recipe_of([Take(name, i) for i in range(LAYERS)], names, name)


def recipe_of(layers: list[Layer], names: tuple[str, ...] = NAMES, end: str = "") -> Recipe:
    end = end or names[0]
    refs = {name: f"./models/{i}" for i, name in enumerate(names)}
    return Recipe(refs, names[0], tuple(layers), end, end)


def score_of(
    task: str,
    metric: str,
    values: list[float],
    weight: float = 1.0,
    chance: float | None = 0.0,
    *,
    keep: bool = True,
) -> Score:
    """The score of these documents; without their values if not `keep`, like in old archives."""
    value = sum(values) / len(values)
    stderr = math.sqrt(value * (1 - value) / (len(values) - 1))
    score = Score(task, metric, value, stderr, len(values), weight)
    return replace(score, values=tuple(values), chance=chance) if keep else score


def outcome(
    rng: random.Random,
    accuracies: dict[str, float],
    tasks: tuple[tuple[str, str, float], ...] = TASKS,
) -> Outcome:
    """One model's answers: a document that is hard for one model is mostly hard for all."""
    count = 400
    scores = []
    for task, metric, weight in tasks:
        hard = random.Random(task)
        right = min(0.98, max(0.01, accuracies[task]))
        values = [float(hard.random() + rng.gauss(0, 0.05) < right) for _ in range(count)]
        scores.append(score_of(task, metric, values, weight))
    accuracy = sum(s.value * s.weight for s in scores) / sum(s.weight for s in scores)
    forward = rng.uniform(2.0, 3.5)
    cost = Cost(forward * 1.22, 0.3, forward, count * len(tasks), 61 * count * len(tasks))
    return Outcome("ok", accuracy, tuple(scores), "", cost)


def skill_of(recipe: Recipe, names: tuple[str, ...] = NAMES, loss: float = 1.0) -> dict[str, float]:
    """Plausible accuracies: the right variant's layers help, and each further cut hurts more."""
    cut = set(range(LAYERS)) - set(recipe.src_layers)
    harm = sum(0.02 + 0.10 * (layer < 2 or layer == LAYERS - 1) for layer in cut)
    harm = loss * (harm + 0.004 * len(cut) ** 2)
    result = {}
    for task, by_model in SKILL.items():
        gains = []
        for layer in recipe.layers:
            values = [by_model[names.index(model)] for model in layer.models]
            gains.append(sum(values) / len(values) + 0.012 * (len(values) > 1))
        result[task] = max(0.05, 0.3 * max(gains) + 0.7 * sum(gains) / len(gains) - harm)
    return result


def random_layers(rng: random.Random, keep: int, names: tuple[str, ...]) -> list[Layer]:
    kept = sorted([0, *rng.sample(range(1, LAYERS - 1), keep - 2), LAYERS - 1])
    layers: list[Layer] = []
    for src in kept:
        kind = rng.random()
        a, b = rng.sample(names, 2)
        if kind < 0.62:
            layers.append(Take(rng.choice(names), src, 1.0 if kind < 0.55 else 0.97))
        elif kind < 0.75:
            layers.append(Merge("slerp", src, ((a, 1.0), (b, 1.0)), (("t", 0.5),)))
        else:
            a, b = sorted(rng.sample(names[1:], 2))
            weights = ((a, 0.5), (b, rng.choice([0.5, 1.0])))
            values = (("lambda", rng.choice([0.3, 0.7, 1.0])), ("normalize", 0.0))
            layers.append(Merge("task_arithmetic", src, weights, values))
    return layers


def make_run(
    folder: Path,
    *,
    seed: int = 0,
    count: int = 150,
    names: tuple[str, ...] = NAMES,
    holdout: bool = True,
    meta: bool = True,
) -> Path:
    """A whole run: candidates, control arms, a search with failures, the holdout on the front."""
    rng = random.Random(seed)
    with Archive(folder) as archive:
        refs = dense(names[0], names).models
        if meta:
            sizes = dict.fromkeys(names, size_of(LAYERS))
            family = {"num_layers": LAYERS, "models": dict(refs), "parameters": sizes}
            archive.set_meta("family", json.dumps(family))
            search = {"algorithm": "nsga2", "population": 24, "evaluations": count, "seed": seed}
            archive.set_meta("config", json.dumps({"models": dict(refs), "search": search}))
        add_controls(archive, rng, names)
        for index in range(count):
            keep = rng.choice([5, 6, 7, 8, 8, 9, 9, 10, 11])
            recipe = recipe_of(random_layers(rng, keep, names), names)
            early = outcome(rng, skill_of(recipe, names))
            add(archive, recipe, "search-100-5f3c", early)
            late = outcome(rng, skill_of(recipe, names, loss=1.0 - 0.35 * index / count))
            if index % 29 == 7:
                late = Outcome("failed", None, (), CRASH, Cost(0.4, 0.3))
            elif index % 23 == 5:
                late = Outcome("infeasible", None, (), "the model needs 9.1 GB, 8 are free", Cost())
            elif rng.random() < 0.4:
                continue
            add(archive, recipe, "search", late)
        if holdout:
            add_holdout(archive, rng, names)
    with closing(sqlite3.connect(folder / "archive.db")) as db, db:
        db.execute("UPDATE evaluations SET finished_at = 1700000000 + 7 * number")
    return folder


def size_of(layers: int) -> int:
    return REST + PER_LAYER * layers


def add(archive: Archive, recipe: Recipe, documents: str, result: Outcome) -> None:
    if archive.find(recipe, documents) is None:
        archive.record(recipe, documents, size_of(recipe.num_layers), result)


def add_controls(archive: Archive, rng: random.Random, names: tuple[str, ...]) -> None:
    for name in names:
        recipe = dense(name, names)
        archive.add_arm(f"dense:{name}", recipe)
        add(archive, recipe, "search", outcome(rng, skill_of(recipe, names)))
    for size in (0.5, 0.75):
        keep = round(size * LAYERS)
        cuts = {
            "block_influence": sorted(rng.sample(range(3, LAYERS - 1), LAYERS - keep)),
            "angular": list(range(LAYERS - 1 - (LAYERS - keep), LAYERS - 1)),
            "random": sorted(rng.sample(range(LAYERS), LAYERS - keep)),
        }
        for arm, cut in cuts.items():
            layers: list[Layer] = [Take(names[0], i) for i in range(LAYERS) if i not in cut]
            add_arm(archive, rng, f"{arm}:{size}@{names[0]}", layers, names)
        weights = tuple((name, 0.25) for name in names)
        mean: list[Layer] = [
            Merge("linear", i, weights, (("normalize", 1.0),))
            for i in range(LAYERS)
            if i not in cuts["angular"]
        ]
        add_arm(archive, rng, f"uniform:{size}", mean, names)


def add_arm(
    archive: Archive, rng: random.Random, arm: str, layers: list[Layer], names: tuple[str, ...]
) -> None:
    recipe = recipe_of(layers, names)
    archive.add_arm(arm, recipe)
    add(archive, recipe, "search", outcome(rng, skill_of(recipe, names, loss=1.3)))


def add_holdout(archive: Archive, rng: random.Random, names: tuple[str, ...]) -> None:
    from gptailor.report import load_report

    report = load_report(archive)
    for point in {p.id: p for p in (*report.front, *report.controls)}.values():
        skill = skill_of(point.recipe, names, loss=0.9)
        add(archive, point.recipe, "holdout", outcome(rng, skill, HOLDOUT))


Sets = tuple[list[float], list[float] | None]
"""The value of each document, of the search and of the holdout."""


def make_small(
    folder: Path,
    models: dict[str, tuple[Recipe, Sets]],
    *,
    chance: float | None = 0.0,
    tasks: tuple[str, str] = ("seen", "fresh"),
    keep: bool = True,
) -> Path:
    """A run of a few models; those with a kind in their name, like "dense:math", are arms."""
    with Archive(folder) as archive:
        for name, (recipe, sets) in models.items():
            if ":" in name:
                archive.add_arm(name, recipe)
            for documents, task, values in zip(("search", "holdout"), tasks, sets, strict=True):
                if values is not None:
                    score = score_of(task, "acc,none", values, 1.0, chance, keep=keep)
                    add(
                        archive, recipe, documents, Outcome("ok", score.value, (score,), "", Cost())
                    )
    return folder


def make_with_text(folder: Path, perplexities: dict[str, float]) -> Path:
    """A run whose holdout also has a text with weight 0: arm, or "search", → its perplexity.

    Each model is right about fewer documents than the one before.
    """
    metric = "word_perplexity,none"
    with Archive(folder) as archive:
        for number, (name, perplexity) in enumerate(perplexities.items()):
            recipe = dense(name.partition(":")[2]) if name.startswith("dense:") else CUT
            if ":" in name:
                archive.add_arm(name, recipe)
            task = score_of("fresh", "acc,none", right(300 - 20 * number, 400))
            text = Score("language", metric, perplexity, None, 7, 0.0)
            for documents, scores in (("search", (task,)), ("holdout", (text, task))):
                add(archive, recipe, documents, Outcome("ok", task.value, scores, "", Cost()))
    return folder


def right(count: int, of: int, begin: int = 0) -> list[float]:
    """Values of `of` documents: from `begin` on, `count` are right."""
    return [float((i - begin) % of < count) for i in range(of)]


NINE = recipe_of([Take(("math", "code")[i % 2], i) for i in range(9)])
CUT = recipe_of([Take("math", i + 3) for i in range(9)])


def near_chance(level: int, less: int) -> dict[str, tuple[Recipe, Sets]]:
    """Each set has another best dense candidate, and neither is clearly above chance."""
    return {
        "dense:math": (dense("math"), (right(level, 400), right(level - less, 400, 50))),
        "dense:code": (dense("code"), (right(level - less, 400, 9), right(level, 400))),
        "angular:0.75@math": (CUT, (right(level - 2 * less, 400), right(level - less, 400))),
        "search": (NINE, (right(level + 60, 400), right(level + 55, 400))),
    }
