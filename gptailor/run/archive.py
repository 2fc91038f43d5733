"""The archive: the record of every evaluation of a run, and its single source of truth.

One SQLite file with one writer. An evaluation is on disk before anything relies on it
(`synchronous=FULL`, rollback journal: both work on network file systems, where WAL does not).
Front, report and a resumed search are all rebuilt from it.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gptailor.errors import ResourceError, UsageError, is_disk_full
from gptailor.evaluation.outcome import Evaluation, Outcome
from gptailor.recipe import KnownLayers, Recipe
from gptailor.run.layout import ARCHIVE
from gptailor.run.pareto import most_small_layers

SCHEMA = "gptailor/archive/1"

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS evaluations (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  recipe_hash TEXT NOT NULL,
  documents TEXT NOT NULL,
  recipe TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('ok', 'infeasible', 'failed')),
  reason TEXT NOT NULL,
  accuracy REAL,
  parameters INTEGER NOT NULL,
  scores TEXT NOT NULL,
  cost TEXT NOT NULL,
  finished_at REAL NOT NULL,
  UNIQUE (recipe_hash, documents)
) STRICT;
CREATE TABLE IF NOT EXISTS arms (
  arm TEXT NOT NULL, recipe_hash TEXT NOT NULL, PRIMARY KEY (arm, recipe_hash)
) STRICT;
"""


