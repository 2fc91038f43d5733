"""Text that a model writes itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptailor.errors import ModelError, ResourceError
from gptailor.evaluation import own_text
from gptailor.evaluation.family import open_family
from gptailor.evaluation.own_text import write_own_text
from gptailor.evaluation.text import read_documents
from gptailor.models.family import Family
from gptailor.recipe import Recipe, Take


@pytest.fixture
def family(models: dict[str, str]) -> Family:
    return open_family({"base": models["base"]}, "base")


@pytest.fixture
def writer(models: dict[str, str], family: Family) -> Recipe:
    layers = tuple(Take("base", i) for i in range(family.num_layers))
    return Recipe({"base": models["base"]}, "base", layers, "base", "base")


def written(writer: Recipe, family: Family, count: int) -> list[str]:
    return write_own_text(writer, family, count, dtype="float32", device="cpu")


def test_pieces_are_different_and_the_same_each_time(writer: Recipe, family: Family) -> None:
    state = torch.random.get_rng_state()
    pieces = written(writer, family, 3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(set(pieces)) == 3
    assert written(writer, family, 3) == pieces


def test_pieces_are_as_long_as_asked_for(
    writer: Recipe, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family.base.folder)
    for length in (16, 40):
        monkeypatch.setattr(own_text, "LENGTH", length)
        for piece in written(writer, family, 2):
            count = len(tokenizer(piece, add_special_tokens=False).input_ids)
            assert 0.5 * length < count < 1.5 * length  # special tokens are left out


def test_text_is_the_models_own(models: dict[str, str], writer: Recipe, family: Family) -> None:
    """It finds it likelier than the same tokens in another order."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    tokens = [tokenizer(p, return_tensors="pt").input_ids for p in written(writer, family, 8)]
    generator = torch.Generator().manual_seed(0)

    def loss(ids: torch.Tensor) -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    own = sum(map(loss, tokens)) / len(tokens)
    mixed = [ids[:, torch.randperm(ids.shape[1], generator=generator)] for ids in tokens]
    assert own < sum(map(loss, mixed)) / len(mixed)


def test_out_of_memory_is_one_sentence(
    writer: Recipe, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, kind, text in (
        (MemoryError(), ResourceError, "Out of memory while a model wrote a text"),
        (torch.OutOfMemoryError("CUDA out of memory"), ResourceError, "Out of memory"),
        (RuntimeError("expected scalar type"), ModelError, "can't write a text for the repair"),
    ):

        def fail(*args: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(own_text, "ResidentModel", lambda *a, f=fail, **k: f())
        with pytest.raises(kind, match=text):
            written(writer, family, 1)


def test_a_text_can_be_read_again(writer: Recipe, family: Family, tmp_path: Path) -> None:
    pieces = written(writer, family, 4)
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": piece, "by": "base"}) + "\n" for piece in pieces))
    assert read_documents(path) == [piece for piece in pieces if piece.strip()]
