"""The folders of a run's islands: `RUN/islands/I`, numbered from 0."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from gptailor.errors import UsageError
from gptailor.run.layout import ISLANDS


def island_folder(run: Path, island: int) -> Path:
    """The folder with an island's archive and journal."""
    return run / ISLANDS / str(island)


def island_numbers(root: Path) -> list[int]:
    """The islands that have a folder in `RUN/islands`, ascending; none if it does not exist."""
    names: list[str] = []
    with suppress(OSError):
        names = [path.name for path in root.iterdir()]
    found = [int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 7]
    return sorted(number for number in found if str(number) in names)


def parse_island(text: str) -> tuple[int, int]:
    """Parses `I/K` into two numbers.

    Raises:
        UsageError: it is something else.
    """
    first, slash, second = text.partition("/")
    if slash and first.isdecimal() and second.isdecimal() and len(text) < 14:
        island, count = int(first), int(second)
        if island < count:
            return island, count
    raise UsageError(
        f"--island {text!r} is not of the form I/K, where I is the island's number from 0 to K - 1."
    )
