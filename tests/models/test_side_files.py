"""A folder's small files: everything that tokenizers and processors need, and nothing else."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from gptailor.errors import ModelError
from gptailor.models.family import Family
from gptailor.models.side_files import (
    HUB_IGNORED,
    HUB_PATTERNS,
    VOCABULARIES,
    copy_side_file,
    has_tokenizer,
    side_files,
)
from gptailor.recipe import Recipe, Take
from gptailor.stitching.write import write_model
from tests.models.tiny import save_model

MORE = [
    "qwen.tiktoken", "tekken.json", "sentencepiece.bpe.model", "chat_template.jinja",
    "preprocessor_config.json", "additional_chat_templates/rag.jinja", "LICENSE", "NOTICE.txt",
    "generation_config.json", "USE_POLICY.md", "tokenizer.model.v3",
]  # fmt: skip
NEVER = [
    "pytorch_model.bin", "modeling_x.py", "training_args.bin", "README.md", "optimizer.pt",
    "trainer_state.json", "additional_chat_templates/x.py", "onnx/tokenizer.json", "log.txt",
]  # fmt: skip


def put(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("{}" if name.endswith(".json") else f"this is {name}")


def test_has_tokenizer(tmp_path: Path) -> None:
    assert not has_tokenizer(save_model(tmp_path / "a", tokenizer=False))
    assert has_tokenizer(save_model(tmp_path / "b"))
    for name in (*VOCABULARIES, "qwen.tiktoken"):
        folder = tmp_path / f"with-{name}"
        put(folder, [name])
        assert has_tokenizer(folder)


def test_every_file_that_transformers_names(tmp_path: Path) -> None:
    """Its tokenizers and processors list them in tables, found in the source of each module."""
    import transformers

    root = Path(transformers.__file__).parent
    modules = [*root.glob("tokenization_*.py"), *root.glob("models/*/tokenization_*.py")]
    named = {"tokenizer.json", *re.findall(r'"\w+_file": "([^"]+\.[a-z]+)"', "".join(
        path.read_text(encoding="utf-8") for path in modules
    ))}  # fmt: skip
    constants = (root / "utils" / "__init__.py").read_text(encoding="utf-8")
    named |= set(re.findall(r'(?:PROCESSOR|TOKENIZER|EXTRACTOR)_NAME = "([^"]+)"', constants))
    named |= set(
        re.findall(r'_FILE = "([^"]+)"', (root / "tokenization_utils_base.py").read_text())
    )
    assert len(named) > 25
    put(tmp_path, sorted(named))
    assert sorted(named - set(side_files(tmp_path))) == []


def test_the_files_that_are_copied(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    put(base, MORE + NEVER)
    recipe = Recipe({"base": str(base)}, "base", (Take("base", 0),), "base", "base")
    write_model(recipe, Family({"base": str(base)}, "base"), tmp_path / "out", sync=True)
    for name in MORE:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert not found.intersection(set(NEVER) - {"README.md"})


def test_the_files_that_are_downloaded() -> None:
    from huggingface_hub.utils._paths import filter_repo_objects

    wanted = [*MORE, *VOCABULARIES, "merges.txt", "bpe.codes", "config.json", "model.safetensors"]
    others = ["original/model.safetensors", "onnx/config.json", "metal/vocab.txt", "tf_model.h5"]
    names = [*wanted, *others, "pytorch_model.bin", "modeling_x.py", ".gitattributes"]
    found = filter_repo_objects(
        names, allow_patterns=list(HUB_PATTERNS), ignore_patterns=list(HUB_IGNORED)
    )
    assert sorted(found) == sorted(wanted)


def test_several_chat_templates(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = save_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(base)
    assert (base / "additional_chat_templates" / "rag.jinja").is_file()
    recipe = Recipe({"base": str(base)}, "base", (Take("base", 0),), "base", "base")
    write_model(recipe, Family({"base": str(base)}, "base"), tmp_path / "out", sync=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_references_to_code_that_is_not_copied(tmp_path: Path) -> None:
    local = {"AutoTokenizer": ["tokenization_x.X", None]}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"a": "é", "auto_map": local}))
    copy_side_file(path, tmp_path / "copy.json")
    assert json.loads((tmp_path / "copy.json").read_text()) == {"a": "é"}
    elsewhere = {"a": 1, "auto_map": {"AutoTokenizer": ["org/name--tokenization_x.X", None]}}
    path.write_text(json.dumps(elsewhere))
    copy_side_file(path, tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == path.read_bytes()


def test_links(tmp_path: Path) -> None:
    """Those of the hub's cache are followed, also for files in subfolders."""
    revision = tmp_path / "models--x" / "snapshots" / "1f3a"
    put(tmp_path / "models--x", ["blobs/12ab", "secret"])
    for name in ("vocab.txt", "additional_chat_templates/rag.jinja"):
        (revision / name).parent.mkdir(parents=True, exist_ok=True)
        (revision / name).symlink_to(os.path.relpath(
            tmp_path / "models--x" / "blobs" / "12ab", (revision / name).parent
        ))  # fmt: skip
        copy_side_file(revision / name, tmp_path / "copy")
        assert (tmp_path / "copy").read_text() == "this is blobs/12ab"
    (revision / "merges.txt").symlink_to(tmp_path / "models--x" / "secret")
    with pytest.raises(ModelError, match=r"merges\.txt is a link to .*secret, a file with another"):
        copy_side_file(revision / "merges.txt", tmp_path / "copy")
