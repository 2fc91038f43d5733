"""What a verb of the command line is made of, and the arguments that several verbs have."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A verb.

    Attributes:
        what: it does, in a few words.
        example: shown by `-h`.
        add_arguments: to the verb's parser.
        run: prints the result and gives the exit code.
        keeps: what an interruption leaves behind.
    """

    what: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    keeps: str = "nothing was left half-written"


def say(text: str) -> None:
    """Tells the person who waits, beside the result."""
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
        help="how weights are read: mapped, by large reads, or around the page cache; auto takes "
        "pread on network file systems, else mmap (auto, or what GPTAILOR_IO says)",
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
        help="a folder of the node's own disk, to which the candidates are copied once before its "
        "workers open them; variables are filled in on the node (what GPTAILOR_STAGE says)",
    )
