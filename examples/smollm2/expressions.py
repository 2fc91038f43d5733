"""Questions about Python: the type of an expression's value, or the exception that it raises.

Every label comes from running the expression. The wrong choices favour types that appear in the
expression, which a reader who does not follow the call would choose.
"""

from __future__ import annotations

from random import Random
from typing import Any

from question import Question, with_choices, words

NAMES = words(
    "items names words data rows cells parts lines keys nodes users books pages notes tags"
)
TEXTS = words(
    "ada red sun map tea fox oak sky jam ink owl bee key pen cup hat box ice log ant ship moon "
    "rain leaf bird fish stone"
)

LABELS = words(
    "int str list bool dict float set tuple bytes "
    "ValueError TypeError IndexError KeyError AttributeError"
)
"""Each is a single token after a space."""

VALUES = {  # the variable's value; {a}, {b} are words, {i}, {j} small numbers
    "list": '["{a}", "{b}"]',
    "tuple": '("{a}", "{b}")',
    "set": '{{"{a}", "{b}"}}',
    "dict": '{{"{a}": {i}, "{b}": {j}}}',
    "str": '"{a} {b}"',
    "int": "{i}{j}",
    "float": "{i}.{j}",
    "bytes": 'b"{a}"',
}

CALLS = {  # {v} is the variable, {n} a number that is not a valid index of it
    "list": [
        "len({v})", "{v}[0]", "{v}[{n}]", "{v}[:1]", "{v} + {v}", "{v} * {i}", "{v} + {i}",
        "sorted({v})", "tuple({v})", "set({v})", "str({v})", "bool({v})", "'{c}' in {v}",
        "{v}.index('{c}')", "{v}.index('{a}')", "{v}.count('{a}')", "{v}.split()", "{v}['{a}']",
        "{v}.upper()", "{v}.copy()", "'-'.join({v})", "{v}.pop()", "{v}.pop({n})",
        "{v} == {v}[::-1]", "{v}.remove('{c}')", "dict(enumerate({v}))", "{v}.keys()", "int({v})",
    ],
    "tuple": [
        "len({v})", "{v}[0]", "{v}[{n}]", "{v}[1:]", "{v} + {v}", "{v}.append('{c}')", "list({v})",
        "{v}.index('{c}')", "'{a}' in {v}", "{v} + {i}", "{v}.sort()", "sorted({v})", "{v}['{a}']",
        "{v}.count('{b}')", "max({v})", "'{c}'.join({v})", "float({v})",
    ],
    "set": [
        "len({v})", "{v}[0]", "{v} | {v}", "sorted({v})", "{v}.remove('{c}')", "'{a}' in {v}",
        "{v}.pop()", "{v} + {v}", "list({v})", "tuple({v})", "{v}.append('{c}')", "min({v})",
        "{v} - {v}", "str({v})", "{v} <= {v}",
    ],
    "dict": [
        "len({v})", "{v}['{a}']", "{v}['{c}']", "list({v})", "{v}.get('{a}')", "{v}[{i}]",
        "sorted({v})", "'{c}' in {v}", "{v}.pop('{c}')", "{v}.pop('{b}')", "{v}.copy()",
        "{v}.append({i})", "{v} + {v}", "max({v})", "sum({v}.values())", "{v}['{a}'] / 2",
        "tuple({v})", "{v}.index('{a}')", "{v} | {v}", "str({v})", "set({v})", "{v}.split()",
    ],
    "str": [
        "len({v})", "{v}[0]", "{v}[{n}0]", "{v}.upper()", "{v}.split()", "{v}.encode()",
        "{v} + {i}", "{v} * {i}", "int({v})", "float({v})", "{v}.find('{c}')", "{v}.index('Z')",
        "{v}.isdigit()", "list({v})", "set({v})", "{v}.append('{c}')", "{v}['{a}']",
        "{v}.startswith('{a}')", "{v}.count('{a}')", "{v}.partition(' ')", "tuple({v})",
        "{v} / 2", "{v}.pop()", "{v}.replace('{a}', '{c}')", "{v}.keys()", "hash({v})",
    ],
    "int": [
        "{v} / {i}", "{v} // {i}", "str({v})", "float({v})", "{v}[0]", "len({v})", "{v} > {i}",
        "{v} + '{a}'", "{v} * '{a}'", "{v}.upper()", "divmod({v}, {i})", "list({v})", "{v} * 0.5",
        "range({v})[{i}]", "bytes({v})", "{v}.append({i})", "{v} % {i}", "abs(-{v})", "bool({v})",
        "[{v}] * {i}", "{v} == '{a}'", "'{a}'[{v}]",
    ],
    "float": [
        "int({v})", "round({v})", "{v} // 1", "str({v})", "{v} * {i}", "{v} > {i}", "len({v})",
        "{v}[0]", "{v} + '{a}'", "divmod({v}, {i})", "round({v}, 1)", "'{a}' * {v}", "abs({v})",
        "{v}.split()", "[{v}] * {i}", "{v}.is_integer()",
    ],
    "bytes": [
        "len({v})", "{v}[0]", "{v}[:2]", "{v}.decode()", "{v} + b'{c}'", "{v} + '{c}'", "list({v})",
        "{v}[{n}0]", "{v}.upper()", "{v}.split()", "{v}.encode()", "{v}.hex()", "tuple({v})",
        "b'{c}' in {v}", "'{c}' in {v}", "{v}.append({i})", "{v} * {i}", "int({v})",
    ],
}  # fmt: skip

_PAIRS = [(kind, call) for kind, calls in CALLS.items() for call in calls]


def outcome(assignment: str, expression: str) -> str:
    """Run both and return the name of the result's type, or of the exception raised."""
    scope: dict[str, Any] = {}
    exec(assignment, scope)
    try:
        return type(eval(expression, scope)).__name__
    except Exception as error:
        return type(error).__name__


def make(rng: Random) -> Question:
    """Draw a variable and an expression; redraw those whose outcome is not in `LABELS`."""
    while True:
        kind, call = rng.choice(_PAIRS)
        a, b, c = rng.sample(TEXTS, 3)
        values = {"a": a, "b": b, "c": c, "i": rng.randint(2, 9), "j": rng.randint(1, 9)}
        values |= {"v": rng.choice(NAMES), "n": rng.randint(3, 9)}
        assignment = f"{values['v']} = {VALUES[kind].format(**values)}"
        expression = call.format(**values)
        right = outcome(assignment, expression)
        if right in LABELS:
            break
    near = [label for label in (kind, *_near(right)) if label != right]
    others = [label for label in LABELS if label != right and label not in near]
    wrong = list(dict.fromkeys(near))[:2]
    wrong += rng.sample(others, 3 - len(wrong))
    text = f">>> {assignment}\n>>> {expression}  # gives"
    return with_choices(rng, text, right, wrong)


def _near(right: str) -> tuple[str, ...]:
    errors = ("TypeError", "ValueError", "IndexError", "KeyError", "AttributeError")
    return errors if right.endswith("Error") else ()
