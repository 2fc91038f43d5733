"""Reads a run folder, with or without islands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptailor.evaluation.outcome import Evaluation
from gptailor.run.archive import Archive
from gptailor.run.island_folder import island_folder, island_numbers
from gptailor.run.journal import evaluations_in, read_journal
from gptailor.run.journal_entry import Header
from gptailor.run.layout import ARCHIVE, ISLANDS, JOURNAL


@dataclass(frozen=True)
class RunData:
    """The contents of a run folder.

    Attributes:
        evaluations: each recipe on each set of documents once, numbered from 1 in the order in
            which they ended; of duplicates the one that ended first.
        paid: all evaluations, including those that two islands made by accident.
        config: the resolved configuration; empty if the run has none.
        family: depth, folders and parameter counts of the models; empty if the run has none.
    """

    evaluations: list[Evaluation]
    paid: Sequence[Evaluation]
    config: dict[str, Any]
    family: dict[str, Any]


def read_run(run: str | Path) -> RunData:
    """Reads a run folder; searches may still be writing to it.

    For islands it reads the journals, since SQLite files that other nodes write to are not opened.

    Raises:
        UsageError: the folder holds no run, or a corrupt one.
    """
    run = Path(run)
    journals = journals_of(run)
    if (run / ARCHIVE).is_file() or not journals:
        with Archive(run, readonly=True) as archive:
            return data_of(archive)
    paid: list[Evaluation] = []
    headers: list[Header] = []
    for path in journals:
        header, entries = read_journal(path)
        headers += [] if header is None else [header]
        paid += evaluations_in(entries)
    if not headers:
        return RunData(union(paid), paid, {}, {})
    last = max(headers, key=_budget)  # it may have been raised when an island was resumed
    return RunData(union(paid), paid, dict(last.config), dict(last.family))


def _budget(header: Header) -> int:
    return int(header.config.get("search", {}).get("evaluations", 0))


def data_of(archive: Archive) -> RunData:
    """The contents of an open archive."""
    rows = archive.evaluations()
    return RunData(rows, rows, _meta(archive, "config"), _meta(archive, "family"))


def union(paid: Sequence[Evaluation]) -> list[Evaluation]:
    """Each recipe on each set of documents once: the first to end, with all arms that led to it."""
    found: dict[tuple[str, str], Evaluation] = {}
    arms: dict[str, set[str]] = {}
    for evaluation in sorted(paid, key=lambda e: e.finished_at):
        digest = evaluation.recipe.hash
        arms.setdefault(digest, set()).update(evaluation.arms)
        found.setdefault((digest, evaluation.documents), evaluation)
    return [
        replace(evaluation, number=number, arms=tuple(sorted(arms[evaluation.recipe.hash])))
        for number, evaluation in enumerate(found.values(), start=1)
    ]


def journals_of(run: Path) -> list[Path]:
    """The existing journals of a run's islands."""
    paths = [island_folder(run, i) / JOURNAL for i in island_numbers(run / ISLANDS)]
    return [path for path in paths if path.is_file()]


def _meta(archive: Archive, key: str) -> dict[str, Any]:
    """A JSON object from the archive's meta; empty if it is absent or something else."""
    try:
        value = json.loads(archive.get_meta(key) or "{}")
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
