"""Questions about the grammar of Orlan, a language made up for this example.

An Orlan noun ends in -ana, -elo or -uki, which is its class. The verb agrees with the class and
the number of its subject, the first noun. A second noun between them misleads, so neither the
nearest noun nor the number alone gives the verb away. Stems are made of random syllables, so nearly
every noun in a question was never seen in training.
"""

from __future__ import annotations

from random import Random

from question import Question, with_choices

VERBS = {  # (class, number) of the subject
    ("ana", "one"): "ka",
    ("ana", "several"): "mi",
    ("elo", "one"): "so",
    ("elo", "several"): "tu",
    ("uki", "one"): "ra",
    ("uki", "several"): "ve",
}
CLASSES = ("ana", "elo", "uki")
NUMBERS = {
    "one": ("one", "this", "a"),
    "several": ("two", "many", "these", "some"),
}
BETWEEN = ("near", "with", "behind", "beside", "without")


def _noun(rng: Random, noun_class: str) -> str:
    stem = rng.choice("bdfgklmnprstvz") + rng.choice("aeiou")
    return stem + rng.choice("bdgklmnprstv") + noun_class


def make(rng: Random) -> Question:
    """Draw a sentence; the wrong verbs have the wrong number, the wrong noun, or both."""
    subject, other = rng.choice(CLASSES), rng.choice(CLASSES)
    number, other_number = rng.choice(list(NUMBERS)), rng.choice(list(NUMBERS))
    text = " ".join(
        [
            "Orlan:",
            rng.choice(NUMBERS[number]),
            _noun(rng, subject),
            rng.choice(BETWEEN),
            rng.choice(NUMBERS[other_number]),
            _noun(rng, other),
        ]
    )
    right = VERBS[subject, number]
    flipped = "several" if number == "one" else "one"
    rival = other if other != subject else rng.choice([c for c in CLASSES if c != subject])
    wrong = [VERBS[subject, flipped], VERBS[rival, number], VERBS[rival, flipped]]
    return with_choices(rng, text, right, wrong)