class Archive:
    """The evaluations of one run folder.

    Args:
        folder: the run folder; made if it is missing (unless `readonly`).
        readonly: for reports and status: takes no lock and never writes.

    Raises:
        UsageError: another search has the folder open, there is no archive to read, or it has
            another schema.
        ResourceError: the disk is full.
    """

    def __init__(self, folder: str | Path, *, readonly: bool = False) -> None:
        self.folder = Path(folder)
        self.path = self.folder / ARCHIVE
        self._lock_fd = -1
        if readonly and not self.path.is_file():
            raise UsageError(f"{self.folder} holds no run: {self.path} does not exist.")
        try:
            if readonly:
                # after kill -9, SQLite must be able to roll the journal back before it reads
                mode = "rw" if os.access(self.folder, os.W_OK) else "ro"
                uri = f"{self.path.resolve().as_uri()}?mode={mode}"
                self._db = sqlite3.connect(uri, uri=True, timeout=30)
                self._db.execute("PRAGMA query_only = ON")
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock_fd = _locked(self.folder)
                self._db = sqlite3.connect(self.path, timeout=30)
                self._db.execute("PRAGMA journal_mode = DELETE")
                self._db.execute("PRAGMA synchronous = FULL")
                with self._db:
                    self._db.executescript(_TABLES)
                if self.get_meta("schema") is None:
                    self.set_meta("schema", SCHEMA)
            found = self.get_meta("schema")
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise _explained(error, self.path) from error
        except UsageError:
            self.close()
            raise
        if found != SCHEMA:
            self.close()
            raise UsageError(f"{self.path} has schema {found!r}, but {SCHEMA!r} is needed.")

    @staticmethod
    def check_not_in_use(
        folder: str | Path, *, wait_s: float = 0.0, note: Callable[[str], None] = print
    ) -> None:
        """Raises a `UsageError` if another search has the folder open; makes nothing.

        Args:
            folder: the run folder.
            wait_s: how long to wait for the other one: a network file system may keep the lock of
                a dead machine for a while.
            note: takes a line about the wait.
        """
        deadline, is_noted = time.monotonic() + wait_s, False
        while (Path(folder) / ".lock").exists():
            try:
                os.close(_locked(Path(folder)))
                return
            except UsageError as error:
                if time.monotonic() >= deadline:
                    raise
                if not is_noted:
                    note(f"Waiting up to {wait_s:.0f} s for the lock. {error}")
                    is_noted = True
                time.sleep(min(2.0, wait_s))

    def close(self) -> None:
        """Releases the lock; the archive can't be used afterwards."""
        if hasattr(self, "_db"):
            self._db.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def get_meta(self, key: str) -> str | None:
        """A text that belongs to the whole run, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        """Writes a text that belongs to the whole run; durable on return."""
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def record(
        self, recipe: Recipe, documents: str, parameters: int, outcome: Outcome
    ) -> Evaluation:
        """Writes an evaluation; it is durable when this returns.

        Raises:
            ResourceError: the disk is full; nothing was written.
        """
        return self.record_all([(recipe, documents, parameters, outcome)])[0]

    def record_all(self, rows: Sequence[tuple[Recipe, str, int, Outcome]]) -> list[Evaluation]:
        """Writes evaluations that ended together, each as (recipe, documents, parameters, outcome).

        One transaction, so one wait for the disk: this keeps up with a thousand workers.

        Raises:
            ResourceError: the disk is full; nothing was written.
        """
        finished_at = time.time()
        numbers = []
        with self._writing():
            for recipe, documents, parameters, outcome in rows:
                data = outcome.to_dict()
                cursor = self._db.execute(
                    "INSERT INTO evaluations (recipe_hash, documents, recipe, status, reason,"
                    " accuracy, parameters, scores, cost, finished_at)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        recipe.hash,
                        documents,
                        json.dumps(recipe.to_dict()),
                        outcome.status,
                        outcome.reason,
                        outcome.accuracy,
                        parameters,
                        json.dumps(data["scores"]),
                        json.dumps(data["cost"]),
                        finished_at,
                    ),
                )
                numbers.append(int(cursor.lastrowid or 0))
        arms = self._arms()
        return [
            Evaluation(number, recipe, documents, outcome, parameters, found, finished_at)
            for number, (recipe, documents, parameters, outcome) in zip(numbers, rows, strict=True)
            for found in [arms.get(recipe.hash, ())]
        ]

    def add_arm(self, arm: str, recipe: Recipe) -> None:
        """Records that a control arm led to this recipe; repeating it has no effect."""
        with self._writing():
            self._db.execute("INSERT OR IGNORE INTO arms VALUES (?, ?)", (arm, recipe.hash))

    def find(self, recipe: Recipe, documents: str) -> Evaluation | None:
        """The evaluation of that recipe on those documents, or None."""
        rows = self._select("WHERE recipe_hash = ? AND documents = ?", (recipe.hash, documents))
        return next(rows, None)

    def evaluations(self, documents: str | None = None) -> list[Evaluation]:
        """All evaluations in the order in which they ended, or only those on some documents."""
        if documents is None:
            return list(self._select("", ()))
        return list(self._select("WHERE documents = ?", (documents,)))

    def _arms(self) -> Mapping[str, tuple[str, ...]]:
        arms: dict[str, tuple[str, ...]] = {}
        for arm, recipe_hash in self._db.execute("SELECT arm, recipe_hash FROM arms ORDER BY arm"):
            arms[recipe_hash] = (*arms.get(recipe_hash, ()), arm)
        return arms

    def _select(self, where: str, values: tuple[Any, ...]) -> Iterator[Evaluation]:
        arms, known = self._arms(), KnownLayers()
        rows = self._db.execute(
            "SELECT number, recipe, documents, status, reason, accuracy, scores, cost, parameters,"
            f" recipe_hash, finished_at FROM evaluations {where} ORDER BY number",
            values,
        )
        for row in rows.fetchall():
            number, text, documents, status, reason, accuracy, scores, cost = row[:8]
            source = f"{self.path}, evaluation {number}"
            try:
                outcome = Outcome.from_dict(
                    {
                        "status": status,
                        "scores": json.loads(scores),
                        "cost": json.loads(cost),
                        "accuracy": accuracy,
                        "reason": reason,
                    }
                )
            except (ValueError, TypeError) as error:
                raise UsageError(
                    f"{source}, can't be read: it is damaged, or from another version of gptailor "
                    f"({error})."
                ) from error
            recipe = Recipe.from_dict(json.loads(text), source, known)
            yield Evaluation(
                number, recipe, documents, outcome, row[8], arms.get(row[9], ()), row[10]
            )

    def _writing(self) -> _Transaction:
        return _Transaction(self._db, self.path)


@dataclass(frozen=True)
class Counts:
    """Number of evaluations in an archive.

    Attributes:
        search: recipes on the documents of the search, with and without scores.
        infeasible: how many of these were infeasible.
        failed: how many of these failed.
        holdout: recipes on the holdout's documents.
        total: evaluations that the run's configuration asks for; 0 if unknown.
        best_small: the best accuracy with at most 75 % of the layers; None if there is none.
    """

    search: int
    infeasible: int
    failed: int
    holdout: int
    total: int
    best_small: float | None


def count_undisturbed(folder: str | Path) -> Counts | None:
    """Counts the evaluations in a run's archive; None if it can't be read without writing to it.

    `Archive(readonly=True)` lets SQLite roll back what a killed writer left. Between nodes that is
    not safe: the writer may be alive, with a lock that is not visible here.
    """
    path = Path(folder) / ARCHIVE
    try:
        uri = f"{path.resolve(strict=True).as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=5)) as db:
            db.execute("BEGIN")
            counts = {
                (documents, status): number
                for documents, status, number in db.execute(
                    "SELECT documents, status, count(*) FROM evaluations GROUP BY 1, 2"
                )
            }
            meta = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('config', 'family')"))
            num_layers = int(json.loads(meta.get("family", "{}")).get("num_layers", 0))
            (best,) = db.execute(
                "SELECT max(accuracy) FROM evaluations WHERE documents IN ('search', 'front')"
                " AND json_array_length(recipe, '$.layers') <= ?",
                (most_small_layers(num_layers),),
            ).fetchone()
        config = json.loads(meta.get("config", "{}"))
        total = int(config.get("search", {}).get("evaluations", 0))
    except (OSError, sqlite3.Error, ValueError, TypeError, AttributeError):
        return None
    search = {status: n for (documents, status), n in counts.items() if documents == "search"}
    return Counts(
        search=sum(search.values()),
        infeasible=search.get("infeasible", 0),
        failed=search.get("failed", 0),
        holdout=sum(n for (documents, _), n in counts.items() if documents == "holdout"),
        total=total,
        best_small=best,
    )


def _locked(folder: Path) -> int:
    """Locks a run folder; returns a file descriptor that holds the lock until it is closed."""
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        holder = os.read(fd, 64).decode(errors="replace").strip() or "?"
        os.close(fd)
        raise UsageError(
            f"The run folder {folder} is in use by another search (process {holder}): "
            "wait for it, or name another output."
        ) from None
    except OSError:
        os.close(fd)
        raise
    return fd


class _Transaction:
    """One transaction; SQLite's errors become ours."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db = db
        self._path = path

    def __enter__(self) -> None:
        self._db.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._db.__exit__(kind, value, trace)
        except sqlite3.Error as error:
            raise _explained(error, self._path) from error
        if isinstance(value, sqlite3.Error):
            raise _explained(value, self._path) from value


def _explained(error: sqlite3.Error | OSError, path: Path) -> Exception:
    text = str(error)
    if isinstance(error, OSError):
        text = error.strerror or text
        full = is_disk_full(error)
    else:
        full = "full" in text or "disk I/O" in text
    if full:
        return ResourceError(
            f"The archive {path} can't be written: {text}. Free space, then resume."
        )
    return UsageError(f"The archive {path} can't be used: {text}.")
