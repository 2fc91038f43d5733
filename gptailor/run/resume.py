"""Checks whether a run may be resumed: models, documents, configuration, islands or not.

All of this is written down when a run begins, and compared each time it is resumed.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from gptailor.config import Config, read_config
from gptailor.errors import UsageError
from gptailor.evaluation.family import find_calibration
from gptailor.models.family import Family
from gptailor.run.archive import Archive
from gptailor.run.config_difference import config_difference, with_repair_known
from gptailor.run.island_folder import island_numbers
from gptailor.run.layout import ARCHIVE, CONFIG, ISLANDS
from gptailor.strict_yaml import load_yaml, read_text


def check_resumable(archive: Archive, config: Config, family: Family, documents: str) -> None:
    """Records what a new run uses, or compares that with the record of an existing run.

    Only the number of evaluations, the batch size and `candidates_gib` may change between the parts
    of a run; another batch size can change the last bits of a score.

    Raises:
        UsageError: configuration, weights or documents differ from those of the run, or its
            control arms are not the models that they name.
    """
    fingerprint = family.fingerprint()
    calibration = find_calibration(config, family)
    if calibration is not None:
        fingerprint["calibration"] = calibration.digests
    now = {
        "config": config.model_dump_json(),
        "fingerprint": json.dumps(fingerprint),
        "documents": documents,
    }
    before = {key: archive.get_meta(key) for key in now}
    old_config = before["config"]
    if old_config is None:
        _begin(archive, family, now)
        return
    difference = config_difference(json.loads(old_config), json.loads(now["config"]))
    if difference:
        raise _is_another(archive.folder, difference)
    for key, what in (("fingerprint", "the model files"), ("documents", "the tasks' documents")):
        if before[key] != now[key]:
            raise UsageError(
                f"The run in {archive.folder} can't be resumed, because {what} changed since it "
                "began: name another output."
            )
    if archive.get_meta("ends") is None and not family.ends.are_equal:
        raise UsageError(
            f"The run in {archive.folder} was begun by a version that gave all recipes, including "
            "control arms, the base's embeddings and head, but those of the candidates differ: "
            "name another output."
        )
    archive.set_meta("config", now["config"])


def _begin(archive: Archive, family: Family, made_of: dict[str, str]) -> None:
    """Records what a new run uses."""
    rows = {
        name: next((c.tensors[tensor].shape[0] for tensor in family.uneven), None)
        for name, c in family.candidates.items()
    }
    description = {
        "num_layers": family.num_layers,
        "models": {name: str(c.folder) for name, c in family.candidates.items()},
        "parameters": {name: family.parameters(rows=number) for name, number in rows.items()},
    }
    archive.set_meta("family", json.dumps(description))
    archive.set_meta("ends", json.dumps(asdict(family.ends)))
    for key, value in reversed(made_of.items()):  # "config" comes last: it marks a run as begun
        archive.set_meta(key, value)


def check_config_file(run: Path, config: Config) -> None:
    """Compares a configuration with the one in the run folder, if there is one.

    Raises:
        UsageError: the run searches something else; the message names the difference.
    """
    path = run / CONFIG
    if not path.is_file():
        return
    recorded = read_config(path)
    if began_without_repair(path):
        recorded = recorded.without_repair()
    different = config_difference(
        json.loads(recorded.model_dump_json()), json.loads(config.model_dump_json())
    )
    if different:
        raise _is_another(run, different)


def began_without_repair(path: Path) -> bool:
    """Whether a run's config.yaml says that nothing is repaired, or, being older, says nothing."""
    if not path.is_file():
        return False
    data = load_yaml(read_text(path), str(path))
    stored = data if isinstance(data, dict) else {}
    return with_repair_known(stored)["space"]["repair"] is False


def check_kind(run: Path, *, has_islands: bool) -> None:
    """Refuses to resume a run without islands as an island, and the other way round.

    Raises:
        UsageError: the run is of the other kind.
    """
    if has_islands and (run / ARCHIVE).exists():
        raise UsageError(
            f"{run} holds a run without islands: continue it without --island, or name another "
            "output."
        )
    if not has_islands and island_numbers(run / ISLANDS):
        raise UsageError(
            f"{run} holds a run with islands: continue it with --island I/K, or name another "
            "output."
        )


def _is_another(run: Path, difference: str) -> UsageError:
    return UsageError(
        f"The run in {run} was started with another configuration: {difference}. "
        "Only search.evaluations, evaluation.batch_size and evaluation.candidates_gib may "
        "change; name another output for the rest."
    )
