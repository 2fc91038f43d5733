"""The description of a verb, and arguments that several verbs share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A verb of the command line.

    Attributes:
        what: what it does, in a few words.
        example: shown by `-h`.
        add_arguments: adds its arguments to the verb's parser.
        run: prints the result and returns the exit code.
        keeps: what an interruption leaves behind.
    """

    what: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    keeps: str = "nothing was left half-written"


def say(text: str) -> None:
    """Prints to stderr, apart from the result."""
    print(text, file=sys.stderr)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """--workers."""
    parser.add_argument(
        "--workers", type=at_least_one, default=1, help="processes on this machine (1)"
    )


def add_io(parser: argparse.ArgumentParser) -> None:
    """--io."""
    parser.add_argument(
        "--io",
        choices=("auto", "mmap", "pread", "direct"),
        help="how weights are read: mapped, with large reads, or past the page cache; auto takes "
        "pread on network file systems, else mmap (GPTAILOR_IO, or auto)",
    )


def at_least_one(text: str) -> int:
    """A positive integer, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def add_stage(parser: argparse.ArgumentParser) -> None:
    """--stage."""
    parser.add_argument(
        "--stage",
        metavar="DIR",
        help="a folder on the node's own disk, to which the candidates are copied once before its "
        "workers open them; variables are expanded on the node (GPTAILOR_STAGE)",
    )
