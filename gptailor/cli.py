"""The command line: parses arguments, calls verbs, prints errors, returns exit codes.

0 done · 1 our bug · 2 usage or config · 3 a model or tokenizer is unusable · 4 out of memory or
disk · 5 stopped early, can be resumed · 130/143 interrupted (everything evaluated is kept).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from gptailor import exit_codes
from gptailor.commands import COMMANDS
from gptailor.errors import GptailorError, Terminated, exit_code_of, is_disk_full, unknown
from gptailor.execution.mpi.launcher import is_first, leave_quietly
from gptailor.execution.slurm.exit_code_file import write_exit_code


class _Parser(argparse.ArgumentParser):
    """Reports errors in gptailor's own form."""

    def error(self, message: str) -> NoReturn:
        if not is_first():
            leave_quietly(exit_codes.USAGE)
        sys.stderr.write(f"gptailor: {message}. See `{self.prog} -h`.\n")
        sys.exit(exit_codes.USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    code = exit_codes.BUG
    try:
        code = _run(argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else exit_codes.BUG
        raise
    finally:
        write_exit_code(code)
        if (channel := sys.modules.get("gptailor.execution.mpi.channel")) is not None:
            channel.leave(code)  # ends the other ranks of an MPI program that don't end themselves
    return code


def _run(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _build_parser()
    _check_verb(words)
    arguments = _parsed(parser, words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' progress bars; ours says more
    signal.signal(signal.SIGTERM, _terminated)
    try:
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except KeyboardInterrupt as error:
        keeps = COMMANDS[arguments.verb].keeps
        return _said(f"interrupted; {keeps}", exit_code_of(error))
    except Terminated as error:
        keeps = COMMANDS[arguments.verb].keeps
        return _said(f"terminated; {keeps}", exit_code_of(error))
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        return 0
    except Exception as error:
        if arguments.debug:
            raise
        return _explain(error)


def _parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parses arguments; key.path=value may also follow options, which argparse alone rejects."""
    arguments, rest = parser.parse_known_args(words)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    wrong = [word for word in rest if word not in overrides]
    if wrong or (overrides and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or overrides)}")
    if overrides:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


def _terminated(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _explain(error: Exception) -> int:
    code = exit_code_of(error)
    if isinstance(error, GptailorError):
        return _said(str(error), code)
    if isinstance(error, MemoryError):
        return _said("out of memory: use a smaller batch_size, or fewer workers", code)
    if isinstance(error, OSError) and is_disk_full(error):
        return _said(f"the disk is full ({error.filename or 'unknown file'}): free space", code)
    text = f"a bug in gptailor: {type(error).__name__}: {error}. --debug shows the traceback"
    return _said(text, code)


def _said(text: str, code: int) -> int:
    sys.stderr.write(f"gptailor: {' '.join(text.split()).rstrip('.')}.\n")
    return code


def _check_verb(words: Sequence[str]) -> None:
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is not None and verb not in COMMANDS:
        if not is_first():
            leave_quietly(exit_codes.USAGE)
        sys.exit(_said(str(unknown("verb", verb, COMMANDS)), exit_codes.USAGE))


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gptailor",
        description="Make a language model smaller by cutting, stitching and merging the layers "
        "of its finetunes, without training.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.set_defaults(run=_no_verb, debug=False, version=False)
    verbs = parser.add_subparsers(dest="verb", title="verbs", metavar="VERB", parser_class=_Parser)
    for name, command in COMMANDS.items():
        verb = verbs.add_parser(
            name,
            help=command.what,
            description=f"{command.what[:1].upper()}{command.what[1:]}.",
            epilog=f"example: {command.example}",
        )
        command.add_arguments(verb)
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
        verb.add_argument("--debug", action="store_true", help="show tracebacks")
        verb.set_defaults(run=command.run)
    return parser


def _no_verb(arguments: argparse.Namespace) -> int:
    if arguments.version:
        from importlib.metadata import version

        print(version("gptailor"))
        return 0
    _build_parser().print_help()
    return exit_codes.USAGE


if __name__ == "__main__":
    sys.exit(main())
