"""Copies byte ranges of the sources to a file of the result, inside the kernel, keeping holes.

If source and result are on a file system that can share blocks (XFS, Btrfs), whole blocks with the
same alignment are shared, not copied; the kernel's copy_file_range does this if it is called for
whole blocks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from gptailor.stitching.layout import BLOCK, Range

if TYPE_CHECKING:
    from gptailor import _C

_PIECE = 64 << 20
_FOLIO = 64 << 10
_READ_PIECE = 16 << 20
_WRITE_PIECE = 1 << 20
"""Larger writes make the page cache ask for huge pages, which is slow if memory is fragmented."""
_FICLONERANGE = 0x4020940D  # linux/fs.h


def copy(source: _C.InputFile, part: Range, fd: int, written: Callable[[int, int], None]) -> None:
    """Copies one range into the open file `fd`, which has its final size and no data there.

    Args:
        source: the file of the range.
        part: the range.
        fd: the destination.
        written: called with offset and length of each piece that was written.

    Raises:
        OSError: reading or writing failed.
    """
    from gptailor import _C

    direct = source.io == "direct"
    for offset, n_bytes in _pieces(source, part, _READ_PIECE if direct else _PIECE):
        to = part.out_offset + offset - part.offset
        if direct:  # in-kernel copies would go through the page cache
            write_all(fd, memoryview(source.read(offset, n_bytes)), to)
        else:
            _C.copy_range(source.fileno(), offset, fd, to, n_bytes)
        written(to, n_bytes)


def stored_bytes(source: _C.InputFile, part: Range) -> int:
    """How many bytes of a range are not in holes."""
    return sum(end - begin for begin, end in _data(source, part))


def _pieces(source: _C.InputFile, part: Range, most: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of each piece to copy.

    Whole blocks are pieces of their own, so that they can be shared. The kernel copies 16 pages at
    a time, and the page cache makes them one folio if they start at a multiple of that in the
    result.
    """
    aligned = (part.offset - part.out_offset) % BLOCK == 0
    shift = part.out_offset - part.offset
    for begin, end in _data(source, part):
        at = begin
        while at < end:
            to = at + shift
            step = BLOCK if aligned and at % BLOCK else _FOLIO if to % _FOLIO else most
            stop = min(end, at + step - to % step)
            yield at, stop - at
            at = stop


def _data(source: _C.InputFile, part: Range) -> Iterator[tuple[int, int]]:
    """[begin, end) of the data, without holes, within the range."""
    fd, at, end = source.fileno(), part.offset, part.offset + part.n_bytes
    status = os.fstat(fd)
    if status.st_blocks * 512 >= status.st_size:
        yield at, end
        return
    while at < end:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
            stop = os.lseek(fd, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # SEEK_DATA is not supported: all is data
                yield at, end
            return
        if begin < end:
            yield begin, min(stop, end)
        at = stop


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Writes all bytes at an offset; raises OSError."""
    while data:
        written = os.pwrite(fd, data[:_WRITE_PIECE], offset)
        data, offset = data[written:], offset + written


class SharingProbe:
    """Finds out whether files in `folder` can share blocks with a source, once per file system."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, bool] = {}

    def __call__(self, path: Path) -> bool:
        """True if blocks of `path` can be shared."""
        try:
            status = path.stat()
        except OSError:
            return False
        if status.st_dev not in self._known and status.st_size >= BLOCK:
            self._known[status.st_dev] = self._can_clone(path)
        return self._known.get(status.st_dev, False)

    def _can_clone(self, path: Path) -> bool:
        import fcntl

        trial = self._folder / ".probe"
        try:
            with path.open("rb") as source, trial.open("xb") as target:
                request = struct.pack("=qQQQ", source.fileno(), 0, BLOCK, 0)
                fcntl.ioctl(target.fileno(), _FICLONERANGE, request)
            return True
        except OSError:
            return False
        finally:
            trial.unlink(missing_ok=True)


class WriteBack:
    """Starts write-back of finished bytes while the rest is computed, in its own thread.

    It does not wait for the disk: to be sure that the bytes are there, fsync is still needed, but
    it then has little to wait for.
    """

    def __init__(self, enabled: bool) -> None:
        self._queue: SimpleQueue[tuple[int, int, int] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True) if enabled else None
        if self._thread is not None:
            self._thread.start()

    def __call__(self, fd: int, offset: int, n_bytes: int) -> None:
        """Reports written bytes; the descriptor must stay open until `finish`."""
        if self._thread is not None:
            self._queue.put((fd, offset, n_bytes))

    def finish(self) -> None:
        """Waits until write-back of everything has started."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        from gptailor import _C

        while (item := self._queue.get()) is not None:
            with contextlib.suppress(OSError):  # fsync reports it
                _C.start_write_back(*item)
