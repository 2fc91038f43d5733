"""A run stores what it was made from, and compares that on resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptailor.config import parse_config
from gptailor.errors import UsageError
from gptailor.models.family import Family
from gptailor.run.archive import Archive
from gptailor.run.resume import check_resumable
from tests.models.tiny import VOCAB, llama_tensors, save_family, save_model


def begin(archive: Archive, models: dict[str, str]) -> None:
    config = parse_config({"models": models, "base": "base", "evaluation": {"tasks": ["t"]}}, "t")
    check_resumable(archive, config, Family(models, "base"), "documents")


def forget_ends(archive: Archive) -> None:
    """Like archives of versions that gave every recipe the base's embeddings and head."""
    archive._db.execute("DELETE FROM meta WHERE key = 'ends'")
    archive._db.commit()


def test_an_old_run_continues_if_all_have_the_same_ends(tmp_path: Path) -> None:
    same = {n: t for n, t in llama_tensors("base").items() if ".layers." not in n}
    models = save_family(tmp_path, ["base"]) | save_family(tmp_path, ["red"], tensors=same)
    with Archive(tmp_path / "run") as archive:
        begin(archive, models)
        forget_ends(archive)
        begin(archive, models)


def test_an_old_run_with_wrongly_named_arms_is_refused(tmp_path: Path) -> None:
    models = save_family(tmp_path, ["base", "red"])
    with Archive(tmp_path / "run") as archive:
        begin(archive, models)
        begin(archive, models)
        forget_ends(archive)
        with pytest.raises(UsageError, match=r"embeddings and head, but .* differ: name"):
            begin(archive, models)


def test_each_candidate_has_its_own_size(tmp_path: Path) -> None:
    models = save_family(tmp_path, ["base"])
    models["more"] = str(save_model(tmp_path / "more", vocab=VOCAB + 4))
    with Archive(tmp_path / "run") as archive:
        begin(archive, models)
        sizes = json.loads(archive.get_meta("family") or "")["parameters"]
    for name, folder in models.items():
        tensors = Family({name: folder}, name).base.tensors.values()
        assert sizes[name] == sum(t.n_elements for t in tensors)
