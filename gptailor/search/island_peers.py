"""Several jobs that work on one search, each with a population and an archive of its own.

An island lives in `RUN/islands/I/` and tells the others through its journal what it has evaluated
and what it has begun. Islands come and go with their jobs. When one is lost, what it had begun
becomes free again after a while, and what it had evaluated is in its journal.

Islands do not coordinate, so two of them may evaluate the same recipe if both begin it before the
file system shows the other's journal entry. It counts once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gptailor.errors import UsageError
from gptailor.evaluation.outcome import Evaluation
from gptailor.evaluation.similarity import Similarity
from gptailor.run.archive import Archive
from gptailor.run.island_folder import island_numbers
from gptailor.run.journal import Journal, JournalReader
from gptailor.run.journal_entry import Begun, Closed, Entry, Header, Key, Measured
from gptailor.run.layout import ISLANDS, JOURNAL
from gptailor.search.peers import NoPeers, Peers

if TYPE_CHECKING:
    from types import TracebackType

PATIENCE_S = 60.0
"""An island that has written nothing for this long, or for the time of three evaluations if that is
longer, counts as lost: what it had begun is free again."""

LOOK_SHARE = 0.05
"""At most this fraction of the time is spent on polling for news when there is none, however slow
the file system is."""

MAX_PAUSE_S = 5.0
"""Longest time between two polls."""

WAIT_S = 0.5

T = TypeVar("T")


class IslandPeers:
    """The other islands of a run, and this one's journal.

    Args:
        run: the run folder.
        island: this one's number, from 0.
        count: the planned number of islands; the journals of any further ones are read, too.
        archive: this island's, open for writing; it says what the island searches.
        note: takes a sentence for the log.
        now: a monotonic clock in seconds; for tests.

    Attributes:
        header: what this island searches.

    Raises:
        UsageError: another island searches something else, or a journal is corrupt.
        ResourceError: the disk is full.
    """

    def __init__(
        self,
        run: Path,
        island: int,
        count: int,
        archive: Archive,
        note: Callable[[str], None] = lambda text: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.island = island
        self.count = count
        self._root = run / ISLANDS
        self._note = note
        self._now = now
        self._others: dict[int, _Other] = {}
        self._similarities: dict[str, Similarity] = {}
        self._new: list[Evaluation] = []
        self._seen: set[Key] = set()
        self._said: set[str] = set()
        self._longest_s = 0.0
        self._next_look = float("-inf")
        self.header = _header(archive, island, count)
        self._num_layers = int(self.header.family["num_layers"])
        mine = archive.evaluations()
        self._look(strict=True)  # before a journal is made, so that a mismatched island leaves none
        kept = json.loads(archive.get_meta("similarity") or "{}")
        measured = [Measured(model, Similarity.from_dict(data)) for model, data in kept.items()]
        self._journal = Journal(archive.folder, self.header, mine, measured)
        self._take(self._journal.unknown)

    def __enter__(self) -> IslandPeers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._journal.close()

    def refresh(self, *, at_once: bool = False) -> list[Evaluation]:
        """What others evaluated since the last call, each recipe and set of documents once.

        Args:
            at_once: read the journals even if they were read a moment ago.
        """
        if at_once or self._now() >= self._next_look:
            self._look()
        found, self._new = self._new, []
        return found

    @property
    def similarities(self) -> dict[str, Similarity]:
        """What others measured: model → similarity."""
        return self._similarities

    def begin(self, keys: Iterable[Key]) -> None:
        """Tells the others what is under way from now on."""
        keys = tuple(keys)
        if keys:
            self._journal.append([Begun(keys)])

    def publish(self, evaluations: Sequence[Evaluation]) -> None:
        """Tells the others what was evaluated; durable on return."""
        self._remember_time(evaluations)
        if evaluations:
            self._journal.append(evaluations)

    def publish_similarities(self, measured: Sequence[Measured]) -> None:
        """Tells the others what was measured; durable on return."""
        if measured:
            self._journal.append(measured)

    def is_under_way(self, key: Key) -> bool:
        """Whether another island that is not lost is evaluating it."""
        return any(key in other.under_way for other in self._living())

    def num_under_way(self, documents: str) -> int:
        """How many evaluations on these documents the others are running."""
        keys = {key for other in self._living() for key in other.under_way}
        return sum(key[1] == documents and key not in self._seen for key in keys)

    def wait(self) -> None:
        """Waits a moment for the others."""
        time.sleep(WAIT_S)

    def rotated(self, items: Sequence[T]) -> list[T]:
        """The items, rotated to begin with this island's share."""
        start = len(items) * (self.island % self.count) // self.count
        return [*items[start:], *items[:start]]

    def seed(self, seed: int) -> int:
        """A seed of this island's own."""
        digest = hashlib.sha256(f"{seed} island {self.island}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    @property
    def is_alone(self) -> bool:
        """False, even if no other island has started yet."""
        return False

    def _living(self) -> list[_Other]:
        patience = max(PATIENCE_S, 3.0 * self._longest_s)
        now = self._now()
        return [other for other in self._others.values() if now - other.heard_at <= patience]

    def _look(self, *, strict: bool = False) -> None:
        began, is_new = self._now(), False
        for island in island_numbers(self._root):
            if island == self.island:
                continue
            other = self._others.get(island)
            if other is None:
                path = self._root / str(island) / JOURNAL
                other = self._others[island] = _Other(JournalReader(path), began)
            try:
                is_new |= self._listen(island, other)
            except UsageError as error:
                if strict:
                    raise
                if str(error) not in self._said:  # this island continues without it
                    self._said.add(str(error))
                    self._note(f"Island {island} is ignored: {error}")
        ended = self._now()
        pause = 0.0 if is_new else (ended - began) / LOOK_SHARE
        self._next_look = ended + min(pause, MAX_PAUSE_S)

    def _listen(self, island: int, other: _Other) -> bool:
        """Reads new entries of a journal; returns False if there are none."""

        def read() -> list[Entry]:
            try:
                return other.reader.read()
            except UsageError as error:
                raise UsageError(
                    f"{error} Resuming island {island} (--island "
                    f"{island}/{max(self.count, island + 1)}) repairs it; or remove it."
                ) from error

        is_new = False
        while entries := read():
            is_new = True
            other.heard_at = self._now()
            for entry in entries:
                match entry:
                    case Header():
                        other.under_way.clear()
                        other.is_one_of_us = False
                        self.header.check_same(entry, other.reader.path)
                        other.is_one_of_us = True
                    case _ if not other.is_one_of_us:
                        continue
                    case Closed():
                        other.under_way.clear()
                    case Begun():
                        other.under_way.update(entry.keys)
                    case Measured():
                        other.under_way.discard((entry.model, "similarity"))
                        if len(entry.similarity.block_influence) == self._num_layers:
                            self._similarities.setdefault(entry.model, entry.similarity)
                    case Evaluation():
                        other.under_way.discard((entry.recipe.hash, entry.documents))
                        self._take([entry])
        return is_new

    def _take(self, evaluations: Sequence[Evaluation]) -> None:
        self._remember_time(evaluations)
        for evaluation in evaluations:
            key = (evaluation.recipe.hash, evaluation.documents)
            if key not in self._seen and self._fits(evaluation):
                self._seen.add(key)
                self._new.append(evaluation)

    def _fits(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation belongs to this search."""
        recipe, outcome, config = evaluation.recipe, evaluation.outcome, self.header.config
        objectives = set(config["objectives"]) - {"accuracy", "parameters"}
        return (
            dict(recipe.models) == config["models"]
            and recipe.base == config["base"]
            and max(recipe.src_layers) < self._num_layers
            and (outcome.accuracy is None or objectives <= {s.task for s in outcome.scores})
        )

    def _remember_time(self, evaluations: Iterable[Evaluation]) -> None:
        seconds = [e.outcome.cost.seconds for e in evaluations]
        self._longest_s = max(self._longest_s, *seconds, 0.0)


class _Other:
    """Another island, as far as its journal has been read."""

    def __init__(self, reader: JournalReader, now: float) -> None:
        self.reader = reader
        self.heard_at = now
        self.is_one_of_us = False
        self.under_way: set[Key] = set()


def open_islands(
    run: Path,
    island: tuple[int, int] | None,
    archive: Archive,
    note: Callable[[str], None] = lambda text: None,
) -> Peers:
    """The other islands of a run for number I of K; `NoPeers` without a number.

    Args:
        run: the run folder.
        island: (I, K), or None.
        archive: this search's, after `check_resumable` or an equivalent check.
        note: takes a sentence for the log.

    Raises:
        UsageError, ResourceError: see `IslandPeers`.
    """
    return NoPeers() if island is None else IslandPeers(run, *island, archive, note)


def _header(archive: Archive, island: int, count: int) -> Header:
    """The journal's header, from what `check_resumable` wrote into the archive."""
    meta = {
        key: archive.get_meta(key) or "" for key in ("config", "fingerprint", "documents", "family")
    }
    return Header(
        island,
        count,
        json.loads(meta["config"]),
        hashlib.sha256(meta["fingerprint"].encode()).hexdigest(),
        meta["documents"],
        json.loads(meta["family"]),
    )
