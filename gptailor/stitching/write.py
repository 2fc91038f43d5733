"""The writer: a plan becomes a Hugging Face folder that stock tools load.

Tensors that are not merged are copied as byte ranges inside the kernel, merged ones are computed
slice by slice from the mappings, so memory stays flat however large the model is. The folder is
written beside its place and renamed when it is whole; whatever goes wrong before leaves nothing.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gptailor.errors import GptailorError, ModelError, ResourceError, UsageError
from gptailor.models.family import TOKENIZER_FILES, Family, has_tokenizer
from gptailor.models.untrusted import MAX_TOKENIZER_BYTES, check_link, is_file, read_bytes
from gptailor.recipe import Recipe
from gptailor.stitching.card import model_card
from gptailor.stitching.compute import ComputedTensor
from gptailor.stitching.plan import OutTensor, Plan, make_plan

RECIPE_FILE = "gptailor_recipe.yaml"

_SLICE_ELEMENTS = 8 << 20
_PAGE = 4096
_TAG_ALONG = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


@dataclass(frozen=True)
class Range:
    """Bytes that are copied as they are: [offset, offset + n_bytes) of `path` to `out_offset`."""

    path: Path
    offset: int
    out_offset: int
    n_bytes: int


def write_model(
    recipe: Recipe,
    family: Family,
    out: str | Path,
    *,
    notes: str = "",
    threads: int = 0,
    sync: bool = True,
) -> Plan:
    """Writes the model that a recipe describes.

    Args:
        recipe: what to build.
        family: the opened candidates, by the recipe's names.
        out: the folder to make; it must not exist.
        notes: Markdown for the model card, for example scores.
        threads: for merging; 0 for as many as there are cores.
        sync: flush everything to the disk before the folder gets its name.

    Returns:
        The plan that was followed.

    Raises:
        UsageError: `out` exists or is an input, or the recipe does not fit the models.
        ModelError: a source is unusable.
        ResourceError: the disk is full or refuses.
    """
    out = Path(out)
    _check_out(out, family)
    if not has_tokenizer(family.base.folder):
        raise ModelError(
            f"The base {family.base.folder} has no tokenizer: copy tokenizer.json and "
            "tokenizer_config.json there."
        )
    plan = make_plan(recipe, family)
    with _new_folder(out, sync) as folder:
        _check_space(folder, plan.n_bytes)
        write_tensors(plan, family, folder / "model.safetensors", threads=threads)
        for name in (*TOKENIZER_FILES, *_TAG_ALONG):
            _copy_small(family.base.folder / name, folder / name)
        texts = {
            "config.json": json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n",
            RECIPE_FILE: recipe.to_yaml(),
            "README.md": model_card(recipe, family, notes),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return plan


def _copy_small(source: Path, target: Path) -> None:
    """Copies a file that is there; not what a link of a false name leads to, and nothing huge."""
    if is_file(source):
        check_link(source)
        target.write_bytes(read_bytes(source, MAX_TOKENIZER_BYTES))


def write_tensors(plan: Plan, family: Family, path: Path, *, threads: int = 0) -> None:
    """Writes the plan's tensors as one safetensors file; raises OSError on a full disk."""
    from gptailor import _C

    header, offsets = _header(plan.tensors)
    with path.open("xb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(header), 0)
        sources: dict[Path, BinaryIO] = {}
        try:
            for part in coalesced(plan.tensors, offsets):
                if part.path not in sources:
                    sources[part.path] = _opened(part.path)
                _C.copy_range(
                    sources[part.path].fileno(),
                    part.offset,
                    file.fileno(),
                    part.out_offset,
                    part.n_bytes,
                )
        finally:
            for source in sources.values():
                source.close()
        _write_computed(plan, offsets, family, file, threads)
        if file.seek(0, os.SEEK_END) < offsets[-1]:
            file.truncate(offsets[-1])  # only when the last tensors have no bytes


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}.") from error


def coalesced(tensors: tuple[OutTensor, ...], offsets: list[int]) -> list[Range]:
    """The plain copies among `tensors`, neighbours in source and result joined to one range."""
    ranges: list[Range] = []
    for tensor, out_offset in zip(tensors, offsets, strict=False):
        if not tensor.is_copy or tensor.n_bytes == 0:
            continue
        info = tensor.sources[0].info
        last = ranges[-1] if ranges else None
        if (
            last is not None
            and last.path == info.path
            and last.offset + last.n_bytes == info.offset
            and last.out_offset + last.n_bytes == out_offset
        ):
            joined = last.n_bytes + info.n_bytes
            ranges[-1] = Range(last.path, last.offset, last.out_offset, joined)
        else:
            ranges.append(Range(info.path, info.offset, out_offset, info.n_bytes))
    return ranges


