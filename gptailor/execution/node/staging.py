"""Copies candidates to a node's own disk, once for all its processes and for later jobs.

A copy is complete or does not exist: it is made under a temporary name and renamed. It is used
again if the files that it was copied from have not changed. An unfinished copy is removed by the
next process. Removing copies in the end is up to the site: scratch space is usually cleared after
each job.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from gptailor.errors import ModelError, ResourceError, UsageError, is_disk_full, sizes
from gptailor.execution.node.lock import node_lock, own_folder
from gptailor.models.candidate import Candidate
from gptailor.models.side_files import side_files
from gptailor.models.untrusted import is_file
from gptailor.patience import Say

_MANIFEST = ".gptailor-copied-from.json"
_STREAMS = 4
_PIECE_BYTES = 64 << 20


def scratch_folder(name: str) -> Path:
    """The user's scratch folder, with its variables expanded on this node.

    Raises:
        UsageError: it does not exist here.
    """
    folder = Path(os.path.expandvars(name)).expanduser()
    if not folder.is_absolute() or not folder.is_dir():
        raise UsageError(
            f"--stage: {folder} is not a folder on {socket.gethostname()}: use the absolute path "
            "of a folder on the node's own disk, like $TMPDIR or /scratch."
        )
    return folder


def staged(
    candidates: Sequence[Candidate],
    scratch: Path,
    keep_going: Callable[[], None] = lambda: None,
    says: Say = lambda text: None,
) -> dict[str, Path]:
    """Copies candidates that are not there yet; returns candidate's name → folder of the copy.

    Args:
        candidates: the candidates in their shared location.
        scratch: a folder on the node's own disk.
        keep_going: called while waiting or copying; an error that it raises ends that.
        says: called with what is being copied.

    Raises:
        ResourceError: there is no room.
        ModelError: a candidate changed while it was copied, or can't be read.
        UsageError: somebody else's folder is in the way.
    """
    root = own_folder(scratch)
    places = {c.name: root / _name(c.folder) for c in candidates}
    says(f"waiting for another process that copies candidates to {scratch}")
    with node_lock(root / "lock", keep_going):
        for left in root.glob(".new-*"):  # we hold the lock, so its maker is dead
            shutil.rmtree(left, ignore_errors=True)
        missing = [c for c in candidates if not _is_copy(places[c.name], c)]
        missing = list({places[c.name]: c for c in missing}.values())
        for candidate in missing:  # removes outdated copies
            shutil.rmtree(places[candidate.name], ignore_errors=True)
        _check_room(missing, root)
        for number, candidate in enumerate(missing, start=1):
            says(f"copying {candidate.name} to {scratch}, {number} of {len(missing)}")
            _copy(candidate, places[candidate.name], keep_going)
    return places


def _name(folder: Path) -> str:
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    return f"{folder.resolve().name[:60]}-{digest}"


def _files(candidate: Candidate) -> list[str]:
    """The needed files of a model's folder, relative to it."""
    names = ["config.json", "model.safetensors.index.json", *side_files(candidate.folder)]
    small = [name for name in names if is_file(candidate.folder / name)]
    return sorted({*small, *(path.name for path in candidate.checkpoint.files)})


def _identity(candidate: Candidate) -> list[list[object]]:
    stats = [(name, (candidate.folder / name).stat()) for name in _files(candidate)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _is_copy(place: Path, candidate: Candidate) -> bool:
    """Whether all files are there with their right sizes, and their sources did not change."""
    try:
        known = json.loads((place / _MANIFEST).read_text())
        sizes = [(place / name).stat().st_size for name in _files(candidate)]
    except (OSError, ValueError):
        return False
    now = _identity(candidate)
    return bool(known == now and sizes == [size for _, size, _ in now])


def _check_room(candidates: Sequence[Candidate], root: Path) -> None:
    needed = sum((c.folder / name).stat().st_size for c in candidates for name in _files(c))
    free = shutil.disk_usage(root).free
    if needed > free:
        texts = sizes(needed, free)
        raise ResourceError(
            f"The candidates need {texts[0]} in {root}, where only {texts[1]} are "
            "free: use another folder, or leave out --stage."
        )


def _copy(candidate: Candidate, place: Path, keep_going: Callable[[], None]) -> None:
    before = _identity(candidate)
    new = place.with_name(f".new-{place.name}")
    try:
        new.mkdir(mode=0o700)
        stop = threading.Event()
        with ThreadPoolExecutor(_STREAMS) as pool:
            futures = [
                pool.submit(_copy_file, candidate.folder / name, new / name, stop)
                for name in _files(candidate)
            ]
            try:
                while wait(futures, 0.2, FIRST_EXCEPTION).not_done:
                    keep_going()
                    if any(f.done() and f.exception() for f in futures):
                        break
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
        for future in futures:
            if not future.cancelled():
                future.result()
        if _identity(candidate) != before:
            raise ModelError(f"{candidate.folder} changed while it was copied: start again.")
        (new / _MANIFEST).write_text(json.dumps(before))
        new.rename(place)
    except OSError as error:
        if is_disk_full(error):
            raise ResourceError(
                f"{place.parent} is full, so {candidate.folder} can't be copied there: use "
                "another folder, or leave out --stage."
            ) from error
        raise ModelError(
            f"{candidate.folder} can't be copied to {place.parent}: {error.strerror}."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _copy_file(source: Path, to: Path, stop: threading.Event) -> None:
    """Copies a file inside the kernel, piece by piece, until it is complete or `stop` is set."""
    to.parent.mkdir(exist_ok=True)
    with source.open("rb") as inside, to.open("xb") as out:
        stat = os.fstat(inside.fileno())
        while not stop.is_set():
            if not os.sendfile(out.fileno(), inside.fileno(), None, _PIECE_BYTES):
                break
    os.utime(to, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # part of a family's fingerprint
