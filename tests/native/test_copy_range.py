"""Copying byte ranges between files in every way that the kernel offers or refuses."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from gptailor import _C

SHM = Path("/dev/shm")
DATA = np.random.default_rng(0).integers(0, 256, 300_001, np.uint8).tobytes()


@contextmanager
def opened(path: Path | str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def shm() -> Iterator[Path]:
    if not os.access(SHM, os.W_OK):
        pytest.skip("no /dev/shm")
    path = SHM / f"gptailor-test-{os.getpid()}"
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("src", "dst", "n"),
    [(0, 0, len(DATA)), (1, 0, 4096), (7, 13, 200_003), (0, 5000, 0), (300_000, 1_000_000, 1)],
)
def test_copies_exactly_the_range(source: Path, tmp_path: Path, src: int, dst: int, n: int) -> None:
    with opened(source, os.O_RDONLY) as s, opened(tmp_path / "d", os.O_RDWR | os.O_CREAT) as d:
        os.write(d, b"\xaa" * 100)
        os.lseek(s, 11, os.SEEK_SET)
        way = _C.copy_range(s, src, d, dst, n)
        assert way in {"copy_file_range", "sendfile", "pread/pwrite"}
        assert (os.lseek(s, 0, os.SEEK_CUR), os.lseek(d, 0, os.SEEK_CUR)) == (11, 100)
    got = (tmp_path / "d").read_bytes()
    want = bytearray(b"\xaa" * 100)
    want.extend(bytes(max(0, dst + n - 100) if n else 0))
    want[dst : dst + n] = DATA[src : src + n]
    assert got == bytes(want)


def test_across_file_systems(source: Path, shm: Path) -> None:
    with opened(source, os.O_RDONLY) as s, opened(shm, os.O_RDWR | os.O_CREAT) as d:
        _C.copy_range(s, 3, d, 8, 200_000)
    assert shm.read_bytes() == bytes(8) + DATA[3:200_003]
    back = source.with_name("back")
    with opened(shm, os.O_RDONLY) as s, opened(back, os.O_WRONLY | os.O_CREAT) as d:
        _C.copy_range(s, 8, d, 0, 200_000)
    assert back.read_bytes() == DATA[3:200_003]


def test_a_destination_that_cannot_be_reopened(source: Path, shm: Path) -> None:
    # Write-only by permission: it can't be reopened through /proc, unless we are root.
    with opened(source, os.O_RDONLY) as s, opened(shm, os.O_WRONLY | os.O_CREAT) as d:
        shm.unlink()
        _C.copy_range(s, 0, d, 0, 1000)
        assert os.fstat(d).st_size == 1000


def test_holes_read_as_zeros(tmp_path: Path) -> None:
    with opened(tmp_path / "holes", os.O_RDWR | os.O_CREAT) as s:
        os.pwrite(s, b"x", 0)
        os.pwrite(s, b"y", 5_000_000)
        os.ftruncate(s, 9_000_000)
        with opened(tmp_path / "d", os.O_RDWR | os.O_CREAT) as d:
            _C.copy_range(s, 0, d, 1, 9_000_000)
    got = (tmp_path / "d").read_bytes()
    want = bytearray(9_000_001)
    want[1], want[5_000_001] = ord("x"), ord("y")
    assert got == bytes(want)


def test_several_threads_write_one_file(source: Path, shm: Path) -> None:
    with opened(source, os.O_RDONLY) as s, opened(shm, os.O_RDWR | os.O_CREAT) as d:
        cuts = range(0, 300_000, 20_000)
        workers = [
            threading.Thread(target=_C.copy_range, args=(s, cut, d, cut, 20_000)) for cut in cuts
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert shm.read_bytes() == DATA[:300_000]


def test_a_file_that_reports_no_size(tmp_path: Path) -> None:
    # copy_file_range returns 0 for files in /proc: only a read shows what they hold.
    target = tmp_path / "d"
    with (
        opened("/proc/self/status", os.O_RDONLY) as s,
        opened(target, os.O_WRONLY | os.O_CREAT) as d,
    ):
        _C.copy_range(s, 0, d, 0, 5)
    assert (tmp_path / "d").read_bytes() == b"Name:"


@pytest.mark.parametrize("on_shm", [False, True])
def test_a_source_that_ends_early(source: Path, tmp_path: Path, shm: Path, on_shm: bool) -> None:
    target = shm if on_shm else tmp_path / "d"
    with opened(source, os.O_RDONLY) as s, opened(target, os.O_RDWR | os.O_CREAT) as d:
        with pytest.raises(OSError, match="2 bytes too early") as error:
            _C.copy_range(s, 299_999, d, 0, 4)
        assert error.value.errno == errno.EIO
        with pytest.raises(OSError, match="too early"):
            _C.copy_range(s, 10**9, d, 0, 1)


def test_a_full_device(source: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with opened(source, os.O_RDONLY) as s, opened("/dev/full", os.O_WRONLY) as d:
        with pytest.raises(OSError, match="No space left") as error:
            _C.copy_range(s, 0, d, 0, 10)
        assert error.value.errno == errno.ENOSPC


def test_a_limit_on_file_size(source: Path, tmp_path: Path) -> None:
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with (
            opened(source, os.O_RDONLY) as s,
            opened(tmp_path / "d", os.O_RDWR | os.O_CREAT) as d,
            pytest.raises(OSError, match="too large") as error,
        ):
            _C.copy_range(s, 0, d, 0, 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG


def test_wrong_arguments(source: Path, tmp_path: Path) -> None:
    with opened(source, os.O_RDWR) as s, opened(tmp_path / "d", os.O_WRONLY | os.O_CREAT) as d:
        for args in [(s, -1, d, 0, 1), (s, 0, d, -1, 1), (s, 0, d, 0, -1)]:
            with pytest.raises(ValueError, match="negative"):
                _C.copy_range(*args)
        with pytest.raises(ValueError, match="beyond"):
            _C.copy_range(s, 2**62, d, 0, 2**62)
        with pytest.raises(ValueError, match="overlap"):
            _C.copy_range(s, 0, s, 10, 100)
        _C.copy_range(s, 0, s, 1000, 100)
        with pytest.raises(OSError, match="Bad file") as error:
            _C.copy_range(s, 0, 10_000, 0, 1)
        assert error.value.errno == errno.EBADF
    target = tmp_path / "d"
    for src_flags, dst_flags, kind, message in [
        (os.O_RDONLY, os.O_WRONLY | os.O_APPEND, ValueError, "appending"),
        (os.O_RDONLY, os.O_RDONLY, OSError, "not open for writing: Bad file"),
        (os.O_WRONLY, os.O_WRONLY, OSError, "not open for reading: Bad file"),
    ]:
        with (
            opened(source, src_flags) as s,
            opened(target, dst_flags) as d,
            pytest.raises(kind, match=message),
        ):
            _C.copy_range(s, 0, d, 0, 1)


def test_ctrl_c_ends_it(shm: Path, tmp_path: Path) -> None:
    n = 1 << 28
    with (
        opened(shm, os.O_RDWR | os.O_CREAT) as s,
        opened(tmp_path / "d", os.O_RDWR | os.O_CREAT) as d,
    ):
        os.ftruncate(s, n)
        main = threading.main_thread().ident
        assert main is not None

        def interrupt() -> None:
            time.sleep(0.01)
            signal.pthread_kill(main, signal.SIGINT)

        worker = threading.Thread(target=interrupt)
        worker.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in range(100):
                _C.copy_range(s, 0, d, 0, n)
        worker.join()
