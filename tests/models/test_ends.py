"""Candidates with the same embeddings or the same head are found by comparing values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gptailor.models import ends
from gptailor.models.ends import Ends
from gptailor.models.family import Family
from tests.models.tiny import (
    HIDDEN,
    VOCAB,
    Entry,
    encoded,
    floats,
    llama_tensors,
    save_model,
)

TOKENS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
START = llama_tensors("base", tied=False)


def changed(name: str, *at: int, dtype: str = "BF16") -> dict[str, Entry]:
    """The base's tensor in this dtype, with one element changed if `at` is given."""
    values = floats(START[name]).copy()
    if at:
        values[at] += 1.0
    return {name: (dtype, values.shape, encoded(values, dtype))}


def found(root: Path, **candidates: dict[str, Entry]) -> Ends:
    """Ends of candidates with their own layers, and the base's ends except for these tensors."""
    same = {name: START[name] for name in (TOKENS, NORM, HEAD)}
    models = {"base": str(save_model(root / "base", tied=False))}
    for name, tensors in candidates.items():
        models[name] = str(save_model(root / name, tied=False, tensors=same | tensors))
    return Family(models, "base").ends


def test_differences_are_found_for_each_end(tmp_path: Path) -> None:
    last = VOCAB - 1, HIDDEN - 1
    ends = found(
        tmp_path,
        same={},
        tokens=changed(TOKENS, *last),
        norm=changed(NORM, 3),
        head=changed(HEAD, *last),
        again=changed(TOKENS, *last),
    )
    assert ends.embeddings == {
        "base": "base", "same": "base", "tokens": "tokens", "norm": "base", "head": "base",
        "again": "tokens",
    }  # fmt: skip
    assert ends.head == {
        "base": "base", "same": "base", "tokens": "base", "norm": "norm", "head": "head",
        "again": "base",
    }  # fmt: skip
    assert not ends.are_equal


def test_equal_ends(tmp_path: Path) -> None:
    ends = found(tmp_path, red={}, green={})
    assert ends.are_equal
    assert ends == Ends.equal(["base", "red", "green"], "base")
    one = Family({"base": str(tmp_path / "base")}, "base").ends
    assert one.are_equal and one.head == {"base": "base"}


def test_the_base_represents_equal_ends_wherever_it_is_listed(tmp_path: Path) -> None:
    found(tmp_path, red={})
    models = {name: str(tmp_path / name) for name in ("red", "base")}
    assert Family(models, "base").ends.embeddings == {"red": "base", "base": "base"}


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_types_may_differ_where_values_do_not(tmp_path: Path, dtype: str) -> None:
    exact = np.round(floats(START[TOKENS]) * 8) / 8  # values that all three types have
    same: dict[str, Entry] = {TOKENS: ("BF16", exact.shape, encoded(exact, "BF16"))}
    cast: dict[str, Entry] = {TOKENS: (dtype, exact.shape, encoded(exact, dtype))}
    other = exact.copy()
    other[-1, -1] += 2**-5
    ends = found(
        tmp_path, same=same, cast=cast, other={TOKENS: (dtype, other.shape, encoded(other, dtype))}
    )
    assert ends.embeddings == {"base": "base", "same": "same", "cast": "same", "other": "other"}


def test_other_padding_is_another_end(tmp_path: Path) -> None:
    """Even where the tokens' rows are equal: padding logits count in every probability."""
    values = floats(START[TOKENS])
    longer = np.concatenate([values, np.zeros((4, HIDDEN))])
    entry: Entry = ("BF16", longer.shape, encoded(longer, "BF16"))
    base = save_model(tmp_path / "base", tied=False)
    padded = save_model(
        tmp_path / "padded", tied=False, vocab=VOCAB + 4, tensors={TOKENS: entry, HEAD: entry}
    )
    family = Family({"base": str(base), "padded": str(padded)}, "base")
    assert family.ends.embeddings == {"base": "base", "padded": "padded"}
    assert family.uneven == {TOKENS, HEAD}


def test_a_slow_comparison_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {name: str(save_model(tmp_path / name)) for name in ("base", "red")}
    family = Family(models, "base")
    assert ends.announcements(family.candidates.values()) == []
    alone = Family({"base": models["base"]}, "base")
    monkeypatch.setattr(ends, "_QUICK_BYTES", 1)
    assert ends.announcements(alone.candidates.values()) == []
    (text,) = ends.announcements(family.candidates.values())
    assert text == "Comparing the models' embeddings and heads, at most 0 GB."


@pytest.mark.parametrize("at", [0, 6, 7, 13, VOCAB * HIDDEN - 1])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_every_piece_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, dtype: str
) -> None:
    monkeypatch.setattr(ends, "_PIECE", 7)
    row, column = divmod(at, HIDDEN)
    assert not found(tmp_path / "a", red=changed(TOKENS, row, column, dtype=dtype)).are_equal
    assert found(tmp_path / "b", red=changed(TOKENS, dtype=dtype)).are_equal
