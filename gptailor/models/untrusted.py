"""Reads small files of a model folder as untrusted input.

Before a byte is read, the file must be a regular one (a FIFO would block, a device never end) and
not too large; before JSON is parsed, its values must fit into memory. What was read goes into error
messages only through `shown`, whose output is always short and printable.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

from gptailor.errors import ModelError, UsageError, plain

MAX_CONFIG_BYTES = 10_000_000
MAX_TOKENIZER_BYTES = 200_000_000
"""Three times the largest known: XLM-V's tokenizer.json with a million tokens."""
MAX_JSON_CONTAINERS = 3_100_000
"""Lists and objects in one file; a million tensors need this many. Each takes 100 to 250 bytes."""
MAX_JSON_VALUES = 12_000_000
MAX_JSON_DEPTH = 100
MAX_CONFIG_COUNT = 1024

_POINTER = b"version https://git-lfs.github.com/spec/"
_COUNT = re.compile(r"layers?$|blocks$|experts$|^n_layer|depth$")

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 100
_shown.maxlist = _shown.maxtuple = 8


def shown(value: object) -> str:
    """A value for an error message: at most a few hundred characters, all printable."""
    return _shown.repr(value)


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading; never waits for the other end of a FIFO.

    Raises:
        OSError: it can't be opened.
        ModelError: it is a folder, a FIFO, a socket or a device.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(fd, "rb", buffering=0) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    if file is None:
        os.close(fd)
        raise ModelError(f"{path} is not a regular file.")
    return file


def read_bytes(path: Path, limit: int) -> bytes:
    """All bytes of a small file.

    Raises:
        ModelError: it is missing, not a regular file, larger than `limit` bytes, or a git-lfs
            pointer.
    """
    try:
        with open_regular(path) as file:
            n_bytes = os.fstat(file.fileno()).st_size
            data = b"" if n_bytes > limit else read_up_to(file, limit + 1)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist.") from None
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}.") from error
    if max(n_bytes, len(data)) > limit:
        raise ModelError(f"{path} is larger than the {limit:,} bytes allowed for such a file.")
    check_no_pointer(data, path)
    return data


def check_no_pointer(data: bytes, path: Path) -> None:
    """Raises a `ModelError` for the pointer that git leaves in place of a large file.

    Args:
        data: the beginning of the file, at least 8 bytes.
        path: the file.
    """
    if data and _POINTER.startswith(data[: len(_POINTER)]) and len(data) >= 8:
        raise ModelError(
            f"{path} is a git-lfs pointer, not the file itself: fetch the file with "
            "`git lfs pull`, or download the model again."
        )


def read_up_to(file: BinaryIO, n_bytes: int) -> bytes:
    """`n_bytes` bytes, or fewer if the file ends before."""
    data = bytearray()
    while piece := file.read(min(n_bytes - len(data), 1 << 24)):
        data += piece
    return bytes(data)


def is_file(path: Path) -> bool:
    """True if there is a regular file; False for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """True if there is a folder; False for names that no folder can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def home_expanded(ref: str) -> Path:
    """`ref` as a path, with `~` and `~user` replaced.

    Raises:
        UsageError: there is no such user, or the path is a loop of links.
    """
    try:
        path = Path(ref).expanduser()
        path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{plain(ref)} is not a valid path.") from error
    return path


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a small file of a model folder.

    Raises:
        ModelError: it can't be read, is too large, or is not a JSON object.
    """
    data = parse_json(read_bytes(path, limit), path, "it")
    check_depth(data, path)
    return data


def parse_json(raw: bytes, path: Path, what: str, *, unique: bool = False) -> dict[str, Any]:
    """Parses JSON.

    Args:
        raw: the text.
        path: the file, for errors.
        what: the part of the file, for errors.
        unique: duplicate keys are an error; otherwise the last one counts, as is usual.

    Raises:
        ModelError: it is not a JSON object, or has more values than any such file needs.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ModelError(f"{path} is corrupt: the key {shown(twice)} appears twice.")
        return result

    containers = raw.count(b"[") + raw.count(b"{")
    if containers > MAX_JSON_CONTAINERS or containers + raw.count(b",") > MAX_JSON_VALUES:
        raise ModelError(f"{path} is refused: {what} has more values than any model needs.")
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=checked if unique else None)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is corrupt: {what} is not valid JSON.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} is corrupt: {what} is not a JSON object.")
    return data


def check_depth(data: object, path: Path) -> None:
    """Raises a `ModelError` if values are nested too deeply for recursive code."""
    level = [data]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ModelError(f"{path} is refused: its values are nested more than {MAX_JSON_DEPTH} deep.")


def check_config(config: dict[str, Any], num_tensors: int, path: Path) -> None:
    """Refuses invalid text, and counts of modules that the weights can't have.

    Building a model from a config makes an object for each layer and expert before any weight is
    read, so a count of 10**12 would take all memory.

    Raises:
        ModelError: the config has such a value.
    """
    limit = max(MAX_CONFIG_COUNT, num_tensors)
    stack: list[tuple[str, object]] = [("", config)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict):
            for inner, child in value.items():
                check_text(inner, path)
                stack.append((inner, child))
        elif isinstance(value, list):
            stack.extend((key, child) for child in value if not isinstance(child, int))
        elif isinstance(value, str):
            check_text(value, path)
        elif isinstance(value, int) and value > limit and _COUNT.search(key):
            raise ModelError(
                f"{path} has {key} {shown(value)}, but the weights have {num_tensors} tensors."
            )


def check_text(text: str, path: Path) -> None:
    """Raises a `ModelError` for unpaired surrogates, which can't be written to a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ModelError(f"{path} is corrupt: {shown(text)} is not valid text.") from None


def check_link(path: Path) -> None:
    """Refuses a link that would copy some unrelated file of this machine into a result.

    Allowed are links to a file of the same name, as people make them, and those of the Hugging Face
    cache to its blobs.

    Raises:
        ModelError: the link leads to a file with another name.
    """
    target, folder = path.resolve(), path.parent.resolve()
    blobs = [place.parent.parent / "blobs" for place in (folder, folder.parent)]  # of subfolders
    if target.name != path.name and target.parent not in blobs:
        raise ModelError(
            f"{path} is a link to {target}, a file with another name, and is not copied: replace "
            "the link by the file itself."
        )
