"""Finds out why a search would fail: `check` lists all problems, a search stops at the first.

Both call the functions in this module, so they can't disagree.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptailor.errors import GptailorError, ModelError, ResourceError, UsageError
from gptailor.evaluation.family import open_family
from gptailor.models.candidate import Candidate
from gptailor.models.family import Family, resolve
from gptailor.patience import slowly
from gptailor.run.layout import ARCHIVE

if TYPE_CHECKING:
    from gptailor.config import Config

FEW = 8
"""How many documents of each task `check` makes requests for: those most likely to be refused."""


def check(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    fast: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Returns the reasons why a search would fail; evaluates nothing and reads no weights.

    The base model is built without weights, and the tasks are loaded: lm-eval's own tasks download
    their datasets. Models that are not local folders are downloaded first.

    Args:
        config: a `search.yaml`.
        overrides: `key.path=value`.
        resume: check for `search --resume`: the output may hold a run.
        fast: skip what takes more than a second or two: the model, the tasks' data.
        note: takes what the user should know about the models.

    Raises:
        UsageError: the configuration itself is wrong.
    """
    from gptailor.config import read_config
    from gptailor.verbs.as_begun import as_begun

    parsed = read_config(config, overrides)
    problems: list[str] = []
    try:
        check_place(as_begun(parsed), resume)
    except GptailorError as error:
        problems.append(str(error))
    return problems + find_problems(parsed, fast=fast, note=note)


def find_problems(
    config: Config, *, fast: bool = False, note: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Returns what is wrong with models, space and tasks; see `check`."""
    problems: list[str] = []
    family = None
    try:
        with slowly(f"Opening {len(config.models)} candidates", note):
            family = _checked_family(config, problems)
    except GptailorError as error:
        problems.append(str(error))
    for text in (*config.notes, *(family.notes if family is not None else ())):
        note(text)
    if family is not None:
        _note_dtype(config, family, fast, note)
    wrong_names = _unknown_tasks(config)
    problems += wrong_names
    if family is not None and not wrong_names and not fast:
        from gptailor.evaluation.dry_run import DryRun
        from gptailor.evaluation.habits import habits

        _note_device(config, note)
        try:
            for text in habits(family):
                note(text)
            with slowly("Loading the tasks", note):
                DryRun(config, family, few=FEW)
        except GptailorError as error:
            problems.append(str(error))
    return problems


def check_place(config: Config, resume: bool, island: tuple[int, int] | None = None) -> Path:
    """Checks that a search may write its archive, and returns its folder; creates nothing.

    Raises:
        UsageError: there is a run already, one of another kind or configuration, or a file.
        ResourceError: the folder can't be written.
    """
    from gptailor.run.island_folder import island_folder
    from gptailor.run.resume import check_config_file, check_kind

    output = Path(config.output)
    place = output if island is None else island_folder(output, island[0])
    check_kind(output, has_islands=island is not None)
    has_begun = (place / ARCHIVE).exists()
    if has_begun and not resume:
        raise UsageError(
            f"{place} already holds a run: continue it with --resume, or name another output."
        )
    if has_begun or island is not None:
        check_config_file(output, config)
    check_writable(place)
    return place


def check_space(config: Config, family: Family) -> None:
    """Raises unless the space fits the family and its layers can be cut."""
    from gptailor.evaluation.family import find_calibration
    from gptailor.search.space import SearchSpace

    find_calibration(config, family)
    space = SearchSpace(config.space, config.models, config.base, family.num_layers)
    if space.min_layers < family.num_layers:
        family.base.check_bears_cut()


def _checked_family(config: Config, problems: list[str]) -> Family | None:
    """The opened candidates; None if one is unusable, for which `problems` gets the reason."""
    from gptailor.evaluation.lazy_reader import LazyReader
    from gptailor.models.side_files import has_tokenizer

    before, reader = len(problems), LazyReader()
    for name, ref in config.models.items():
        try:
            candidate = Candidate(name, resolve(ref), reader=reader)
        except GptailorError as error:
            problems.append(str(error))
            continue
        if name == config.base and not has_tokenizer(candidate.folder):
            problems.append(str(ModelError(f"The base {candidate.folder} has no tokenizer.")))
    if len(problems) > before:
        return None
    family = open_family(config.models, config.base)
    check_space(config, family)
    return family


def _note_device(config: Config, note: Callable[[str], None]) -> None:
    """Notes that this machine has no such GPU; the one that runs the search may have it."""
    from gptailor.evaluation.devices import pick_device

    try:
        pick_device(config.evaluation.device)
    except UsageError as error:
        note(f"Not on this machine: {error}")


def _note_dtype(config: Config, family: Family, fast: bool, note: Callable[[str], None]) -> None:
    """Notes that this machine is slow at the requested dtype, if it would be used."""
    from gptailor.evaluation.footprint import held_bytes
    from gptailor.evaluation.forward_dtype import choose, find_ability

    evaluation = config.evaluation
    if evaluation.dtype == "auto" or (fast and evaluation.device == "auto"):
        return  # torch takes a while to find out whether there is a GPU
    ability = find_ability(evaluation.device)
    choice = choose(evaluation.dtype, config.space.dtype, [ability], held_bytes(family))
    if choice.is_slow:
        note(choice.sentence)


def _unknown_tasks(config: Config) -> list[str]:
    from gptailor.evaluation.tasks import unknown_tasks

    evaluation = config.evaluation
    holdout = evaluation.holdout.tasks if evaluation.holdout else ()
    try:
        return [
            str(error)
            for specs in (evaluation.tasks, holdout)
            for error in unknown_tasks(specs, evaluation.include_path)
        ]
    except UsageError as error:
        return [str(error)]


def check_writable(place: Path) -> None:
    """Checks by writing to the nearest existing folder, since permissions don't tell everything.

    Raises:
        UsageError: a file is where a folder should be.
        ResourceError: the run folder can't be written.
    """
    for folder in (place, *place.absolute().parents):
        if folder.is_dir():
            try:
                with tempfile.TemporaryDirectory(prefix=".gptailor-", dir=folder):
                    return
            except OSError as error:
                raise ResourceError(
                    f"The run folder {place} can't be written: {folder}: {error.strerror}."
                ) from error
        if folder.exists() or folder.is_symlink():
            raise UsageError(f"The run folder {place} can't be made: {folder} is not a folder.")
