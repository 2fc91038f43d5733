"""Runs one search in virtual time: the real `Run` with its archive and islands, but no model."""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from landscape import (
    LAYER_PARAMETERS,
    MIN_LAYERS,
    MODELS,
    NUM_LAYERS,
    PARAMETERS,
    Landscape,
    PretendFamily,
)
from virtual_cluster import Clock, Log, StepDied, Turns, VirtualCluster

from gptailor.config import Config
from gptailor.evaluation.outcome import Evaluation
from gptailor.run.archive import Archive
from gptailor.run.island_folder import island_folder
from gptailor.search.island_peers import WAIT_S, IslandPeers
from gptailor.search.peers import NoPeers, Peers
from gptailor.search.progress import Progress
from gptailor.search.run import Run

SYNCS = 4
"""How often SQLite waits for the disk in one transaction (journal twice, file, folder)."""

RESTART_S = {"step": 2.0, "node": 420.0}
"""Seconds from the loss until the next launch. If only the step is lost: the supervisor's pause. If
a node falls silent: 300 s until Slurm gives it up (SlurmdTimeout), and 120 s until a requeued job
may begin (cred_expire)."""


def make_config(args: argparse.Namespace, evaluations: int) -> Config:
    return Config.model_validate(
        {
            "models": MODELS,
            "base": "base",
            "space": {
                "layers": {"min": MIN_LAYERS, "max": NUM_LAYERS},
                "merge": {"methods": ("task_arithmetic", "slerp", "ties")},
            },
            "evaluation": {"tasks": ["smollm2_units", "smollm2_grammar", "smollm2_python"]},
            "search": {
                "schedule": "generational" if args.mode == "generational" else "asynchronous",
                "population": args.population,
                "evaluations": evaluations,
                "seed": args.seed,
                "arms": ["block_influence", "angular", "uniform", "paper", "random"],
            },
        }
    )


class DiskArchive(Archive):
    """The archive in memory, with the delays of a disk."""

    def __init__(self, folder: Path, clock: Clock, commit_s: float) -> None:
        self._clock, self._commit_s = clock, commit_s
        self.commits = 0
        super().__init__(folder)

    def set_meta(self, key: str, value: str) -> None:
        super().set_meta(key, value)
        self._wait()

    def record_all(self, rows: Any) -> list[Evaluation]:
        evaluations = super().record_all(rows)
        self._wait()
        return evaluations

    def _wait(self) -> None:
        self.commits += 1
        self._clock.now += self._commit_s


class Island(threading.Thread):
    """One MPI program, restarted when it dies."""

    def __init__(
        self,
        args: argparse.Namespace,
        number: int,
        turns: Turns,
        folder: Path,
        landscape: Landscape,
        profile: cProfile.Profile | None,
    ) -> None:
        super().__init__(name=f"island {number}")
        self.args, self.number, self.turns, self.folder = args, number, turns, folder
        self.landscape = landscape
        self.log = Log()
        self.error: BaseException | None = None
        self.restarted_s = 0.0
        self.reread_s = 0.0
        self.commits = 0
        self.profile = profile

    def run(self) -> None:
        self.clock = Clock(self.turns, self.number)
        try:
            if self.profile is not None:
                self.profile.enable()
            self._work()
        except BaseException as error:
            self.error = error
        finally:
            self.clock.close()
            if self.profile is not None:
                self.profile.disable()

    def _work(self) -> None:
        args = self.args
        workers = args.workers // args.islands
        deaths = [3600 * hours for hours in args.deaths] if self.number == 0 else []
        config = make_config(args, args.evaluations)
        while True:
            dies_at = deaths.pop(0) if deaths else float("inf")
            try:
                executor = VirtualCluster(
                    self.clock, workers, args.times, self.log, self.landscape, dies_at
                )
                began = self.clock.rank0_s
                commit_s = SYNCS * args.sync_ms / 1000
                archive = DiskArchive(self.folder, self.clock, commit_s)
                with archive, self._others(archive, config) as others:
                    search = Run(
                        config, PretendFamily(), archive, executor, quiet(args), peers=others
                    )
                    self.clock.enter()
                    self.clock.leave()
                    self.reread_s = self.clock.rank0_s - began
                    try:
                        executor.workload()
                        search.search()
                    finally:
                        self.commits += archive.commits
                        executor.close()
                return
            except StepDied:
                self.restarted_s += RESTART_S[args.loses]
                self.clock.now = dies_at + RESTART_S[args.loses]

    def _others(self, archive: Archive, config: Config) -> Peers:
        if self.args.islands == 1:
            return NoPeers()
        description = {"num_layers": NUM_LAYERS, "models": MODELS, "parameters": {}}
        for key, value in (
            ("config", config.model_dump_json()),
            ("fingerprint", "{}"),
            ("documents", "virtual"),
            ("family", json.dumps(description)),
        ):
            archive.set_meta(key, value)
        run = self.folder.parent.parent
        others = VirtualIslands(
            run, self.number, self.args.islands, archive, now=lambda: self.clock.now
        )
        others.clock, others.sync_s = self.clock, self.args.sync_ms / 1000
        return others


