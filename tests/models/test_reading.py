"""Plain models are read by tensor names alone, with the same result as transformers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from gptailor.evaluation.lazy_reader import LazyReader
from gptailor.evaluation.structure import Structure
from gptailor.models.checkpoint import Checkpoint
from gptailor.models.reading import PLAIN_TYPES, plain_reading
from tests.models.real import save_real


def opened(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    return Checkpoint(folder), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("model_type", PLAIN_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_plain_types_are_read_as_transformers_reads_them(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    folder = save_real(tmp_path / "m", model_type, tie_word_embeddings=tied)
    checkpoint, config = opened(folder)
    plain, asked = plain_reading(checkpoint, config), LazyReader().read(checkpoint, config)
    assert plain is not None and plain.is_plain
    assert (plain.is_tied, plain.ignored, plain.unties) == (tied, asked.ignored, asked.unties)
    structure = Structure(folder, config, checkpoint.tensors)
    assert structure.is_uniform  # no cut changes a layer
    for layers in itertools.permutations(range(4), 2):
        assert (
            structure.cut(layers).config == LazyReader().cut_config(checkpoint, config, layers)[0]
        )


@pytest.mark.parametrize(
    ("keys", "raw"),
    [
        ({"attention_bias": True}, {}),  # tensors that only some models have
        ({}, {"num_hidden_layers": 3}),
        ({}, {"num_hidden_layers": "4"}),
        ({}, {"tie_word_embeddings": "yes"}),
        ({}, {"model_type": "qwen3"}),
    ],
)
def test_unusual_configs_are_not_plain(
    keys: dict[str, Any], raw: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_real(tmp_path / "m", "llama", raw=raw, **keys)
    assert plain_reading(*opened(folder)) is None
