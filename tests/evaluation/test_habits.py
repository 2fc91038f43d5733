"""Differences in how candidates read and generate are noted: recipes use the base's settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptailor.evaluation.family import open_family
from gptailor.evaluation.habits import habits
from tests.models.tiny import save_model

BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}  # fmt: skip


def put(name: str, **keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        data = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(data | keys))

    return change


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: None, ""),
    "another format": (put("tokenizer_config.json", model_max_length=7), ""),
    "licence": (lambda folder: (folder / "LICENSE").write_text("mine"), ""),
    "sampling": (put("generation_config.json", temperature=0.7, top_k=5, eos_token_id=2), ""),
    "same end": (put("generation_config.json", eos_token_id=2), ""),
    "template": (put("tokenizer_config.json", chat_template="{{ x }}"), "chat template"),
    "bos": (put("tokenizer.json", post_processor=BOS), "tokens of a text"),
    "end": (put("config.json", eos_token_id=3), "settings for generating (eos_token_id)"),
    "penalty": (
        put("generation_config.json", repetition_penalty=1.05, eos_token_id=[2, 3]),
        "settings for generating (eos_token_id, repetition_penalty)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_difference_is_named(tmp_path: Path, name: str) -> None:
    change, what = CHANGES[name]
    models = {n: str(save_model(tmp_path / n)) for n in ("base", "red", "green")}
    change(tmp_path / "red")
    found = habits(open_family(models, "base"))
    if not what:
        assert found == []
        return
    (note,) = found
    assert note == (
        f"red: its {what} differ from the base's, which are used for every score, so lm-eval may "
        "score it differently on its own."
    )
