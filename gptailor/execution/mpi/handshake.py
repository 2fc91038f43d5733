"""Checks that all ranks match before anything is evaluated.

They must have the same gptailor, libraries, model files and documents, one run folder, and clocks
that agree well enough for people who read logs (no code compares clocks of two nodes). Rank 0
compares what the others report, so it needs neither torch nor the models' weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from gptailor.errors import UsageError
from gptailor.execution.mpi.messages import Hello
from gptailor.execution.node.placement import Place
from gptailor.run.layout import LOGS

if TYPE_CHECKING:
    from gptailor.config import Config
    from gptailor.models.family import Family

CLOCK_NOTE_S = 5.0
CLOCK_LIMIT_S = 300.0
"""Clock differences above these limits are reported, and refused."""

SHARED_LIMIT_S = 30.0
"""How long a file that one node writes may take to appear on another: NFS caches the contents of a
folder for that long."""

LIBRARIES = ("torch", "transformers", "lm_eval", "safetensors", "numpy")
"""The libraries that a score depends on."""


def find_hello(rank: int, place: Place) -> Hello:
    """The hello message of this process."""
    import gptailor

    package = Path(gptailor.__file__).resolve().parent
    versions = {name: _version(name) for name in ("gptailor", *LIBRARIES)}
    return Hello(rank, os.getpid(), place, versions, code_digest(package), str(package))


def check_alike(first: Hello, others: Sequence[Hello]) -> None:
    """Raises a `UsageError` if a rank runs a different gptailor or different libraries."""
    for other in others:
        for name, version in first.versions.items():
            if other.versions.get(name) != version:
                raise UsageError(
                    f"{name} {version} is installed for {first.name}, but "
                    f"{other.versions.get(name)} for {other.name}: give all nodes the same "
                    "environment."
                )
        if other.code != first.code:
            raise UsageError(
                f"gptailor's files differ: {first.package} of {first.name} has the digest "
                f"{first.code}, {other.package} of {other.name} has {other.code}: give all nodes "
                "the same environment."
            )


def code_digest(package: Path) -> str:
    """A digest of the names and contents of the Python files and the compiled extension."""
    digest = hashlib.sha256()
    files = [*package.rglob("*.py"), *package.glob("_C*.so")]
    for path in sorted(files, key=lambda path: path.relative_to(package).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def clock_difference(sent_at: float, theirs: float, received_at: float) -> float:
    """How far another clock is ahead, in seconds, allowing for the message's own travel time.

    Args:
        sent_at, received_at: Unix time here when the question was sent and the answer received.
        theirs: Unix time there, at some moment in between.
    """
    if theirs > received_at:
        return theirs - received_at
    return min(theirs - sent_at, 0.0)


def check_clocks(
    first: Hello, differences: Mapping[int, float], others: Sequence[Hello]
) -> list[str]:
    """Notes on clocks that differ.

    Args:
        first: the rank that asked.
        differences: rank → `clock_difference`.
        others: the ranks that were asked.

    Raises:
        UsageError: a clock is so wrong that times in logs and reports would be misleading.
    """
    notes: dict[str, str] = {}
    for other in others:
        difference = differences[other.rank]
        text = (
            f"the clock of {other.place.node} is {abs(difference):.0f} s "
            f"{'ahead of' if difference > 0 else 'behind'} that of {first.place.node}"
        )
        if abs(difference) > CLOCK_LIMIT_S:
            raise UsageError(f"{text[:1].upper()}{text[1:]}: sync both to the same time server.")
        if abs(difference) > CLOCK_NOTE_S:
            notes[other.place.node] = f"Note: {text}."
    return list(notes.values())


def write_token(run_folder: Path) -> Path:
    """Writes a file with a unique name in the run folder; the caller removes it.

    Raises:
        OSError: the folder can't be written to.
    """
    folder = run_folder / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".shared-{secrets.token_hex(8)}"
    with path.open("w") as file:
        file.write(path.name)
        file.flush()
        os.fsync(file.fileno())
    return path


def sees_token(
    path: Path, *, timeout_s: float = SHARED_LIMIT_S, go_on: Callable[[], bool] = lambda: True
) -> bool:
    """Whether the file of `write_token` can be read here; waits for a slow file system.

    Args:
        path: of the file.
        timeout_s: how long to wait.
        go_on: called between two attempts; False ends the waiting.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # noqa: PTH208  (makes NFS ask its server)
            if path.read_text() == path.name:
                return True
        if time.monotonic() >= deadline or not go_on():
            return False
        time.sleep(0.25)


def file_digests(config: Config, family: Family) -> dict[str, str]:
    """Digests of each model's file names, sizes and times, and of the calibration data.

    Raises:
        UsageError, ModelError: calibration data are missing or corrupt.
    """
    from gptailor.evaluation.family import find_calibration

    found: dict[str, object] = dict(family.fingerprint())
    calibration = find_calibration(config, family)
    if calibration is not None:
        found["calibration"] = calibration.digests
    return {name: _digest(json.dumps(what)) for name, what in found.items()}


def content_digests(config: Config, family: Family) -> dict[str, str]:
    """Like `file_digests`, but with samples of the weights instead of times: equal for copies."""
    from gptailor.models.calibration import weights_digest

    digests = file_digests(config, family)
    return digests | {
        name: weights_digest(candidate.tensors)[:16]
        for name, candidate in family.candidates.items()
    }


def first_difference(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """The first model whose digests differ."""
    return next((name for name in mine if mine[name] != theirs.get(name)), None)


def check_models(
    mine: Mapping[str, str], theirs: Mapping[str, str], first: Hello, other: Hello, config: Config
) -> None:
    """Raises a `UsageError` if a model is not the same on two nodes."""
    name = first_difference(mine, theirs)
    if name is None:
        return
    where = config.calibration if name == "calibration" else config.models.get(name)
    raise UsageError(
        f"{name} ({where}) is not the same everywhere: {mine[name]} for {first.name}, "
        f"{theirs.get(name)} for {other.name}: name a folder that all nodes share, or copy it "
        "again."
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
