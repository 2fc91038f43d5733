"""A node's workers share the candidates' files: one reads or copies them, and all open them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from gptailor.config import Config, parse_config
from gptailor.errors import ModelError, ResourceError, UsageError
from gptailor.execution.node import files as node_files
from gptailor.execution.node import page_cache, staging
from gptailor.execution.node.files import open_candidates, share
from gptailor.execution.node.lock import node_lock, own_folder
from gptailor.execution.node.page_cache import absent, read_all, whole
from gptailor.models.candidate import Candidate
from tests.models.tiny import HIDDEN, mounted, save_model, small_disk

MIB = 1 << 20


def config_of(models: dict[str, str], **evaluation: object) -> Config:
    data = {
        "models": models,
        "base": "base",
        "evaluation": {"tasks": ["t_shared"], "device": "cpu", **evaluation},
    }
    return parse_config(data, "test")


def evict(*paths: Path) -> None:
    for path in paths:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def cold(tmp_path: Path) -> list[Path]:
    """Three files of a few MiB that are not in the page cache."""
    paths = [tmp_path / f"{n}.bin" for n in range(3)]
    for n, path in enumerate(paths):
        path.write_bytes(os.urandom((9 + 8 * n) * MIB + 5))
    evict(*paths)
    if not absent(paths[0]):
        pytest.skip("the page cache of this file system can't be emptied")
    return paths


def test_absent_parts_are_read_into_the_page_cache(cold: list[Path]) -> None:
    n_bytes = cold[2].stat().st_size
    expected = [(at * MIB, 8 * MIB) for at in (0, 8, 16)] + [(24 * MIB, n_bytes - 24 * MIB)]
    assert absent(cold[2]) == expected
    with cold[2].open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
        os.pread(file.fileno(), 8 * MIB, 8 * MIB)
    left = absent(cold[2])
    assert left is not None and (8 * MIB, 8 * MIB) not in left and left[0] == (0, 8 * MIB)
    assert read_all([(cold[2], part) for part in left]) == n_bytes - 8 * MIB
    assert absent(cold[2]) == []
    assert read_all(whole(cold[:2])) == sum(p.stat().st_size for p in cold[:2])


def test_reading_stops_on_request(cold: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_PART_BYTES", MIB)
    real = os.preadv

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(0.3)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)

    def no_more() -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        read_all(whole(cold), no_more)
    assert time.monotonic() - began < 2.0


SHARE = """
import sys, time
from pathlib import Path
from gptailor.execution.node.files import share
# go
print(share([Path(p) for p in sys.argv[2:]]))
"""


def start_all(code: str, count: int, go: Path, *words: str) -> list[str]:
    """Starts processes, releases them once all wait for `go`, and returns what they print then."""
    wait = "print(flush=True)\nwhile not Path(sys.argv[1]).exists():\n    time.sleep(0.002)\n"
    command = [sys.executable, "-c", code.replace("# go\n", wait), str(go), *words]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdout=pipe, text=True) for _ in range(count)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
    go.touch()
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return printed


def test_one_of_several_reads(cold: list[Path], tmp_path: Path) -> None:
    done = start_all(SHARE, 3, tmp_path / "go", *map(str, cold), str(cold[0]))
    read = sorted(map(int, done))
    assert read == [0, 0, sum(path.stat().st_size for path in cold)]


def test_files_too_large_for_memory_are_left_alone(
    cold: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_files, "available_bytes", lambda: 10 * MIB)
    notes: list[str] = []
    assert share(cold, note=notes.append) == 0
    assert absent(cold[0])
    assert "read when they are needed" in notes[0]


def test_where_the_page_cache_is_unknown_files_are_read_every_ten_minutes(
    cold: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_files, "absent", lambda path: None)
    assert share(cold) == sum(path.stat().st_size for path in cold)
    assert share(cold) == 0
    now = node_files._clock()
    monkeypatch.setattr(node_files, "_clock", lambda: now + 700.0)
    assert share(cold) > 0


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    lock = own_folder(tmp_path) / "lock"
    code = "import sys, time\nfrom pathlib import Path\n"
    code += "from gptailor.execution.node.lock import node_lock\n"
    code += (
        "with node_lock(Path(sys.argv[1])):\n    print('mine', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"mine\n"
    asked: list[int] = []

    def impatient() -> None:
        asked.append(1)
        if len(asked) == 3:
            process.send_signal(signal.SIGKILL)

    with node_lock(lock, impatient):
        assert len(asked) >= 3
    process.wait()


def test_somebody_else_s_folder_is_not_used(tmp_path: Path) -> None:
    (tmp_path / f"gptailor-{os.geteuid()}").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="only you can write to"):
        own_folder(tmp_path)
    (tmp_path / f"gptailor-{os.geteuid()}").unlink()
    own_folder(tmp_path).chmod(0o777)
    with pytest.raises(UsageError, match="only you can write to"):
        own_folder(tmp_path)


def test_files_are_read_even_without_a_lock(
    cold: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"gptailor-{os.geteuid()}").write_text("in the way")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert share(cold) == sum(path.stat().st_size for path in cold)


# Copies


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def inodes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_ino for p in sorted(folder.rglob("*.*"))}


def test_copies_are_complete_and_keep_the_original_references(
    models: dict[str, str], tasks_dir: Path, scratch: Path
) -> None:
    from gptailor.evaluation.evaluator import Evaluator
    from gptailor.models.family import Family
    from gptailor.recipe import Recipe, Take

    config = config_of(models, include_path=str(tasks_dir))
    family = open_candidates(config, stage=str(scratch))
    original = Family(models, "base")
    assert all(scratch in c.folder.parents for c in family.candidates.values())
    assert family.refs == original.refs
    assert family.fingerprint() == original.fingerprint()
    recipe = Recipe(family.refs, "base", (Take("red", 1), Take("blue", 4)), "base", "base")
    outcomes = [Evaluator(f, config.evaluation).evaluate(recipe) for f in (family, original)]
    assert outcomes[0].status == "ok"
    assert outcomes[0].scores == outcomes[1].scores


def test_copies_are_reused_until_their_source_changes(tmp_path: Path, scratch: Path) -> None:
    models = {name: str(save_model(tmp_path / name, 2)) for name in ("base", "red")}
    config = config_of(models)
    first = open_candidates(config, stage=str(scratch))
    before = inodes(scratch)
    open_candidates(config, stage=str(scratch))
    assert inodes(scratch) == before
    path = tmp_path / "red" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    again = open_candidates(config, stage=str(scratch))
    copied = again.candidates["red"].folder / "model.safetensors"
    assert copied.read_bytes() == bytes(raw)
    base = first.candidates["base"].folder
    kept = {name: n for name, n in before.items() if base.name in name}
    assert {Path(name).name: n for name, n in kept.items()} == inodes(base)
    copied.unlink()  # like a site's cleanup job
    third = open_candidates(config, stage=str(scratch))
    assert (third.candidates["red"].folder / "model.safetensors").read_bytes() == bytes(raw)


STAGE = """
import sys, time
from pathlib import Path
from gptailor.execution.node import staging
from gptailor.models.candidate import Candidate
real = staging._copy_file
def slow(source, to, stop):
    real(source, to, stop)
    print(to, flush=True)
    time.sleep(30)
