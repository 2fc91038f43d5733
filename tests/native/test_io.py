"""The ways to read a file give the same bytes, whatever the kernel does in between."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from gptailor import _C
from tests.models.tiny import run_python

MODES = ("mmap", "pread", "direct")
DATA = np.random.default_rng(5).integers(0, 256, 9_500_001, np.uint8).tobytes()  # a partial block


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("io") / "weights"
    file.write_bytes(DATA)
    return file


RANGES = [
    (0, 0), (0, 1), (0, len(DATA)), (1, len(DATA) - 1), (4095, 2), (4096, 4096), (4096, 8191),
    (8192, 4 << 20), (4097, 5 << 20), (len(DATA), 0), (len(DATA) - 1, 1), (len(DATA) - 5000, 5000),
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_reads_the_same_bytes(mode: str, path: Path) -> None:
    file = _C.open_input(path, mode)
    assert (file.path, file.size) == (str(path), len(DATA))
    assert isinstance(file, _C.MappedFile if mode == "mmap" else _C.FileReader)
    for offset, n_bytes in RANGES:
        assert file.read(offset, n_bytes) == DATA[offset : offset + n_bytes]
        tensor = file.tensor(offset, (n_bytes,), "U8")
        seen = torch.utils.dlpack.from_dlpack(tensor)
        assert seen.numpy().tobytes() == DATA[offset : offset + n_bytes]
        tensor.check_intact()
    file.check_intact()


@pytest.mark.parametrize("mode", MODES)
def test_several_threads_share_one_file(mode: str, path: Path) -> None:
    file, wrong = _C.open_input(path, mode), []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            begin, end = sorted(int(n) for n in rng.integers(0, len(DATA), 2))
            if file.read(begin, end - begin) != DATA[begin:end]:
                wrong.append((begin, end))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_merges_are_the_same_in_every_mode(mode: str, dtype: str, tmp_path: Path) -> None:
    values = torch.randn(3, 70_001, generator=torch.Generator().manual_seed(0))
    raw = values.to(torch.bfloat16 if dtype == "BF16" else torch.float32).view(torch.uint8)
    (tmp_path / "w").write_bytes(b"xyz" + raw.numpy().tobytes())

    def merged(mode: str) -> bytes:
        file = _C.open_input(tmp_path / "w", mode)
        n_bytes = raw.shape[1]
        sources = [file.tensor(3 + i * n_bytes, (70_001,), dtype) for i in range(3)]
        job = _C.Merge("linear", sources, out_dtype="F32", weights=[0.2, 0.5, 0.9])
        out = _C.Buffer(4 * 70_001)
        job.run(0, 40_000, out)
        job.run(40_000, 30_001, out, 160_000)
        return bytes(memoryview(out))

    assert merged(mode) == merged("mmap")


def test_ranges_beyond_the_file(path: Path) -> None:
    for mode in MODES:
        file = _C.open_input(path, mode)
        for offset, n_bytes in [(-1, 1), (0, -1), (len(DATA), 1), (2**62, 2**62)]:
            with pytest.raises(ValueError, match="do not lie within"):
                file.read(offset, n_bytes)
        for offset in (-1, len(DATA)):
            with pytest.raises(ValueError, match="do not lie within"):
                file.tensor(offset, (1,), "U8")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for mode in (*MODES, "auto"):
        with pytest.raises(FileNotFoundError) as error:
            _C.open_input(tmp_path / "nö", mode)
        assert error.value.filename == str(tmp_path / "nö")
        with pytest.raises(IsADirectoryError):
            _C.open_input(tmp_path, mode)
        with pytest.raises(OSError, match="pipe"):
            _C.open_input(tmp_path / "pipe", mode)
        assert _C.open_input(tmp_path / "empty", mode).read(0, 0) == b""
    with pytest.raises(ValueError, match="unknown io 'fast': known are auto, mmap, pread, direct"):
        _C.open_input(tmp_path / "empty", "fast")


def test_descriptors_are_closed(path: Path) -> None:
    def n_open() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = n_open()
    for mode in MODES:
        tensor = _C.open_input(path, mode).tensor(0, (5,), "U8")
        assert n_open() > before
        del tensor
        assert n_open() == before


NETWORK = {
    "NFS": 0x6969, "Lustre": 0x0BD00BD0, "GPFS": 0x47504653, "BeeGFS": 0x19830326,
    "CIFS": 0xFF534D42, "SMB2": 0xFE534D42, "Ceph": 0x00C36400, "FUSE": 0x65735546,
}  # fmt: skip
LOCAL = {
    "ext4": 0xEF53, "XFS": 0x58465342, "Btrfs": 0x9123683E, "tmpfs": 0x01021994,
    "overlay": 0x794C7630, "ZFS": 0x2FC12FC1,
}  # fmt: skip


def test_auto_knows_network_file_systems(path: Path) -> None:
    assert {name: _C.io_of_file_system(n) for name, n in NETWORK.items()} == dict.fromkeys(
        NETWORK, "pread"
    )
    assert {name: _C.io_of_file_system(n) for name, n in LOCAL.items()} == dict.fromkeys(
        LOCAL, "mmap"
    )
    kind = subprocess.run(
        ["stat", "-f", "-c", "%t", str(path)], capture_output=True, text=True, check=True
    )
    assert _C.open_input(path).io == _C.io_of_file_system(int(kind.stdout, 16))


# A kernel that reads less than it was asked to, interrupts reads, or has no O_DIRECT

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static ssize_t answer(int fd, void* to, size_t n, off_t at) {
  static ssize_t (*real)(int, void*, size_t, off_t);
  static unsigned calls;
  if (!real) real = (ssize_t (*)(int, void*, size_t, off_t))dlsym(RTLD_NEXT, "pread64");
  const char* what = getenv("GPTAILOR_TEST_PREAD");
  if (!what) return real(fd, to, n, at);
  ++calls;
  if (!strcmp(what, "short") && n > 1) n = calls % 3 ? n / 2 + 1 : 1;
  if (!strcmp(what, "interrupt") && calls % 3) { errno = EINTR; return -1; }
  if (!strcmp(what, "error") && at > 100000) { errno = EIO; return -1; }
  if (!strcmp(what, "refuse") && calls % 2) { errno = EINVAL; return -1; }
  return real(fd, to, n, at);
}
ssize_t pread(int fd, void* to, size_t n, off_t at) { return answer(fd, to, n, at); }
ssize_t pread64(int fd, void* to, size_t n, off_t at) { return answer(fd, to, n, at); }
"""

