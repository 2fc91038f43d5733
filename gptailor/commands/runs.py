"""The command lines of the verbs for a search."""

from __future__ import annotations

import argparse
import json
import os

from gptailor import exit_codes
from gptailor.commands.command import Command, add_io, add_stage, add_workers, say
from gptailor.run.layout import FRONT_JSON, PAGE


def _demo(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    out = verbs.demo(arguments.out, workers=arguments.workers)
    _show_front(out, arguments.json)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    problems = verbs.check(
        arguments.config,
        arguments.overrides,
        resume=arguments.resume,
        fast=arguments.fast,
        note=say,
    )
    if arguments.json:
        print(json.dumps({"problems": problems}))
    else:
        for problem in problems:
            print(problem)
        if not problems:
            print("No problems found.")
    return exit_codes.USAGE if problems else exit_codes.DONE


def _search(arguments: argparse.Namespace) -> int:
    from gptailor import verbs
    from gptailor.run.island_folder import parse_island

    out = verbs.search(
        arguments.config,
        overrides=arguments.overrides,
        resume=arguments.resume,
        workers=arguments.workers,
        executor=arguments.executor,
        log_json=arguments.log_json,
        island=arguments.island and parse_island(arguments.island),
        io=arguments.io,
        stage=arguments.stage or None,
    )
    _show_front(out, arguments.json)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    page = verbs.report(arguments.run_folder, arguments.out, note=say)
    if arguments.json:
        print((page.parent.parent / FRONT_JSON).read_text())
    else:
        print(f"The report is {page}.")
    return 0


def _show_front(run: str | os.PathLike[str], as_json: bool) -> None:
    from pathlib import Path

    from gptailor.report.front_model import load_report
    from gptailor.report.terminal import front_table

    if as_json:
        print((Path(run) / FRONT_JSON).read_text())
        return
    print(front_table(load_report(Path(run))))
    print(f"The report is {Path(run) / PAGE}.")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="gptailor-demo", help="run folder (gptailor-demo)")
    add_workers(parser)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a search.yaml")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    parser.add_argument(
        "--resume", action="store_true", help="check for search --resume: the output may hold a run"
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="skip what takes longest: building the model without its weights, loading the "
        "tasks' data, and the requests of a few documents",
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a search.yaml")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    parser.add_argument("--resume", action="store_true", help="continue the run in its folder")
    parser.add_argument(
        "--island", metavar="I/K", help="be number I (from 0) of K searches that share the folder"
    )
    add_workers(parser)
    parser.add_argument(
        "--executor",
        choices=("auto", "local", "mpi"),
        default="auto",
        help="where recipes are evaluated: on this machine, or by the other ranks of an MPI "
        "program; auto detects whether srun or mpirun started several (auto)",
    )
    parser.add_argument(
        "--log-json", action="store_true", help="the ranks' logs as JSON lines, too (MPI)"
    )
    add_io(parser)
    add_stage(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder")
    parser.add_argument("--out", help="another folder for the report")


KEEPS = "everything that was evaluated is kept"

COMMANDS = {
    "demo": Command(
        "run the whole workflow on a small family that ships with the package",
        "gptailor demo --out gptailor-demo",
        _add_demo,
        _demo,
        KEEPS,
    ),
    "check": Command(
        "find what would make a search fail, from configs, headers and a few documents",
        "gptailor check search.yaml",
        _add_check,
        _check,
    ),
    "search": Command(
        "search for the recipes that lose least at every size",
        "gptailor search search.yaml search.evaluations=200 --resume",
        _add_search,
        _search,
        KEEPS,
    ),
    "report": Command(
        "write the report of a run",
        "gptailor report runs/smollm2",
        _add_report,
        _report,
    ),
}