staging._copy_file = slow
staging.staged([Candidate("base", sys.argv[1])], Path(sys.argv[2]))
"""


def test_an_interrupted_copy_is_made_again(tmp_path: Path, scratch: Path) -> None:
    folder = save_model(tmp_path / "base", 2)
    command = [sys.executable, "-c", STAGE, str(folder), str(scratch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(scratch.glob("*/.new-*"))
    places = staging.staged([Candidate("base", folder)], scratch)
    assert not list(scratch.glob("*/.new-*"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (places["base"] / name).read_bytes() == (folder / name).read_bytes()


ALL_STAGE = """
import os, sys, time
from pathlib import Path
from gptailor.execution.node import staging
from gptailor.models.candidate import Candidate
copied = []
real = staging._copy
staging._copy = lambda *given: (copied.append(1), real(*given))
# go
places = staging.staged([Candidate(name, name) for name in sys.argv[3:]], Path(sys.argv[2]))
print(len(copied), *(os.stat(p / "model.safetensors").st_ino for p in places.values()))
"""


def test_one_of_several_copies(models: dict[str, str], scratch: Path, tmp_path: Path) -> None:
    done = start_all(ALL_STAGE, 3, tmp_path / "go", str(scratch), *models.values())
    found = sorted(text.split() for text in done)
    assert [counts[0] for counts in found] == ["0", "0", "4"]
    assert len({tuple(counts[1:]) for counts in found}) == 1


def test_copying_stops_on_request(
    models: dict[str, str], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_PIECE_BYTES", 100)
    real = os.sendfile

    def slow(*given: int) -> int:
        time.sleep(0.05)
        return real(*given)

    monkeypatch.setattr(os, "sendfile", slow)

    def no_more() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        staging.staged([Candidate("base", models["base"])], scratch, no_more)
    assert not [path for path in scratch.glob("*/*") if path.is_dir()]


def test_a_missing_folder_is_reported(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--stage: .*/nowhere is not a folder on"):
        open_candidates(config_of(models), stage=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="--stage: scratch is not a folder"):
        open_candidates(config_of(models), stage="scratch")


def test_a_source_that_changes_meanwhile_is_reported(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "base", 2)
    real = staging._copy_file

    def copy(source: Path, to: Path, stop: threading.Event) -> None:
        real(source, to, stop)
        os.utime(source)

    monkeypatch.setattr(staging, "_copy_file", copy)
    with pytest.raises(ModelError, match="changed while it was copied"):
        staging.staged([Candidate("base", folder)], scratch)
    assert not [p for p in scratch.glob("*/*") if p.is_dir()]


# How files are read


def test_on_the_cpu_files_are_mapped_unless_asked_otherwise(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPTAILOR_IO", raising=False)
    # what a network file system would make of "auto"
    for asked, on_cpu, used in (
        (None, True, "mmap"),
        ("auto", True, "mmap"),
        ("pread", True, "pread"),
        (None, False, "auto"),
    ):
        if asked is not None:
            monkeypatch.setenv("GPTAILOR_IO", asked)
        else:
            monkeypatch.delenv("GPTAILOR_IO", raising=False)
        monkeypatch.setattr(node_files, "is_cpu", lambda device, answer=on_cpu: answer)
        family = open_candidates(config_of(models))
        assert family.base.checkpoint._io == used, asked


# On separate disks


@pytest.mark.system
def test_a_full_disk_is_reported(
    tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "small", 300_000) as small:
        with pytest.raises(
            ResourceError, match=r"need \d+ kB in .*small.* where only \d+ kB are free"
        ):
            open_candidates(config_of(models), stage=str(small))
        monkeypatch.setattr(staging, "_check_room", lambda candidates, root: None)
        with pytest.raises(ResourceError, match="is full, so"):
            open_candidates(config_of(models), stage=str(small))
        assert not list(small.glob("*/.new-*"))
        for place in (p for p in small.glob("*/*") if p.is_dir()):  # a complete copy or none
            assert (place / staging._MANIFEST).is_file()


READ = """
import json, sys, time
from pathlib import Path
import numpy as np
from gptailor.config import parse_config
from gptailor.execution.node.files import open_candidates
def figures(path, *keys):
    rows = (line.split(":") for line in Path(path).read_text().splitlines())
    return {k: int(v.split()[0]) for k, v in rows if k in keys}
