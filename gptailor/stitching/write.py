"""The writer: turns a plan into a Hugging Face folder that stock tools can load.

Tensors that are not merged are copied as byte ranges inside the kernel; merged ones are computed
and written piece by piece, so memory stays constant however large the model is. `layout` decides
where everything goes, `copying` moves the bytes, and `folder` makes it all or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from gptailor.errors import ModelError
from gptailor.models.checkpoint import Checkpoint, read_error
from gptailor.models.family import Family
from gptailor.models.side_files import copy_side_file, has_tokenizer, side_files
from gptailor.recipe import Recipe
from gptailor.stitching.card import model_card
from gptailor.stitching.compute import ComputedTensor
from gptailor.stitching.copying import SharingProbe, WriteBack, copy, stored_bytes, write_all
from gptailor.stitching.folder import check_out, check_space, new_folder
from gptailor.stitching.layout import (
    BLOCK,
    MAX_SHARD_SIZE,
    Range,
    Shard,
    index_text,
    lay_out,
    parse_size,
)
from gptailor.stitching.patch import Patch
from gptailor.stitching.plan import Plan, make_plan

RECIPE_FILE = "gptailor_recipe.yaml"


def write_model(
    recipe: Recipe,
    family: Family,
    out: str | Path,
    *,
    notes: str = "",
    threads: int = 0,
    sync: bool = True,
    max_shard_size: str = MAX_SHARD_SIZE,
    test: Callable[[Path], object] | None = None,
    patch: Patch | None = None,
) -> Plan:
    """Writes the model that a recipe describes.

    Args:
        recipe: the recipe to build.
        family: the opened candidates, under the recipe's names.
        out: the folder to make; it must not exist.
        notes: Markdown for the model card, for example scores.
        threads: for merging; 0 for as many as there are cores.
        sync: flush everything to the disk before the folder gets its name.
        max_shard_size: the largest size of a weight file, unless a single tensor is larger; like
            5GB or 500MiB.
        test: called with the complete folder before it gets its name; raises if it is unusable.
        patch: the weights of the recipe's repair; needed if it has one.

    Returns:
        The plan that was followed.

    Raises:
        UsageError: `out` exists or is an input, or the recipe does not fit the models.
        ModelError: a source is unusable, or changed in the meantime.
        ResourceError: the folder can't be written, for example because the disk is full.
    """
    out = Path(out)
    max_bytes = parse_size(max_shard_size)
    check_out(out, family)
    if not has_tokenizer(family.base.folder):
        raise ModelError(
            f"The base {family.base.folder} has no tokenizer: copy tokenizer.json and "
            "tokenizer_config.json there."
        )
    if (recipe.repair is None) != (patch is None):
        raise ValueError("a recipe with a repair needs its weights, and no other recipe has any")
    plan = make_plan(recipe, family, patch)
    family.base.check_result(plan.config, [(t.name, t.dtype, t.shape) for t in plan.tensors])
    with new_folder(out, sync, test) as folder:
        can_share = SharingProbe(folder)
        shards = lay_out(plan.tensors, max_bytes, can_share)
        sources = _Sources(family, patch)
        check_space(folder, plan.n_bytes - _spared(shards, sources, can_share))
        write_shards(shards, family, folder, threads=threads, flush=sync, patch=patch)
        for name in side_files(family.base.folder):
            copy_side_file(family.base.folder / name, folder / name)
        texts = {
            "config.json": json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n",
            RECIPE_FILE: recipe.to_yaml(),
            "README.md": model_card(recipe, family, notes, "" if patch is None else patch.notes),
        }
        if len(shards) > 1:
            texts["model.safetensors.index.json"] = index_text(shards)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        family.check_intact()
    return plan


def write_shards(
    shards: Sequence[Shard],
    family: Family,
    folder: Path,
    *,
    threads: int = 0,
    flush: bool = False,
    patch: Patch | None = None,
) -> None:
    """Writes the weight files into `folder`.

    Args:
        shards: the files to write.
        family: the candidates with the sources.
        folder: the destination.
        threads: for merging; 0 for as many as there are cores.
        flush: start write-back at once, because fsync will follow.
        patch: a file with other sources.

    Raises:
        ModelError: a source has changed, can't be read, or is to be merged and holds NaN.
        OSError: the files can't be written, for example because the disk is full.
    """
    sources = _Sources(family, patch)
    for shard in shards:
        with (folder / shard.name).open("xb", buffering=0) as file:
            fd = file.fileno()
            file.truncate(shard.n_bytes)  # so that holes of a source need not be written
            write_all(fd, memoryview(shard.header), 0)
            write_back = WriteBack(flush)

            def written(
                offset: int, n_bytes: int, fd: int = fd, begin: WriteBack = write_back
            ) -> None:
                begin(fd, offset, n_bytes)

            try:
                for part in shard.copies:
                    source = sources.checkpoint(part)
                    try:
                        copy(source.file(part.path), part, fd, written)
                    except OSError as error:
                        source.check_intact()  # a change is the more likely reason
                        if error.filename is None:
                            raise
                        raise read_error(error) from error
                for tensor, offset in zip(shard.tensors, shard.offsets, strict=False):
                    if not tensor.is_copy and tensor.n_bytes:
                        ComputedTensor(tensor, family, threads).write(fd, offset)
                        written(offset, tensor.n_bytes)
            finally:
                write_back.finish()


class _Sources:
    """The checkpoint of each source file."""

    def __init__(self, family: Family, patch: Patch | None = None) -> None:
        checkpoints = [candidate.checkpoint for candidate in family.candidates.values()]
        self._by_path = {path: c for c in checkpoints for path in c.files}
        if patch is not None:
            family.base.checkpoint.add_file(patch.path)
            self._by_path[patch.path] = family.base.checkpoint

    def checkpoint(self, part: Range) -> Checkpoint:
        return self._by_path[part.path]


def _spared(shards: Sequence[Shard], sources: _Sources, can_share: SharingProbe) -> int:
    """Bytes that take no disk space: holes, and whole blocks that are shared with a source."""
    spared = 0
    for part in (part for shard in shards for part in shard.copies):
        if can_share(part.path) and (part.offset - part.out_offset) % BLOCK == 0:
            first, last = -(-part.offset // BLOCK), (part.offset + part.n_bytes) // BLOCK
            spared += max(0, last - first) * BLOCK
        else:
            file = sources.checkpoint(part).file(part.path)
            spared += part.n_bytes - stored_bytes(file, part)
    return spared
