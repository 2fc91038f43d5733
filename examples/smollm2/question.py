"""A multiple-choice question, and its file format.

A question's choices are words of one token each in SmolLM2's vocabulary, so lm-eval scores all
choices of a question with one forward pass over its context.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random


@dataclass(frozen=True)
class Question:
    """A context, the words that may follow it, and the index of the one that does.

    The context does not end with a space, and the choices do not start with one; the task's
    `target_delimiter` puts one between them.
    """

    question: str
    choices: tuple[str, ...]
    answer: int


def words(text: str) -> list[str]:
    """Split a text at its spaces."""
    return text.split()


Maker = Callable[[Random], Question]
"""Draws one question of a skill; all randomness comes from the generator."""


def with_choices(rng: Random, question: str, right: str, wrong: list[str]) -> Question:
    """Put the right word among the wrong ones, at a random position."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return Question(question, tuple(choices), choices.index(right))


def distinct(maker: Maker, rng: Random, taken: set[str]) -> Iterator[Question]:
    """Draw questions whose context is not in `taken` and was not drawn before.

    Side effect: adds every drawn context to `taken`.
    """
    while True:
        question = maker(rng)
        if question.question not in taken:
            taken.add(question.question)
            yield question


def write_jsonl(path: Path, questions: Iterable[Question]) -> None:
    """Write one JSON object per line, with the keys `question`, `choices`, `answer`."""
    lines = [json.dumps(asdict(question), ensure_ascii=False) for question in questions]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_contexts(path: Path) -> set[str]:
    """Return the contexts in a file written by `write_jsonl`."""
    with path.open(encoding="utf-8") as file:
        return {json.loads(line)["question"] for line in file}
