"""The file in which an island tells the others what it evaluated: `RUN/islands/I/journal.jsonl`.

One process appends whole lines; any number of others read on from where they stopped. All it needs
of the file system is that appended bytes eventually become visible: no locks, no memory maps, no
notifications. So it works on NFS and Lustre, where SQLite between nodes would not.

The island's archive remains the source of truth. A journal that a kill or a full disk left torn is
repaired when the island opens it again: an incomplete last line is cut off, and evaluations that
are only in the archive are appended. Nothing before the cut changes, so readers don't notice.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptailor.errors import ModelError, ResourceError, UsageError, is_disk_full
from gptailor.evaluation.outcome import Evaluation
from gptailor.models.untrusted import open_regular, read_up_to
from gptailor.recipe import KnownLayers
from gptailor.run.journal_entry import Closed, Entry, Header, Measured
from gptailor.run.layout import JOURNAL

MAX_LINE_BYTES = 1 << 23
"""A recipe of 200 layers with merges of eight models has about 10^5."""


class Journal:
    """An island's own journal, open for writing.

    Args:
        folder: the island's folder, locked by this process.
        header: what the island searches; it must match an existing journal's last header.
        evaluations: all evaluations in the archive.
        measured: all measured similarities in the archive.

    Attributes:
        unknown: evaluations in the file that the archive lacks, because the archive was lost.

    Raises:
        UsageError: the file is the journal of another search, or can't be used.
        ResourceError: the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        header: Header,
        evaluations: Sequence[Evaluation] = (),
        measured: Sequence[Measured] = (),
    ) -> None:
        self.path = folder / JOURNAL
        reader = JournalReader(self.path)
        found = reader.read(torn=True)
        if reader.header is not None:
            header.check_same(reader.header, self.path)
        in_archive = {_key(e) for e in evaluations}
        in_journal = {_key(e) for e in found if isinstance(e, Evaluation)}
        models = {e.model for e in found if isinstance(e, Measured)}
        self.unknown = [e for e in found if isinstance(e, Evaluation) and _key(e) not in in_archive]
        try:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(self.path, flags, 0o644)
            self._end = reader.offset
            if os.fstat(self._fd).st_size > self._end:
                os.ftruncate(self._fd, self._end)
            if self._end == 0:
                _sync_folder(folder)
        except OSError as error:
            raise _explained(error, self.path) from error
        missing: list[Entry] = [e for e in evaluations if _key(e) not in in_journal]
        missing += [m for m in measured if m.model not in models]
        self.append([header, *missing])  # a header also says that nothing is under way

    def append(self, entries: Sequence[Entry], *, sync: bool = True) -> None:
        """Writes whole lines; with `sync` they are durable on return, with one wait for all.

        Raises:
            ResourceError: the disk is full; nothing was written.
        """
        from gptailor.run.journal_line import to_line

        data = memoryview(b"".join(map(to_line, entries)))
        try:
            rest = data
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            if sync:
                os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):  # if this fails, the next opening repairs it
                os.ftruncate(self._fd, self._end)
            raise _explained(error, self.path) from error
        self._end += len(data)

    def close(self) -> None:
        """Tells the others that nothing is under way; nothing can be appended afterwards."""
        if self._fd >= 0:
            with contextlib.suppress(ResourceError, UsageError):
                self.append([Closed()], sync=False)
            os.close(self._fd)
            self._fd = -1


class JournalReader:
    """Reads a journal incrementally; the file need not exist yet.

    Attributes:
        header: the last header read; None before the first.
        offset: bytes that were read as whole lines.
        num_lines: number of these lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Header | None = None
        self.offset = 0
        self.num_lines = 0
        self._inode = 0
        self._layers = KnownLayers()

    def read(self, *, torn: bool = False) -> list[Entry]:
        """What was added since the last call, at most a few megabytes; call it until it is empty.

        A file that was replaced, or truncated before the current offset, is read from the start.

        Args:
            torn: read everything, and stop without an error at the first bad line; for the owner,
                who repairs it. The header must be right even then.

        Raises:
            UsageError: it can't be read, or is not a journal.
        """
        entries: list[Entry] = []
        try:
            with open_regular(self.path) as file:
                state = os.fstat(file.fileno())
                if state.st_ino != self._inode or state.st_size < self.offset:
                    self._inode, self.offset, self.num_lines = state.st_ino, 0, 0
                while state.st_size > self.offset:
                    file.seek(self.offset)
                    data = read_up_to(file, min(state.st_size - self.offset, MAX_LINE_BYTES))
                    before = self.offset
                    self._take(data, entries, torn)
                    if self.offset == before or not torn:
                        break
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            if error.errno == errno.ESTALE:  # NFS: just replaced
                return []
            raise UsageError(f"{self.path} can't be read: {error.strerror}.") from error
        except ModelError as error:
            raise UsageError(str(error)) from error
        return entries

    def _take(self, data: bytes, entries: list[Entry], torn: bool) -> None:
        from gptailor.run.journal_line import from_line  # imports pydantic, which takes 0.1 s

        begin = 0
        while (end := data.find(b"\n", begin)) >= 0:
            try:
                entry = from_line(data[begin:end], self.path, self.num_lines + 1, self._layers)
            except UsageError:
                if entries or (torn and self.num_lines):
                    return  # the next call begins with the bad line
                raise
            if isinstance(entry, Header):
                self.header = entry
            entries.append(entry)
            self.offset += end + 1 - begin
            self.num_lines += 1
            begin = end + 1
        if len(data) - begin >= MAX_LINE_BYTES and not torn:
            raise UsageError(
                f"{self.path} is not an island's journal: line {self.num_lines + 1} has more than "
                f"{MAX_LINE_BYTES:,} bytes."
            )


def read_journal(path: Path) -> tuple[Header | None, list[Entry]]:
    """All whole lines of a journal, with its last header; raises like `JournalReader.read`."""
    reader = JournalReader(path)
    entries: list[Entry] = []
    while new := reader.read():
        entries += new
    return reader.header, entries


def _key(evaluation: Evaluation) -> tuple[str, str]:
    return evaluation.recipe.hash, evaluation.documents


def evaluations_in(entries: Iterable[Entry]) -> list[Evaluation]:
    """The evaluations among the entries, in order."""
    return [entry for entry in entries if isinstance(entry, Evaluation)]


def _sync_folder(folder: Path) -> None:
    """Makes a new file's name durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explained(error: OSError, path: Path) -> Exception:
    reason = error.strerror or str(error)
    if is_disk_full(error):
        return ResourceError(
            f"The journal {path} can't be written: {reason}. Free space, then resume."
        )
    return UsageError(f"The journal {path} can't be used: {reason}.")