READ = """
import os, sys
from gptailor import _C
path, mode, begin, n = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
data = open(path, "rb").read()
file = _C.open_input(path, mode)
os.environ["GPTAILOR_TEST_PREAD"] = sys.argv[5]
try:
    print(file.read(begin, n) == data[begin:begin + n], file.io)
except OSError as error:
    print(error.errno, error.filename == path)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = folder / "shim.so"
    words = ["-shared", "-fPIC", "-o", str(library), str(folder / "shim.c"), "-ldl"]
    subprocess.run([compiler, *words], check=True)
    return library


def shimmed(shim: Path, path: Path, mode: str, begin: int, n: int, what: str) -> list[str]:
    preload = " ".join(filter(None, (os.environ.get("LD_PRELOAD"), str(shim))))
    done = run_python(READ, path, mode, begin, n, what, LD_PRELOAD=preload)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("what", ["short", "interrupt"])
@pytest.mark.parametrize("mode", ["pread", "direct"])
def test_short_and_interrupted_reads_are_continued(
    mode: str, what: str, shim: Path, path: Path
) -> None:
    if mode == "direct" and what == "short":
        # The kernel reads whole blocks except at the end: half a block leaves the rest unaligned.
        assert shimmed(shim, path, mode, 5, 10_000, what)[0] == "True"
    for begin, n in [(5, 200_000), (len(DATA) - 77_777, 77_777)]:
        assert shimmed(shim, path, mode, begin, n, what)[0] == "True"


@pytest.mark.parametrize("mode", ["pread", "direct"])
def test_a_failing_disk_is_an_error(mode: str, shim: Path, path: Path) -> None:
    found = shimmed(shim, path, mode, 150_000, 200_000, "error")
    assert found == [str(errno.EIO), "True"]


def test_direct_reads_that_are_refused_become_ordinary_ones(shim: Path, path: Path) -> None:
    assert shimmed(shim, path, "direct", 4096, 500_000, "refuse") == ["True", "pread"]


# Files that change

BROKEN = """
import os, sys, time
import numpy as np
from gptailor import _C
mode, path, action, where = sys.argv[1:]
size = 40 << 20
with open(path, "wb") as f:
    f.write(np.ones(size // 4, np.float32).tobytes())
os.utime(path, ns=(1, 1))  # so that any later change has another time
file = _C.open_input(path, mode)
file.check_intact()
job = _C.Merge("linear", [file.tensor(0, (size // 4,), "F32")] * 2, out_dtype="F32", weights=[1, 1])
out = _C.Buffer(size)
job.run(0, 100, out)  # half done
n_before = len(os.listdir("/proc/self/fd"))
if action == "truncate":
    os.truncate(path, int(where))
else:
    with open(path, "r+b") as f:
        f.seek(int(where))
        f.write(b"changed!")
try:
    job.run(100, size // 4 - 100, out)
    values = np.frombuffer(memoryview(out), np.float32)
    print("right" if (values[:-100] == values[0]).all() else "wrong", "True")
except OSError as error:
    print(error.errno, error.filename == path)
try:
    file.check_intact()
    print("intact")
except OSError as error:
    print(error.errno, error.filename == path)
"""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("action", "where"),
    [("truncate", 0), ("truncate", 8 << 20), ("truncate", (8 << 20) + 6), ("write", 12345),
     ("truncate", (40 << 20) - 3)],
)  # fmt: skip
def test_a_file_that_changes_during_a_merge(
    mode: str, action: str, where: int, tmp_path: Path
) -> None:
    done = run_python(BROKEN, mode, tmp_path / "w", action, where)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    # data that were in memory before may still be merged
    assert said[:2] in ([str(errno.ESTALE), "True"], ["right", "True"])
    assert mode != "mmap" or said[0] != "right"
    assert said[2:] == [str(errno.ESTALE), "True"]


TORCH_VIEW = """
import os, sys
import torch
from gptailor import _C
path, keep = sys.argv[1], int(sys.argv[2])
with open(path, "wb") as f:
    f.write(bytes([7]) * (1 << 20))
files = [_C.MappedFile(path) for _ in range(3)]
views = [torch.utils.dlpack.from_dlpack(f.tensor(0, (1 << 20,), "U8")) for f in files[:2]]
os.truncate(path, keep)
print([int(v.sum()) == 7 * keep for v in views], int(views[0][keep - 1]))
for file in files:
    try:
        file.check_intact()
    except OSError as error:
        print(error.errno)
print(open("/proc/self/maps").read().count(path))
del views, files, file
print(open("/proc/self/maps").read().count(path))
"""


def test_torch_views_of_a_file_that_shrinks(tmp_path: Path) -> None:
    done = run_python(TORCH_VIEW, tmp_path / "w", 300_000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[True, True] 7", *[str(errno.ESTALE)] * 3, "3", "0"]


FOREIGN = """
import ctypes, faulthandler, mmap, os, signal, sys
from gptailor import _C
case, path = sys.argv[1:]
with open(path, "wb") as f:
    f.write(bytes(8192))
if case in ("fault-before", "sent-before"):
    faulthandler.enable()
file = _C.MappedFile(path)
if case == "fault-after":
    faulthandler.enable()
if case == "fault-between":
    faulthandler.enable()
    again = _C.MappedFile(path)  # puts our handler on top of one that ends in ours
if case == "python":
    def told(signum, frame):
        print("told", flush=True)
        os._exit(0)
    signal.signal(signal.SIGBUS, told)
    again = _C.MappedFile(path)
if case.startswith("sent") or case == "python":
    os.kill(os.getpid(), signal.SIGBUS)
    for _ in range(1000): pass
else:
    other = path + "-other"
    with open(other, "wb") as f:
        f.write(bytes(8192))
    with open(other, "r+b") as f:
        theirs = mmap.mmap(f.fileno(), 8192)
        os.truncate(other, 0)
        os.truncate(path, 0)
        if case != "fault-after":
            assert file.tensor(0, (8192,), "U8") is not None
            try:
                file.read(0, 8192)
            except OSError as error:
                print(error.errno, flush=True)
        print(theirs[5000], flush=True)
print("survived")
"""


@pytest.mark.parametrize(
    "case", ["fault", "fault-before", "fault-after", "fault-between", "sent", "sent-before"]
)
def test_bus_errors_that_are_not_ours_are_still_fatal(case: str, tmp_path: Path) -> None:
    done = run_python(FOREIGN, case, tmp_path / "w")
    assert done.returncode == -7, (done.stdout, done.stderr)  # SIGBUS
    assert "survived" not in done.stdout
    assert ("Fatal Python error: Bus error" in done.stderr) == ("-" in case)
    if case in ("fault", "fault-before", "fault-between"):
        assert done.stdout.split() == [str(errno.ESTALE)]


def test_a_signal_handler_in_python_is_called(tmp_path: Path) -> None:
    done = run_python(FOREIGN, "python", tmp_path / "w")
    assert (done.returncode, done.stdout.split()) == (0, ["told"]), done.stderr


MANY = """
import os, sys
from gptailor import _C
path = sys.argv[1]
with open(path, "wb") as f:
    f.write(b"7" * 10000)
files = [_C.MappedFile(path) for _ in range(300)]
del files[::3]
files += [_C.MappedFile(path) for _ in range(100)]
os.truncate(path, 4096)
broken = 0
for file in files:
    try:
        file.read(5000, 1)
    except OSError:
        broken += 1
print(broken == len(files))
"""


def test_many_mappings(tmp_path: Path) -> None:
    done = run_python(MANY, tmp_path / "w")
    assert done.stdout.split() == ["True"], done.stderr


def test_importing_installs_no_handler() -> None:
    code = (
        "import sys\nfrom gptailor import _C\n"
        "line = [l for l in open('/proc/self/status') if l.startswith('SigCgt')][0]\n"
        "print(int(line.split()[1], 16) >> 6 & 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
