"""Questions about old measures: "How many feet are in three fathoms?" - eighteen.

The table is real (British measures before the decimal system). Most of its units are rare in
today's texts, so a small model has to be taught them.
"""

from __future__ import annotations

from random import Random

from question import Question, with_choices, words

UNITS = [  # (singular, plural, how many of the smaller unit, the smaller unit)
    ("hand", "hands", 4, "inches"),
    ("span", "spans", 9, "inches"),
    ("cubit", "cubits", 18, "inches"),
    ("fathom", "fathoms", 6, "feet"),
    ("yard", "yards", 3, "feet"),
    ("chain", "chains", 4, "rods"),
    ("furlong", "furlongs", 10, "chains"),
    ("league", "leagues", 3, "miles"),
    ("pint", "pints", 4, "gills"),
    ("quart", "quarts", 2, "pints"),
    ("gallon", "gallons", 8, "pints"),
    ("peck", "pecks", 2, "gallons"),
    ("bushel", "bushels", 4, "pecks"),
    ("firkin", "firkins", 9, "gallons"),
    ("barrel", "barrels", 4, "firkins"),
    ("ounce", "ounces", 16, "drams"),
    ("stone", "stone", 14, "pounds"),
    ("ream", "reams", 20, "quires"),
    ("score", "score", 20, "eggs"),
    ("dozen", "dozen", 12, "eggs"),
    ("florin", "florins", 2, "shillings"),
    ("crown", "crowns", 5, "shillings"),
    ("shilling", "shillings", 12, "pence"),
    ("groat", "groats", 4, "pence"),
    ("fortnight", "fortnights", 14, "days"),
    ("week", "weeks", 7, "days"),
    ("lustrum", "lustrums", 5, "years"),
    ("decade", "decades", 10, "years"),
]

_UP_TO_TWENTY = words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
_TENS = words("thirty forty fifty sixty seventy eighty ninety")
WORDS = dict(enumerate(_UP_TO_TWENTY, start=1))
WORDS |= {10 * i: word for i, word in enumerate(_TENS, start=3)}
"""The numbers whose word is a single token."""

MOST = 6
"""The largest number of the larger unit in a question."""

PEOPLE = words(
    "Ada Ben Clara David Edith Frank Grace Henry Iris Jack Kate Leo Mary Ned Olive Paul Rose Sam "
    "Tess Victor Will Anna Carl Dora Emma George Helen Ivan Jane Karl Laura Martin"
)

FORMS = [
    "{who} asks how many {small} are in {n} {big}. The answer is",
    "{who} turns {n} {big} into {small} and writes",
    "{who} counts {n} {big}. In {small} that makes",
    "Said {who}: to get {n} {big}, take this many {small}:",
]

_RATIOS = sorted({ratio for _, _, ratio, _ in UNITS})
_CELLS = [(unit, n) for unit in UNITS for n in range(1, MOST + 1) if unit[2] * n in WORDS]


def make(rng: Random) -> Question:
    """Draw a question; the wrong numbers are those that other units of the table would give."""
    (one, several, ratio, small), n = rng.choice(_CELLS)
    wrong = [WORDS[n * r] for r in _RATIOS if r != ratio and n * r in WORDS]
    text = rng.choice(FORMS).format(
        who=rng.choice(PEOPLE), n=WORDS[n], big=one if n == 1 else several, small=small
    )
    return with_choices(rng, text, WORDS[n * ratio], rng.sample(wrong, 3))
