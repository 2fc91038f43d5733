"""The dtype in which a run's evaluations are computed: chosen when it begins, kept until it ends.

Scores in different dtypes can't be compared, so a run keeps its choice when it is resumed on
another machine, and all islands share the first one's. It is stored as `evaluation.dtype` in the
archive's configuration; before an island has an archive, in the run folder that all islands see.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from gptailor.config import Config, read_config
from gptailor.evaluation.footprint import held_bytes
from gptailor.evaluation.forward_dtype import Ability, Choice, choose
from gptailor.models.family import Family
from gptailor.recipe import DTYPES
from gptailor.run.archive import Archive
from gptailor.run.config_difference import dtype_of
from gptailor.run.layout import ARCHIVE, CONFIG, DTYPE, ISLANDS


def choose_dtype(
    config: Config, family: Family, place: Path, abilities: Sequence[Ability], *, is_island: bool
) -> Choice:
    """Chooses the dtype in which this run is computed.

    Args:
        config: of the search; `evaluation.dtype` may be "auto".
        family: the candidates.
        place: the folder of the archive, which need not exist yet.
        abilities: of the workers.
        is_island: whether other searches of the run may choose at the same time.

    Raises:
        UsageError: the archive, or the configuration in the run folder, can't be read.
    """
    wanted, recipes = config.evaluation.dtype, config.space.dtype
    held = held_bytes(family)
    shared = Path(config.output) / ISLANDS / DTYPE if is_island else None
    kept = _of_archive(place)
    if shared and kept is None:
        kept = _of_run(Path(config.output)) or _read(shared, config)
    choice = choose(wanted, recipes, abilities, held, kept)
    if shared and kept is None and wanted == "auto":
        first = _publish(shared, config, choice.dtype)
        if first != choice.dtype:
            return choose(wanted, recipes, abilities, held, first)
    return choice


def _of_archive(place: Path) -> str | None:
    """The dtype of a run that has begun."""
    if not (place / ARCHIVE).is_file():
        return None
    with Archive(place, readonly=True) as archive:
        text = archive.get_meta("config")
    return None if text is None else dtype_of(json.loads(text))


def _of_run(run: Path) -> str | None:
    """The dtype of a run with islands, at least one of which has begun."""
    path = run / CONFIG
    return dtype_of(read_config(path).model_dump()) if path.is_file() else None


def _read(path: Path, config: Config) -> str | None:
    """What another island chose for the same recipes and device."""
    with contextlib.suppress(OSError, ValueError):
        data = json.loads(path.read_text())
        if isinstance(data, dict) and _key(config).items() <= data.items():
            return data.get("dtype") if data.get("dtype") in DTYPES else None
    return None


def _publish(path: Path, config: Config, dtype: str) -> str:
    """Publishes the choice unless another island was first; returns the choice that counts.

    A choice that can't be written is not binding; the islands' journals are compared anyway.
    """
    temporary = path.with_name(f".{DTYPE}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**_key(config), "dtype": dtype}) + "\n")
        for _ in range(3):
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(temporary)  # unlike a rename, it never replaces another's file
            found = _read(path, config)
            if found is not None:
                return found
            path.unlink(missing_ok=True)  # left by a run that never began: other device, or torn
        return dtype
    except OSError:
        return dtype
    finally:
        temporary.unlink(missing_ok=True)


def _key(config: Config) -> dict[str, str]:
    return {"recipes": config.space.dtype, "device": config.evaluation.device}
