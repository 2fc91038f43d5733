"""Writes the questions of the tasks, and draws those that the adapters are trained on.

    python data.py            # rewrites tasks/*.jsonl, the same bytes every time

Each skill has three sets: `search` (used by the search), `holdout` (never seen by it) and `train`.
No context is in two of them. Questions are drawn independently, so the first N of a file are a fair
sample of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import expressions
import grammar
import units
from question import Maker, Question, distinct, read_contexts, write_jsonl

SKILLS: dict[str, Maker] = {
    "units": units.make,
    "grammar": grammar.make,
    "python": expressions.make,
}
NUM_QUESTIONS = 400
"""The number of questions in each `search` and each `holdout` set."""

TASKS = Path(__file__).resolve().parent / "tasks"


def evaluation_path(skill: str, split: str) -> Path:
    """Return the path of a skill's `search` or `holdout` set."""
    return TASKS / f"{skill}_{split}.jsonl"


def training_questions(skill: str, seed: int = 0) -> Iterator[Question]:
    """Draw training questions endlessly; none of them has an evaluation question's context."""
    reserved = set[str]()
    for split in ("search", "holdout"):
        reserved |= read_contexts(evaluation_path(skill, split))
    rng = Random(f"train {skill} {seed}")
    while True:
        question = SKILLS[skill](rng)
        if question.question not in reserved:
            yield question


def main() -> None:
    """Write the evaluation sets of every skill."""
    TASKS.mkdir(exist_ok=True)
    for skill, maker in SKILLS.items():
        taken = set[str]()
        for split in ("search", "holdout"):
            drawn = distinct(maker, Random(f"{split} {skill}"), taken)
            path = evaluation_path(skill, split)
            write_jsonl(path, islice(drawn, NUM_QUESTIONS))
            print(f"{path.name}: {NUM_QUESTIONS} questions")


if __name__ == "__main__":
    main()
