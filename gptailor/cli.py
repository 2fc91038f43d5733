"""The command line: words in, verbs called, errors in one sentence, exit codes.

0 done · 1 our bug · 2 usage or config · 3 a model or tokenizer is unusable · 4 out of memory or
disk · 5 stopped early, can be resumed · 130/143 interrupted (everything evaluated is kept).
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from gptailor.errors import GptailorError, unknown


class _Parser(argparse.ArgumentParser):
    """Errors in our form, with the nearest right word."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"gptailor: {message}. `{self.prog} -h` shows how.\n")
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _build_parser()
    _check_verb(words)
    arguments = _parsed(parser, words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars; our progress says more
    signal.signal(signal.SIGTERM, _terminated)
    if getattr(arguments, "io", None):
        os.environ["GPTAILOR_IO"] = arguments.io  # for worker processes, too
    try:
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except KeyboardInterrupt:
        return _said(f"interrupted; {_kept(arguments)}", 130)
    except _Terminated:
        return _said(f"terminated; {_kept(arguments)}", 143)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        return 0
    except Exception as error:
        if arguments.debug:
            raise
        return _explain(error)


def _kept(arguments: argparse.Namespace) -> str:
    """What an interruption leaves behind."""
    searches = arguments.verb in ("demo", "search")
    return "everything that was evaluated is kept" if searches else "nothing was left half-written"


def _parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parses, with key.path=value allowed after options, too (argparse alone stops at them)."""
    arguments, rest = parser.parse_known_args(words)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    wrong = [word for word in rest if word not in overrides]
    if wrong or (overrides and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or overrides)}")
    if overrides:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _terminated(signum: int, frame: FrameType | None) -> None:
    raise _Terminated


def _explain(error: Exception) -> int:
    if isinstance(error, GptailorError):
        return _said(str(error), error.exit_code)
    if isinstance(error, MemoryError):
        return _said("out of memory: use a smaller batch_size, or fewer workers", 4)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _said(f"the disk is full ({error.filename or 'unknown file'}): free space", 4)
    return _said(f"a bug of ours: {type(error).__name__}: {error}. --debug shows the traceback", 1)


def _said(text: str, code: int) -> int:
    sys.stderr.write(f"gptailor: {' '.join(text.split()).rstrip('.')}.\n")
    return code


def _check_verb(words: Sequence[str]) -> None:
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is not None and verb not in _VERBS:
        sys.exit(_said(str(unknown("verb", verb, _VERBS)), 2))


def _demo(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    out = verbs.demo(arguments.out, workers=arguments.workers)
    _show_front(out, arguments.json)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    problems = verbs.check(arguments.config, arguments.overrides)
    if arguments.json:
        print(json.dumps({"problems": problems}))
    else:
        for problem in problems:
            print(problem)
        if not problems:
            print("Nothing found that would make a search fail.")
    return 2 if problems else 0


def _search(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    out = verbs.search(
        arguments.config,
        overrides=arguments.overrides,
        resume=arguments.resume,
        workers=arguments.workers,
    )
    _show_front(out, arguments.json)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    page = verbs.report(arguments.run_folder, arguments.out)
    if arguments.json:
        print((page.parent.parent / "front.json").read_text())
    else:
        print(f"The report is {page}.")
    return 0


def _stitch(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    out = verbs.stitch(
        arguments.source,
        arguments.out,
        point=arguments.point,
        verify=arguments.verify,
        sync=arguments.sync,
        threads=arguments.threads,
        max_shard_size=arguments.max_shard_size,
    )
    print(json.dumps({"folder": str(out)}) if arguments.json else f"The model is in {out}.")
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    files = verbs.calibrate(
        arguments.source,
        arguments.text,
        arguments.out,
        methods=arguments.method,
        num_tokens=arguments.tokens,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    if arguments.json:
        print(json.dumps({"files": [str(path) for path in files]}))
        return 0
    for path in files:
        print(path)
    print(f"A recipe that uses them has the line `calibration: {files[0].parent}`.")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    scores = verbs.evaluate(
        arguments.model,
        arguments.tasks.split(","),
        include_path=arguments.include_path,
        num_fewshot=arguments.num_fewshot,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    if arguments.json:
        print(json.dumps([dataclasses.asdict(score) for score in scores], indent=2))
        return 0
    for score in scores:
        stderr = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        print(f"{score.task:24} {score.metric:24} {score.value:.4f}{stderr}")
    return 0


def _show_front(run: str | os.PathLike[str], as_json: bool) -> None:
    from pathlib import Path

    from gptailor.report.front import load_report
    from gptailor.report.terminal import front_table

    if as_json:
        print((Path(run) / "front.json").read_text())
        return
    print(front_table(load_report(Path(run))))
    print(f"The report is {Path(run) / 'report' / 'index.html'}.")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="gptailor-demo", help="run folder (gptailor-demo)")
    _add_workers(parser)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a search.yaml")
    parser.add_argument("overrides", nargs="*", help="key.path=value")


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a search.yaml")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    parser.add_argument("--resume", action="store_true", help="go on with the run in its folder")
    _add_workers(parser)
    _add_io(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder")
    parser.add_argument("--out", help="another folder for the report")


def _add_stitch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="a recipe.yaml, a mergekit YAML, or a run folder with --point"
    )
    parser.add_argument("out", help="the model folder to make")
    parser.add_argument("--point", help="id of a point of the run, or its beginning")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="leave out the smoke test"
    )
    parser.add_argument(
        "--no-sync", dest="sync", action="store_false", help="do not wait for the disk"
    )
    parser.add_argument("--threads", type=int, default=0, help="for merging (0 = all cores)")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="50GB",
        help="of a file of weights, like 5GB or 500MiB (50GB). On a disk that can share blocks "
        "with the inputs (XFS, Btrfs) copied layers take no room, but may make a few files more",
    )
    _add_io(parser)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a recipe.yaml or a search.yaml")
    parser.add_argument(
        "--text", required=True, help="a document a line, or a .jsonl of objects with a text"
    )
    parser.add_argument("--out", help="folder for the result (what the file names as calibration)")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        help="fisher or regmean, may be given twice (those that the file uses)",
    )
    parser.add_argument(
        "--tokens", type=_at_least_one, default=100_000, help="how many are read (100000)"
    )
    parser.add_argument(
        "--seq-len", type=_at_least_one, default=512, help="tokens in a sequence, at most (512)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the words drawn for fisher (0)")
    parser.add_argument("--dtype", default="float32", help="of the models while they read")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, a hub id, a recipe.yaml or a mergekit YAML")
    parser.add_argument("--tasks", required=True, help="lm-eval's names, with commas")
    parser.add_argument("--include-path", help="a folder with own tasks")
    parser.add_argument("--num-fewshot", type=int, help="examples in the context")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences in a batch (32)")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float16, float32 or auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto")
    _add_io(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=_at_least_one, default=1, help="processes on this machine (1)"
    )


def _add_io(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--io",
        choices=("auto", "mmap", "pread", "direct"),
        help="how weights are read: mapped, by large reads, or around the page cache; auto takes "
        "pread on network file systems, else mmap (auto, or what GPTAILOR_IO says)",
    )


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


_Add = Callable[[argparse.ArgumentParser], None]
_Run = Callable[[argparse.Namespace], int]
_VERBS: dict[str, tuple[str, str, _Add, _Run]] = {
    "demo": (
        "the main job, whole, on a small family that ships with the package",
        "gptailor demo --out gptailor-demo",
        _add_demo,
        _demo,
    ),
    "check": (
        "why a search would fail, from configs and headers, in seconds",
        "gptailor check search.yaml",
        _add_check,
        _check,
    ),
    "search": (
        "search for the recipes that lose least at every size",
        "gptailor search search.yaml search.evaluations=200 --resume",
        _add_search,
        _search,
    ),
    "report": ("write the report of a run", "gptailor report runs/smollm2", _add_report, _report),
    "stitch": (
        "write the model that a recipe describes",
        "gptailor stitch runs/smollm2 --point 1f3a09bc my-model",
        _add_stitch,
        _stitch,
    ),
    "calibrate": (
        "read a text with each model, for merges by fisher and regmean",
        "gptailor calibrate recipe.yaml --text sample.txt --method regmean --out calibration",
        _add_calibrate,
        _calibrate,
    ),
    "eval": (
        "score one model, the same way as a search does",
        "gptailor eval my-model --tasks piqa,arc_easy",
        _add_eval,
        _eval,
    ),
}


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gptailor",
        description="Make a language model smaller by cutting, stitching and merging the layers "
        "of its finetunes, without training.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.set_defaults(run=_no_verb, debug=False, version=False)
    verbs = parser.add_subparsers(dest="verb", title="verbs", metavar="VERB", parser_class=_Parser)
    for name, (what, example, add, run) in _VERBS.items():
        verb = verbs.add_parser(
            name,
            help=what,
            description=f"{what[:1].upper()}{what[1:]}.",
            epilog=f"example: {example}",
        )
        add(verb)
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
        verb.add_argument("--debug", action="store_true", help="show tracebacks")
        verb.set_defaults(run=run)
    return parser


def _no_verb(arguments: argparse.Namespace) -> int:
    if arguments.version:
        from importlib.metadata import version

        print(version("gptailor"))
        return 0
    _build_parser().print_help()
    return 2


if __name__ == "__main__":
    sys.exit(main())
