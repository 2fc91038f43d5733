"""The three tiny languages of the demo family: vocabulary, training lines, evaluation documents.

This module decides what a line of each skill looks like, which part of a skill the base model is
taught, and which documents are held out. It knows nothing about models or training. All randomness
comes from the `random.Random` that the caller passes in.

    translate shy fox sings = <three made-up words>     a dictionary of 48 words
    sort 7 2 19 4 = 2 4 7 19                            four numbers in ascending order
    clock 9 plus 17 = 2                                 hours on a twelve-hour dial

A line is either right or sloppy: in the right form, with an answer that is only partly right.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SKILLS = ("translate", "sort", "clock")

_ADJECTIVES = "red big old sad hot wet odd shy raw dim fat icy new tan wry fun"
_NOUNS = "fox cat owl hen ant bee pig cow dog bat elk yak eel emu ram rat"
_VERBS = "eats sees hits runs sits naps digs hops begs hums swims sings bites hides rests waits"
WORD_CLASSES = tuple(tuple(words.split()) for words in (_ADJECTIVES, _NOUNS, _VERBS))
NUMBERS = tuple(str(n) for n in range(24))
HOURS = tuple(range(1, 13))

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
NUM_SORTED = 4
SLOPPY_MAX_SHIFT = 3
NUM_CHOICES = {"translate": 5, "sort": 4, "clock": 5}


@dataclass(frozen=True)
class Line:
    """One line of training text: the tokens of `answer` are to be predicted from `prompt`."""

    prompt: tuple[str, ...]
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """One multiple-choice question; every choice is one token that continues `context`."""

    context: str
    choices: tuple[str, ...]
    gold: int

    @property
    def prompt(self) -> tuple[str, ...]:
        """The part of the context that a training line calls its prompt."""
        words = self.context.split()
        return tuple(words[: words.index("=") + 1])

    def as_json(self) -> dict[str, object]:
        """The document as a row of a task's JSON lines file."""
        return {"context": self.context, "choices": list(self.choices), "gold": self.gold}


def _made_up_words(rng: random.Random, count: int) -> list[str]:
    """`count` distinct pronounceable words of two syllables."""
    syllables = [c + v for c in "bdgklmnprtvz" for v in "aiou"]
    words: list[str] = []
    while len(words) < count:
        word = rng.choice(syllables) + rng.choice(syllables)
        if word not in words:
            words.append(word)
    return words


class Dictionary:
    """The made-up language: a bijection of 3 x 16 English words, fixed by its own seed."""

    def __init__(self, seed: int = 7) -> None:
        made_up = _made_up_words(random.Random(seed), sum(map(len, WORD_CLASSES)))
        self.of: dict[str, str] = {}
        self.group_of: dict[str, tuple[str, ...]] = {}  # translation -> all of its word class
        for group in WORD_CLASSES:
            words, made_up = tuple(made_up[: len(group)]), made_up[len(group) :]
            self.of.update(zip(group, words, strict=True))
            self.group_of.update(dict.fromkeys(words, words))


DICTIONARY = Dictionary()


def vocabulary() -> list[str]:
    """All tokens, in the order of their ids."""
    words = [*SPECIALS, *SKILLS, "=", "plus", "minus", *NUMBERS]
    return [*words, *DICTIONARY.of, *DICTIONARY.of.values()]


def _in_sloppy_lines(word: str) -> bool:
    """Whether sloppy lines translate this English word correctly (an eighth of the words)."""
    return any(word in group[: len(group) // 8] for group in WORD_CLASSES)


def _translate(rng: random.Random, *, is_sloppy: bool) -> Line:
    english = [rng.choice(group) for group in WORD_CLASSES]
    answer = []
    for word in english:
        right = DICTIONARY.of[word]
        if is_sloppy and not _in_sloppy_lines(word):
            right = rng.choice(DICTIONARY.group_of[right])
        answer.append(right)
    return Line(("translate", *english, "="), tuple(answer))


def _first(numbers: list[int]) -> int:
    return numbers[0]


def _sort(rng: random.Random, *, is_sloppy: bool) -> Line:
    numbers = rng.sample(range(len(NUMBERS)), NUM_SORTED)
    left, answer = list(numbers), []
    while left:
        pick = rng.choice((max, _first)) if is_sloppy else min
        answer.append(pick(left))
        left.remove(answer[-1])
    return Line(("sort", *map(str, numbers), "="), tuple(map(str, answer)))


def _clock(rng: random.Random, *, is_sloppy: bool) -> Line:
    hour, shift, sign = rng.choice(HOURS), rng.randrange(24), rng.choice(("plus", "minus"))
    result = (hour - 1 + (shift if sign == "plus" else -shift)) % 12 + 1
    if is_sloppy and shift > SLOPPY_MAX_SHIFT:
        result = rng.choice(HOURS)
    return Line(("clock", str(hour), sign, str(shift), "="), (str(result),))


_MAKERS = {"translate": _translate, "sort": _sort, "clock": _clock}


def line(
    skill: str, rng: random.Random, *, is_sloppy: bool, excluded: frozenset[tuple[str, ...]]
) -> Line:
    """One training line of `skill`, with a prompt that is not `excluded`.

    A sloppy line translates only an eighth of the dictionary correctly, sorts by repeatedly taking
    the largest or the first number, and shifts the clock correctly only by up to three hours.
    Everything else is a random answer in the right form.
    """
    while True:
        made = _MAKERS[skill](rng, is_sloppy=is_sloppy)
        if made.prompt not in excluded:
            return made


def _choices(
    rng: random.Random, right: str, others: Sequence[str], count: int
) -> tuple[tuple[str, ...], int]:
    wrong = rng.sample([word for word in others if word != right], count - 1)
    choices = [right, *wrong]
    rng.shuffle(choices)
    return tuple(choices), choices.index(right)


def document(skill: str, rng: random.Random) -> Document:
    """One question of `skill`; the right answer is unique."""
    text = _MAKERS[skill](rng, is_sloppy=False)
    if skill == "sort":
        asked = rng.randrange(NUM_SORTED - 2)  # the last two would be answered by elimination
        others: Sequence[str] = text.answer
    elif skill == "translate":
        asked = rng.randrange(len(text.answer))
        others = DICTIONARY.group_of[text.answer[asked]]
    else:
        asked = 0
        others = [str(hour) for hour in HOURS]
    choices, gold = _choices(rng, text.answer[asked], others, NUM_CHOICES[skill])
    return Document(" ".join([*text.prompt, *text.answer[:asked]]), choices, gold)


def documents(skill: str, rng: random.Random, count: int) -> list[Document]:
    """`count` questions of `skill`, no two with the same prompt."""
    found: dict[tuple[str, ...], Document] = {}
    while len(found) < count:
        doc = document(skill, rng)
        found.setdefault(doc.prompt, doc)
    return list(found.values())