class VirtualIslands(IslandPeers):
    """The real islands, waiting in virtual time."""

    clock: Clock
    sync_s: float

    def wait(self) -> None:
        self.clock.enter()
        self.clock.wait_until(self.clock.now + WAIT_S)
        self.clock.leave()

    def publish(self, evaluations: Sequence[Evaluation]) -> None:
        super().publish(evaluations)
        self.clock.now += self.sync_s


def quiet(args: argparse.Namespace) -> Progress:
    return Progress(args.evaluations, NUM_LAYERS, io.StringIO())


def simulate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs one search and returns its figures."""
    turns = Turns(args.islands)
    landscape = Landscape()
    profile = cProfile.Profile(time.thread_time) if args.profile else None
    base_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        islands = [
            Island(
                args,
                i,
                turns,
                island_folder(Path(scratch), i),
                landscape,
                profile if i == 0 else None,
            )
            for i in range(args.islands)
        ]
        for island in islands:
            island.start()
        for island in islands:
            island.join()
            if island.error is not None:
                raise island.error
    if profile is not None:
        pstats.Stats(profile, stream=sys.stderr).sort_stats(args.profile).print_stats(45)
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ended_s = max(island.clock.now for island in islands)
    useful_s = sum(island.log.useful_s for island in islands)
    done = sum(len(island.log.ended) for island in islands)
    rank0 = max(island.clock.rank0_s / island.clock.now for island in islands)
    return {
        "mode": args.mode,
        "workers": args.workers,
        "islands": args.islands,
        "population": args.population,
        "evaluations": done,
        "hours": ended_s / 3600,
        "utilisation": useful_s / (args.workers * ended_s),
        "middle": middle(islands, args.workers, ended_s),
        "rank0": rank0,
        "rank0_ms": 1000 * sum(i.clock.rank0_s for i in islands) / max(done, 1),
        "memory_mb": base_kb / 1024 + (memory_mb - base_kb / 1024) / args.islands,
        "commits_per_s": max(island.commits / island.clock.now for island in islands),
        "lost_s": sum(island.log.lost_s for island in islands) / args.workers,
        "reread_s": max(island.reread_s for island in islands),
        "quality": quality(islands, ended_s),
        "has_torch": "torch" in sys.modules,
    }


def middle(islands: list[Island], workers: int, ended_s: float) -> float:
    """The utilisation without the first and the last tenth of the time."""
    low, high = 0.1 * ended_s, 0.9 * ended_s
    busy = sum(
        max(min(ended, high) - max(began, low), 0.0)
        for island in islands
        for began, ended in zip(island.log.began, island.log.ended, strict=True)
    )
    return busy / (workers * (high - low))


def quality(islands: list[Island], ended_s: float, points: int = 120) -> list[list[float]]:
    """(hours, fraction of the best possible hypervolume) at moments of the run.

    The reference point is guessing with the whole model; the best possible is all answers right at
    the smallest size.
    """
    rows = sorted(
        row
        for island in islands
        for row in zip(island.log.ended, island.log.accuracy, island.log.layers, strict=True)
    )
    best = dict.fromkeys(range(1, NUM_LAYERS + 1), 0.25)
    curve, next_row = [], 0
    for point in range(1, points + 1):
        moment = ended_s * point / points
        while next_row < len(rows) and rows[next_row][0] <= moment:
            _, accuracy, layers = rows[next_row]
            best[int(layers)] = max(best[int(layers)], accuracy)
            next_row += 1
        curve.append([moment / 3600, hypervolume(best)])
    return curve


def hypervolume(best: dict[int, float]) -> float:
    """The hypervolume of a front, given as best accuracy by layers kept, as a fraction of the best
    possible."""
    step = LAYER_PARAMETERS / PARAMETERS
    area, highest = 0.0, 0.25
    for layers in range(MIN_LAYERS, NUM_LAYERS):  # each size counts the best that is no larger
        highest = max(highest, best[layers])
        area += (highest - 0.25) * step
    return area / (0.75 * step * (NUM_LAYERS - MIN_LAYERS))