# go
before = figures("/proc/self/io", "read_bytes")["read_bytes"]
models = json.loads(sys.argv[2])
data = {"models": models, "base": "base", "evaluation": {"tasks": ["x"], "device": "cpu"}}
family = open_candidates(parse_config(data, "test"), workers_here=3)
total = 0
for candidate in family.candidates.values():
    for path in candidate.checkpoint.files:
        file = candidate.checkpoint.file(path)
        total += int(np.from_dlpack(file.tensor(0, (file.size,), "U8")).sum())
after = figures("/proc/self/io", "read_bytes")["read_bytes"]
own = figures("/proc/self/status", "RssAnon")["RssAnon"] * 1024
print(json.dumps({"read": after - before, "own": own, "sum": total}))
"""


@pytest.mark.system
def test_three_workers_read_the_disk_once(tmp_path: Path) -> None:
    """The kernel counts the bytes that it read from the disk for each process."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4: apt-get install e2fsprogs")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(300 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    models = {name: str(tmp_path / "disk" / name) for name in ("base", "red")}
    with mounted(tmp_path / "disk", "-o", "loop", str(image)):
        for folder in models.values():
            save_big(Path(folder), 48 * MIB)
    with mounted(tmp_path / "disk", "-o", "loop", str(image)):
        files = [f for p in models.values() for f in Path(p).glob("*.safetensors")]
        size = sum(f.stat().st_size for f in files)
        # a process in a mount namespace of its own may have kept the first mount, and its pages
        evict(*files)
        done = start_all(READ, 3, tmp_path / "go", json.dumps(models))
    found = [json.loads(text) for text in done]
    assert len({f["sum"] for f in found}) == 1
    read = sum(f["read"] for f in found)
    assert size <= read <= 1.05 * size, found
    assert max(f["own"] for f in found) < size  # mapped, not copied: less than 2 * 48 MiB


def save_big(folder: Path, n_bytes: int) -> None:
    """A tiny model with large embeddings."""
    rows = n_bytes // (2 * HIDDEN)
    embeddings = {"model.embed_tokens.weight": ("BF16", (rows, HIDDEN), os.urandom(n_bytes))}
    save_model(folder, 1, tensors=embeddings, config={"vocab_size": rows})
