"""A tokenizer is the same in any format; another one is refused with the first difference."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptailor.errors import ModelError
from gptailor.evaluation.family import open_family
from gptailor.models.family import Family
from gptailor.recipe import Recipe, Take
from gptailor.stitching.plan import make_plan
from tests.models.tiny import save_model

TEXT = ["the quick brown fox jumps over the lazy dog", "def f(x): return x + 1", "0123 456 789"] * 9


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only tokenizer.model."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=data, vocab_size=330, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(data.getvalue())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return folder


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only vocab.json and merges.txt."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXT, vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return folder


def model_with(place: Path, tokenizer: Path, names: list[str], vocab: int = 400) -> Path:
    folder = save_model(place, tokenizer=False, vocab=vocab)
    for name in names:
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def in_json(folder: Path, place: Path) -> Path:
    """The same tokenizer as transformers saves it."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(place)
    assert {p.name for p in place.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    return place


def opened(base: Path, other: Path) -> Family:
    return open_family({"base": str(base), "other": str(other)}, "base")


def refused(base: Path, other: Path) -> str:
    with pytest.raises(ModelError) as caught:
        opened(base, other)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


CONFIG = "tokenizer_config.json"
FORMATS = {"spm": ["tokenizer.model", CONFIG], "bpe": ["vocab.json", "merges.txt", CONFIG]}


@pytest.mark.parametrize("kind", FORMATS)
def test_one_tokenizer_in_two_formats(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(kind)
    old = model_with(tmp_path / "old", source, FORMATS[kind])
    new = model_with(tmp_path / "new", in_json(old, tmp_path / "json"), ["tokenizer.json", CONFIG])
    for base, other in ((old, new), (new, old)):
        family = Family({"base": str(base), "other": str(other)}, "base")
        assert family.open_tokenizers == {"other"}
        recipe = Recipe(family.refs, "base", (Take("other", 0),), "base", "base")
        with pytest.raises(ModelError, match="only transformers can tell"):
            make_plan(recipe, family)
        make_plan(recipe, opened(base, other))


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_another_tokenizer_in_another_format(spm: Path, bpe: Path, tmp_path: Path) -> None:
    old = model_with(tmp_path / "old", spm, FORMATS["spm"])
    new = model_with(tmp_path / "new", in_json(old, tmp_path / "json"), ["tokenizer.json", CONFIG])

    def swap(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        one, two = [token for token in vocab if len(token) > 1 and token[0] == "▁"][:2]
        vocab[one], vocab[two] = vocab[two], vocab[one]

    changed(new / "tokenizer.json", swap)
    assert "in which '▁" in refused(old, new)
    third = model_with(tmp_path / "third", bpe, FORMATS["bpe"])
    text = refused(old, third)
    assert "third has another vocabulary: its tokenizer differs from the base's" in text
    assert "Leave it out, make it the base, or resize its embeddings" in text


def test_an_extra_or_missing_token(spm: Path, tmp_path: Path) -> None:
    old = model_with(tmp_path / "old", spm, FORMATS["spm"])
    new = model_with(tmp_path / "new", in_json(old, tmp_path / "json"), ["tokenizer.json", CONFIG])
    more = {"id": 340, "content": "<new>", "special": True, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False}  # fmt: skip
    changed(new / "tokenizer.json", lambda data: data["added_tokens"].append(more))
    assert "which has no '<new>'" in refused(old, new)
    assert "which has '<new>', too" in refused(new, old)


def test_the_same_tokens_but_another_splitting(bpe: Path, tmp_path: Path) -> None:
    old = model_with(tmp_path / "old", bpe, FORMATS["bpe"])
    new = model_with(tmp_path / "new", in_json(old, tmp_path / "json"), ["tokenizer.json", CONFIG])
    changed(new / "tokenizer.json", lambda data: data["model"].update(merges=[]))
    text = refused(old, new)
    assert "which splits 'The quick brown fox jumps over the lazy dog.' differently" in text
    for name in ("tokenizer.json", CONFIG):  # without its own tokenizer files it is accepted
        (new / name).unlink()
    opened(old, new)


def test_an_added_token_in_another_file(bpe: Path, tmp_path: Path) -> None:
    """The added token is in tokenizer.json or only in the file beside it."""
    from transformers import AutoTokenizer

    old = model_with(tmp_path / "old", in_json(bpe, tmp_path / "json"), ["tokenizer.json", CONFIG])
    new = model_with(tmp_path / "new", tmp_path / "json", ["tokenizer.json", CONFIG])
    tokenizer = AutoTokenizer.from_pretrained(old)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(old)
    token = {"content": "<pad>", "special": True, "lstrip": False, "rstrip": False,
             "normalized": False, "single_word": False}  # fmt: skip
    changed(new / CONFIG, lambda data: data.update(added_tokens_decoder={"300": token}))
    assert len(AutoTokenizer.from_pretrained(new)) == len(tokenizer)
    assert Family({"base": str(old), "other": str(new)}, "base").open_tokenizers == {"other"}
    opened(old, new)


def test_a_tokenizer_that_cannot_be_loaded(spm: Path, tmp_path: Path) -> None:
    old = model_with(tmp_path / "old", spm, FORMATS["spm"])
    broken = model_with(tmp_path / "broken", spm, FORMATS["spm"])
    (broken / "tokenizer.model").write_bytes(b"\x0a\x00nothing")
    text = refused(old, broken)
    assert "broken: its tokenizer has other files than that of" in text
    assert "can't be loaded" in text


def test_rows_for_all_tokens_of_a_format_that_only_its_tokenizer_can_read(
    spm: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokens = 1 + max(AutoTokenizer.from_pretrained(spm).get_vocab().values())
    base = model_with(tmp_path / "base", spm, FORMATS["spm"])
    whole = model_with(tmp_path / "whole", spm, FORMATS["spm"], vocab=tokens)
    short = model_with(tmp_path / "short", spm, FORMATS["spm"], vocab=tokens - 1)
    assert Family({"base": str(base), "x": str(whole)}, "base").open_tokenizers == {"x"}
    opened(base, whole)
    assert not Family({"base": str(whole), "x": str(base)}, "base").open_tokenizers
    assert f"has {tokens - 1} rows (400 in the base" in refused(base, short)
