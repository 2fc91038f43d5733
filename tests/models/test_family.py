"""Which models form a family, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptailor.errors import GptailorError, ModelError, UsageError
from gptailor.models.family import Family, resolve
from tests.models.tiny import (
    HIDDEN,
    LAYER_SHAPES,
    VOCAB,
    encoded,
    llama_tensors,
    save_model,
    save_tensors,
    save_tokenizer,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base")


def refused(base: Path, other: Path, kind: type[GptailorError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        Family({"base": str(base), "other": str(other)}, "base")
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_a_family(base: Path, tmp_path: Path) -> None:
    red = save_model(tmp_path / "red")
    family = Family({"base": str(base), "red": str(red)}, "base")
    per_layer = sum(int(np.prod(shape)) for shape in LAYER_SHAPES.values())
    assert family.num_layers == 4
    assert family.layer_parameters(2) == per_layer
    assert family.parameters() == 4 * per_layer + HIDDEN * (VOCAB + 1)
    assert family.parameters((0, 3)) == 2 * per_layer + HIDDEN * (VOCAB + 1)
    assert family.base.is_tied
    assert set(family.fingerprint()) == {"base", "red"}


def test_fingerprint_changes_with_the_weights(base: Path) -> None:
    before = Family({"base": str(base)}, "base").fingerprint()
    assert Family({"base": str(base)}, "base").fingerprint() == before
    save_tensors(base / "model.safetensors", llama_tensors("other"))
    assert Family({"base": str(base)}, "base").fingerprint() != before


def test_depth(base: Path, tmp_path: Path) -> None:
    text = refused(base, save_model(tmp_path / "other", num_layers=5))
    assert "other has 5 layers, but the base" in text
    assert "has 4" in text


@pytest.mark.parametrize("suffix", ["self_attn.q_proj.weight", "input_layernorm.weight"])
def test_shape(base: Path, tmp_path: Path, suffix: str) -> None:
    name = f"model.layers.1.{suffix}"
    wide = {name: ("BF16", (HIDDEN, 3), b"\0" * (HIDDEN * 6))}
    text = refused(base, save_model(tmp_path / "other", tensors=wide))
    assert f"{tmp_path / 'other'}: {name} has the shape [{HIDDEN}, 3], but [" in text


def test_tying(base: Path, tmp_path: Path) -> None:
    untied = save_model(tmp_path / "other", tied=False)
    for one, two in ((base, untied), (untied, base)):
        text = refused(one, two)
        assert f"{base} ties its output head to the embeddings, but {untied} does not" in text


def test_missing_and_extra_tensors(base: Path, tmp_path: Path) -> None:
    bias = "model.layers.2.self_attn.q_proj.bias"
    extra = save_model(tmp_path / "extra", tensors={bias: ("BF16", (16,), b"\0" * 32)})
    assert f"{base} lacks the tensor {bias}, which {extra} has" in refused(base, extra)
    assert f"{base} lacks the tensor {bias}, which {extra} has" in refused(extra, base)


def test_dtypes(base: Path, tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", dtype="F32")
    Family({"base": str(base), "wide": str(wide)}, "base")  # floats can be mixed
    name = "model.norm.weight"
    integers = {name: ("I64", (HIDDEN,), encoded(np.ones(HIDDEN), "I64"))}
    text = refused(base, save_model(tmp_path / "other", tensors=integers))
    assert f"{name} has dtype I64, but BF16 in the base" in text


def test_padded_vocabulary_of_the_same_tokenizer(base: Path, tmp_path: Path) -> None:
    padded = save_model(tmp_path / "padded", vocab=VOCAB + 12)
    family = Family({"base": str(base), "padded": str(padded)}, "base")
    assert family.candidates["padded"].tensors["model.embed_tokens.weight"].shape[0] == VOCAB + 12


def test_padded_vocabulary_without_a_tokenizer(base: Path, tmp_path: Path) -> None:
    bare = save_model(tmp_path / "bare", tokenizer=False)
    Family({"base": str(base), "bare": str(bare)}, "base")  # same size: no reason to refuse it
    padded = save_model(tmp_path / "padded", vocab=VOCAB + 12, tokenizer=False)
    text = refused(base, padded)
    assert "has another vocabulary: its embeddings differ in size" in text
    assert "make it the base" in text


def test_fewer_rows_than_tokens(base: Path, tmp_path: Path) -> None:
    padded = save_model(tmp_path / "padded", vocab=VOCAB + 12)
    family = Family({"padded": str(padded), "base": str(base)}, "padded")
    assert family.uneven == {"model.embed_tokens.weight"}
    text = refused(base, save_model(tmp_path / "short", vocab=VOCAB - 1))
    assert f"has {VOCAB - 1} rows ({VOCAB} in the base" in text
    assert f"the tokenizer has {VOCAB} tokens: resize its embeddings" in text


def test_rows_that_are_not_tokens_are_not_padding(base: Path, tmp_path: Path) -> None:
    """A table of positions also has rows, and the model needs them."""
    name = "model.embed_positions.weight"
    short, long = (
        save_model(tmp_path / str(n), tensors={name: ("BF16", (n, HIDDEN), b"\0" * n * HIDDEN * 2)})
        for n in (64, 128)
    )
    assert f"{name} has the shape [128, 16], but [64, 16] in the base" in refused(short, long)


def test_wider_embeddings_are_not_padding(base: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    wide = {name: ("BF16", (VOCAB, 2 * HIDDEN), b"\0" * (VOCAB * HIDDEN * 4))}
    assert f"{name} has the shape" in refused(base, save_model(tmp_path / "other", tensors=wide))


def test_another_vocabulary_is_left_for_transformers_to_compare(base: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other")
    words = [f"w{i}" for i in range(VOCAB - 4)]
    save_tokenizer(other, [words[1], words[0], *words[2:]])
    family = Family({"base": str(base), "other": str(other)}, "base")
    with pytest.raises(ModelError, match="other: its tokenizer has other files than the base"):
        family.check_settled()


def test_the_order_of_tokens_does_not_matter(base: Path, tmp_path: Path) -> None:
    path = save_model(tmp_path / "other") / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] = dict(reversed(data["model"]["vocab"].items()))
    data["added_tokens"] = [{"id": 1, "content": "<s>", "special": True}]
    path.write_text(json.dumps(data))
    Family({"base": str(base), "other": str(path.parent)}, "base").check_settled()


@pytest.mark.parametrize(
    "content",
    [[], {}, {"model": 3}, {"model": []}, {"model": {"vocab": {}}, "added_tokens": [{"id": 3}]}],
)
def test_a_broken_tokenizer(base: Path, tmp_path: Path, content: object) -> None:
    path = save_model(tmp_path / "other") / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert str(path) in refused(base, path.parent)
    path.write_text("{")
    assert str(path) in refused(base, path.parent)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer.model", "model.safetensors.index.json"]
)
def test_a_git_lfs_pointer_is_named(base: Path, tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 4242\n"
    other = save_model(tmp_path / "other", shards=2)
    if name == "tokenizer.model":
        (other / "tokenizer.json").unlink()
    (other / name).write_text(pointer)
    assert f"{other / name} is a git-lfs pointer" in refused(base, other)


def test_config_is_missing_or_broken(base: Path) -> None:
    config = base / "config.json"
    for text in ("{", "[]", "\xff"):
        config.write_bytes(text.encode("latin-1"))
        with pytest.raises(ModelError, match=r"config\.json"):
            Family({"base": str(base)}, "base")
    config.unlink()
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        Family({"base": str(base)}, "base")


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_config_says_another_depth(base: Path, key: str) -> None:
    config = json.loads((base / "config.json").read_text())
    del config["num_hidden_layers"]
    (base / "config.json").write_text(json.dumps(config | {key: 6}))
    with pytest.raises(ModelError, match=r"says 6 layers, but the weights have 4"):
        Family({"base": str(base)}, "base")


def test_base_is_not_a_model(base: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown model 'bse' in base: did you mean 'base'\?"):
        Family({"base": str(base)}, "bse")


def test_resolve(base: Path, tmp_path: Path) -> None:
    assert resolve(str(base)) == base
    with pytest.raises(UsageError, match=r"base\+adapter is not supported .*merge_and_unload"):
        resolve(f"{base}+{tmp_path / 'adapter'}")
    for ref in ("./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"):
        with pytest.raises(ModelError, match=f"The model folder {ref} does not exist"):
            resolve(ref)


def test_resolve_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for ref in ("nobody/nothing", "nobody/nothing@v1", "bad name/x"):
        with pytest.raises(ModelError) as caught:
            resolve(ref)
        assert str(caught.value).startswith(f"{ref} is neither a folder nor a model")
        assert "\n" not in str(caught.value)


def test_sharded_candidates(base: Path, tmp_path: Path) -> None:
    shards = save_model(tmp_path / "shards", shards=3)
    family = Family({"base": str(base), "shards": str(shards)}, "base")
    assert len(family.candidates["shards"].checkpoint.files) == 3


def test_order_does_not_matter(base: Path, tmp_path: Path) -> None:
    paths: dict[str, Any] = {"b": save_model(tmp_path / "b"), "base": base}
    assert Family({k: str(v) for k, v in paths.items()}, "base").base.folder == base
