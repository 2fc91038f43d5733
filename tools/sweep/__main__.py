"""Tries gptailor on every causal-LM architecture of transformers, with tiny random models.

    python -m tools.sweep                     # all of them, a table
    python -m tools.sweep gpt2 lfm2_moe       # some model types, with their variants
    python -m tools.sweep --full --json results.json

Each family runs in its own process, with limits on time and memory, because some die by a signal.
A verdict is: right; refused (a sentence says why); refused by search (only a folder can be
written); bug (an exception that is not one of gptailor's); WRONG (a silent error); no model
(transformers can't make a tiny one, or can't run it). The exit code is 1 if anything is WRONG or a
bug. All families take about 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tools.sweep.cases import all_cases
from tools.sweep.check import Row
from tools.sweep.isolate import TIME_S, preload, sweep_isolated
from tools.sweep.recipes import QUICK
from tools.sweep.tiny import import_model


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("types", nargs="*", help="model types or cases (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--recipe", action="append", default=[], help="only this recipe")
    parser.add_argument("--full", action="store_true", help="all recipes, not only the quick ones")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument("-v", "--verbose", action="store_true", help="rows that are right, too")
    parser.add_argument("--time", type=float, default=TIME_S, metavar="S", help="for each family")
    args = parser.parse_args(argv)
    cases = [c for c in all_cases() if not args.types or {c.name, c.model_type} & set(args.types)]
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    preload()
    rows: list[Row] = []
    began = time.monotonic()
    for case in cases:
        at = time.monotonic()
        import_model(case.model_type)
        recipes = args.recipe or ([] if args.full else case.recipes or QUICK)
        found = sweep_isolated(case, recipes, args.time)
        rows += found
        print_case(case.name, found, time.monotonic() - at, args.verbose)
        if args.json:
            args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(f"\n{len(cases)} families, {time.monotonic() - began:.0f} s; recipes:",
          dict(Counter(row.verdict for row in rows)))  # fmt: skip
    return int(any(row.verdict in ("WRONG", "bug") for row in rows))


def print_case(name: str, rows: Sequence[Row], seconds: float, verbose: bool) -> None:
    """Prints a family's verdicts, and the rows that are not right, grouped by similarity."""
    counts = Counter(row.verdict for row in rows)
    text = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    print(f"{name:28} {seconds:5.1f} s  {text}", flush=True)
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.verdict != "right" or row.notes or verbose:
            kinds = [part.split(": ")[0] for part in row.detail.split("; ")]
            key = kinds if row.verdict == "WRONG" else [re.sub(r"[\d.]+", "0", row.detail)]
            notes = [re.sub(r"[\d.\[\]e, -]+", "0", note) for note in row.notes[:1]]
            groups.setdefault((row.verdict, *key, *notes), []).append(row)
    for (verdict, *_), some in groups.items():
        recipes = ", ".join(row.recipe for row in some)
        print(f"    {verdict}: {recipes}: {some[0].detail[:400]}", flush=True)
        for note in some[0].notes[:3]:
            print(f"        note: {note[:200]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
