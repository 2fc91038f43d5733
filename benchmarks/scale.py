"""Simulates searches on many workers: utilisation, front quality, and the load on rank 0.

    python benchmarks/scale.py                         # everything: a table and a figure
    python benchmarks/scale.py show FOLDER             # the table and the figure again
    python benchmarks/scale.py one --workers 1024 …    # one search, a line of JSON
    python benchmarks/scale.py one --workers 64 --hours 0.2 --profile

The scheduler, the search, the islands and the archive are the real ones; workers, their evaluation
times and the scores are made up (`virtual_cluster.py`, `landscape.py`). Each search runs in its own
process, so that its memory can be measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from simulated_run import RESTART_S, simulate
from virtual_cluster import MEAN_S, TIMES

MODES = ("generational", "asynchronous", "islands")

PLAN: tuple[tuple[int, float, tuple[str, ...]], ...] = (
    (64, 1.0, MODES),
    (256, 0.5, MODES),
    (1024, 0.5, ("generational",)),
    (1024, 1.0, ("asynchronous",)),
    (1024, 0.25, ("islands",)),
    (4096, 0.04, ("asynchronous",)),
)
"""Workers, hours and modes; one core can do this in half an hour."""

DEATHS = (64, 0.5, 0.25)
"""Workers, hours, and the hour at which a node is lost."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("all", "one", "show"), nargs="?", default="all")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("scale-results"))
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--islands", type=int, default=0)
    parser.add_argument("--population", type=int, default=0)
    parser.add_argument("--hours", type=float, default=1.0, help="duration if no worker ever waits")
    parser.add_argument("--times", choices=tuple(TIMES), default="quiet")
    parser.add_argument("--deaths", type=float, nargs="*", default=[], help="times, in hours")
    parser.add_argument("--loses", choices=tuple(RESTART_S), default="step")
    parser.add_argument("--sync-ms", type=float, default=1.0, help="duration of one disk sync")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", default="/dev/shm" if Path("/dev/shm").is_dir() else None)
    parser.add_argument("--profile", nargs="?", const="tottime", default="")
    args = parser.parse_args(argv)
    args.mode = args.mode or "asynchronous"
    args.islands = args.islands or (4 if args.mode == "islands" else 1)
    if not args.population:
        each = args.workers // args.islands
        args.population = 4 * each if args.mode == "generational" else each
    args.evaluations = round(args.hours * 3600 / MEAN_S * args.workers)
    return args


def run_all(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for workers, hours, modes in PLAN:
        for mode in modes:
            run_one(folder / f"{mode}-{workers}.json", mode, workers, hours)
    workers, hours, at = DEATHS
    for mode in MODES[1:]:
        run_one(folder / f"death-{mode}-{workers}.json", mode, workers, hours, "--deaths", f"{at}")


def run_one(path: Path, mode: str, workers: int, hours: float, *more: str) -> None:
    if path.is_file() and path.stat().st_size:
        return
    command = [sys.executable, __file__, "one", "--mode", mode, "--workers", str(workers)]
    command += ["--hours", str(hours), *more]
    print(" ".join(command[1:]), file=sys.stderr)
    path.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    found = {path.stem: path.read_text() for path in sorted(folder.glob("*.json"))}
    return {name: json.loads(text) for name, text in found.items() if text}


def show_table(found: dict[str, dict[str, Any]]) -> None:
    """Prints a row for each search; benchmarks/README.md explains the columns."""
    for r in sorted(found.values(), key=lambda r: (r["workers"], r["mode"], r["lost_s"])):
        name = r["mode"] + (f" × {r['islands']}" if r["islands"] > 1 else "")
        if r["lost_s"]:
            name += ", a node dies"
        idle_min = (1 - r["utilisation"]) * r["hours"] * 60
        curve = dict(map(tuple, r["quality"]))
        at = [at_hours(curve, minutes / 60) for minutes in (10, 15, 30, 60)]
        cells = [
            f"{r['workers']:,}",
            name,
            f"{r['population']:,}",
            f"{r['evaluations']:,}",
            f"{r['hours'] * 60:.1f}",
            f"{r['utilisation']:.1%}",
            f"{r['middle']:.1%}",
            f"{idle_min:.1f}",
            *at,
            f"{r['rank0']:.1%}",
            f"{r['rank0_ms']:.1f}",
            f"{r['memory_mb']:.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


def at_hours(curve: dict[float, float], hours: float) -> str:
    """The quality at that time; a dash if the run ended well before."""
    if max(curve) < 0.97 * hours:
        return "–"
    return f"{max([q for h, q in curve.items() if h <= hours], default=0.0):.3f}"


def show_figure(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Plots front quality over wall-clock time, a panel for each number of workers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = sorted({r["workers"] for r in found.values()})
    figure, panels = plt.subplots(1, len(sizes), figsize=(3.1 * len(sizes), 3.0), sharey=True)
    for panel, workers in zip(panels, sizes, strict=True):
        for mode, colour in zip(MODES, ("#b35806", "#2166ac", "#1b7837"), strict=True):
            r = found.get(f"{mode}-{workers}")
            if r is None:
                continue
            hours, quality = zip(*r["quality"], strict=True)
            label = f"{mode} ({r['utilisation']:.0%} busy)"
            panel.plot([60 * h for h in hours], quality, color=colour, label=label, linewidth=1.3)
        panel.set_title(f"{workers:,} workers", fontsize=9)
        panel.set_xlabel("minutes", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=6, loc="lower right", frameon=False)
    panels[0].set_ylabel("front quality", fontsize=8)
    panels[0].set_ylim(0.3, None)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.what == "one":
        json.dump(simulate(args), sys.stdout)
        print()
        return
    if args.what == "all":
        run_all(args.folder)
    found = results(args.folder)
    show_table(found)
    show_figure(found, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