def _write_computed(
    plan: Plan, offsets: list[int], family: Family, file: BinaryIO, threads: int
) -> None:
    from gptailor import _C

    computed = [
        (tensor, offset)
        for tensor, offset in zip(plan.tensors, offsets, strict=False)
        if not tensor.is_copy
    ]
    if not computed:
        return
    largest = max(min(t.n_bytes, 4 * _SLICE_ELEMENTS) for t, _ in computed)
    buffer = _C.Buffer(max(largest, 1))
    view = memoryview(buffer)
    for tensor, offset in computed:
        job = ComputedTensor(tensor, family, threads)
        size = tensor.n_bytes // max(job.n_elements, 1)
        for begin in range(0, job.n_elements, _SLICE_ELEMENTS):
            count = min(_SLICE_ELEMENTS, job.n_elements - begin)
            job.run(begin, count, buffer)
            _write_all(file.fileno(), view[: count * size], offset + begin * size)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _header(tensors: tuple[OutTensor, ...]) -> tuple[bytes, list[int]]:
    """The header's bytes, and the offset in the file of each tensor, then of the end."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, relative = 0, []
    for tensor in tensors:
        relative.append(position)
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.n_bytes],
        }
        position += tensor.n_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    begin = _data_begin(tensors, relative, 8 + len(text))
    text += b" " * (begin - 8 - len(text))
    offsets = [begin + offset for offset in (*relative, position)]
    return len(text).to_bytes(8, "little") + text, offsets


def _data_begin(tensors: tuple[OutTensor, ...], relative: list[int], least: int) -> int:
    """Where the data begins: at least at `least`, a multiple of 8.

    Copies are fastest where source and result have the same place within a page, so the header is
    padded (the format allows spaces) until that is so for as many copied bytes as can be.
    """
    shifts: Counter[int] = Counter()
    for tensor, offset in zip(tensors, relative, strict=True):
        if tensor.is_copy:
            shifts[(tensor.sources[0].info.offset - offset) % _PAGE] += tensor.n_bytes
    shift = max(shifts, key=lambda s: (shifts[s], -s), default=0)
    if shift % 8:
        return least + -least % 8
    return least + (shift - least) % _PAGE


def _check_out(out: Path, family: Family) -> None:
    place = out.resolve()
    for candidate in family.candidates.values():
        if place == candidate.folder.resolve() or place in candidate.folder.resolve().parents:
            raise UsageError(f"The output {out} is also an input ({candidate.name}).")
        if candidate.folder.resolve() in place.parents:
            raise UsageError(f"The output {out} lies inside an input ({candidate.folder}).")
    if out.exists() or out.is_symlink():
        raise UsageError(f"The output {out} exists already: name a folder that does not.")


def _check_space(folder: Path, n_bytes: int) -> None:
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if free < n_bytes:
        raise ResourceError(
            f"The disk of {folder.parent} has {free / 1e9:.2f} GB free, but the model needs "
            f"{n_bytes / 1e9:.2f} GB: free space or name another output."
        )


@contextmanager
def _new_folder(out: Path, sync: bool) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if all goes well, and vanishes if not."""
    marker = f".{out.name}.tmp-{socket.gethostname()}-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f"{glob.escape(marker)}*"):
            pid = stale.name.removeprefix(marker)
            # our own number: a dead process had it before, as it happens in containers
            if pid == str(os.getpid()) or (pid.isdigit() and not Path(f"/proc/{pid}").exists()):
                shutil.rmtree(stale, ignore_errors=True)
        folder = out.parent / f"{marker}{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise ResourceError(f"{out.parent} can't be written: {error.strerror}.") from error
    try:
        yield folder
        if sync:
            for path in [*folder.iterdir(), folder]:
                _fsync(path)
        folder.rename(out)
        if sync:
            _fsync(out.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, GptailorError):
            raise _explained(error, out) from error
        raise


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explained(error: OSError, out: Path) -> GptailorError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"The disk of {out} is full: nothing was left behind; free space.")
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return UsageError(f"The output {out} appeared while it was written: nothing was replaced.")
    return ResourceError(f"{out} can't be written: {error.strerror or error}.")
