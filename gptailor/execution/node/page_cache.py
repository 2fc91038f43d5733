"""Finds which parts of files are in the page cache, and reads the others once, in order.

Mapped files are read a few pages at a time, in the order in which a model is accessed; over a
network, each of these reads is a round trip. After `read_all`, mapped files are in memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptailor.patience import Say

Range = tuple[int, int]
"""(offset of the first byte, number of bytes)."""

STREAMS = 4
"""Number of parallel reads: one stream saturates neither a network file system nor a fast disk."""

_READ_BYTES = 16 << 20
_PART_BYTES = 256 << 20
"""How much one stream reads in order before it takes the next part."""
_BLOCK_PAGES = 2048
"""Missing pages are found in blocks of this many: a block that lacks a page is read whole."""


def absent(path: Path) -> list[Range] | None:
    """The parts of a file that are not in the page cache; None if the kernel does not tell.

    The kernel tells only the owner and those who may write to the file.

    Raises:
        OSError: the file can't be opened.
    """
    with _opened(path) as fd:
        n_bytes = os.fstat(fd).st_size
        if os.fstat(fd).st_uid != os.geteuid() and not os.access(path, os.W_OK):
            return None
        pages = _resident_pages(fd, n_bytes) if n_bytes else np.ones(0, bool)
    if pages is None:
        return None
    size = _BLOCK_PAGES * mmap.PAGESIZE
    holes = np.flatnonzero(~np.logical_and.reduceat(pages, range(0, len(pages), _BLOCK_PAGES)))
    return [(int(at) * size, min(size, n_bytes - int(at) * size)) for at in holes]


def read_all(
    ranges: Iterable[tuple[Path, Range]],
    keep_going: Callable[[], None] = lambda: None,
    says: Say = lambda text: None,
) -> int:
    """Reads parts of files into the page cache; returns how many bytes it read.

    Args:
        ranges: what to read, roughly in this order (there are `STREAMS` parallel readers).
        keep_going: called regularly in this thread; an error that it raises ends the reading.
        says: called with the progress, just as often.

    Raises:
        OSError: a file can't be read.
    """
    parts = [
        (path, at, min(_PART_BYTES, begin + n_bytes - at))
        for path, (begin, n_bytes) in _joined(ranges)
        for at in range(begin, begin + n_bytes, _PART_BYTES)
    ]
    stop = threading.Event()
    read_so_far = 0
    n_bytes_all = sum(n_bytes for _, _, n_bytes in parts)
    buffers = threading.local()

    def tell() -> None:
        says(f"reading the candidates, {read_so_far / 1e9:.1f} of {n_bytes_all / 1e9:.1f} GB")

    def read(path: Path, at: int, n_bytes: int) -> int:
        nonlocal read_so_far
        if not hasattr(buffers, "bytes"):
            buffers.bytes = memoryview(bytearray(_READ_BYTES))
        done = 0
        with _opened(path) as fd:
            os.posix_fadvise(fd, at, n_bytes, os.POSIX_FADV_SEQUENTIAL)
            while done < n_bytes and not stop.is_set():
                wanted = min(_READ_BYTES, n_bytes - done)
                got = os.preadv(fd, [buffers.bytes[:wanted]], at + done)
                if got == 0:
                    break  # the file became shorter, which opening it will report
                done += got
                read_so_far += got  # not atomic, but good enough for a progress message
        return done

    with ThreadPoolExecutor(STREAMS) as pool:
        futures = [pool.submit(read, *part) for part in parts]
        try:
            total = 0
            for future in futures:
                while not wait([future], 0.2).done:
                    keep_going()
                    tell()
                total += future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return total


def _joined(ranges: Iterable[tuple[Path, Range]]) -> Iterator[tuple[Path, Range]]:
    """The same bytes, with adjacent ranges joined."""
    last: tuple[Path, Range] | None = None
    for path, (begin, n_bytes) in ranges:
        if last is not None and last[0] == path and sum(last[1]) == begin:
            last = (path, (last[1][0], last[1][1] + n_bytes))
            continue
        if last is not None:
            yield last
        last = (path, (begin, n_bytes))
    if last is not None:
        yield last


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _resident_pages(fd: int, n_bytes: int) -> npt.NDArray[np.bool_] | None:
    """Whether each page is in memory. Uses `mincore`, which does not touch the pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    address = libc.mmap(None, n_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    pages = np.zeros(-(-n_bytes // mmap.PAGESIZE), np.uint8)
    try:
        failed = libc.mincore(address, n_bytes, pages.ctypes.data)
    finally:
        libc.munmap(address, n_bytes)
    return None if failed else (pages & 1).astype(bool)


def whole(paths: Sequence[Path]) -> list[tuple[Path, Range]]:
    """The ranges that cover some files completely."""
    return [(path, (0, path.stat().st_size)) for path in paths]
