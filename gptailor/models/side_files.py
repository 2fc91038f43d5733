"""The small files of a model folder: those of tokenizers and processors, and licences.

They are listed by name, so that nothing else of an untrusted folder is copied by accident: no
pickle, no program.
"""

from __future__ import annotations

import json
from pathlib import Path

from gptailor.errors import ModelError
from gptailor.models.leftovers import without_local_code
from gptailor.models.untrusted import (
    MAX_TOKENIZER_BYTES,
    check_link,
    is_file,
    is_folder,
    parse_json,
    read_bytes,
    read_json,
)

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json",
    "sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "spm_char.model", "source.spm",
    "vocab.bpe", "tiktoken.model", "prophetnet.tokenizer", "byte_maps.json", "dict.txt",
    "vocab-src.json",
)  # fmt: skip
"""Each of these, or a file `*.tiktoken`, is a tokenizer."""

_NAMES = (
    *VOCABULARIES,
    # files that accompany a vocabulary
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "bpe.codes", "encoder.json", "target.spm", "target_vocab.json", "vocab-tgt.json",
    "normalizer.json", "emoji.json", "entity_vocab.json", "word_shape.json",
    "word_pronunciation.json", "chat_template.jinja", "chat_template.json", "SYSTEM_PROMPT.txt",
    # processors of inputs other than text
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "generation_config.json",
)  # fmt: skip
_SUFFIXES = (".tiktoken", ".jinja")
_VERSIONED = "tokenizer.model."
"""Mistral appends a version, as in tokenizer.model.v3."""
_TEMPLATES = "additional_chat_templates"
_LICENCES = ("license", "licence", "notice", "use_policy")
_PAGES = ("", ".txt", ".md")

HUB_PATTERNS = (
    "*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.spm", "*.bpe",
    "*.codes", "*.tokenizer", "tokenizer.model.*", "LICEN[SC]E*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""The files of a model on the hub that are downloaded."""
HUB_IGNORED = ("*/*.safetensors", "*/*.json", "*/*.model", "*/*.txt")
"""Exceptions: other forms of the same weights in subfolders."""


def side_files(folder: Path) -> list[str]:
    """Names of the small files that belong to a model, relative to its folder, sorted."""
    found = [name for name in _NAMES if is_file(folder / name)]
    for path in folder.iterdir():
        is_tokenizer = path.suffix in _SUFFIXES or path.name.startswith(_VERSIONED)
        is_licence = path.stem.lower() in _LICENCES and path.suffix.lower() in _PAGES
        if path.name not in found and (is_tokenizer or is_licence) and is_file(path):
            found.append(path.name)
    if is_folder(folder / _TEMPLATES):
        templates = (p for p in (folder / _TEMPLATES).iterdir() if p.suffix == ".jinja")
        found += [f"{_TEMPLATES}/{path.name}" for path in templates if is_file(path)]
    return sorted(found)


def has_tokenizer(folder: Path) -> bool:
    """True if the folder has a tokenizer that transformers could load."""
    return vocabulary_file(folder) is not None


def vocabulary_file(folder: Path) -> Path | None:
    """The file from which transformers would take the vocabulary, judging by names."""
    named = [folder / name for name in VOCABULARIES if is_file(folder / name)]
    return next(iter([*named, *sorted(folder.glob("*.tiktoken"))]), None)


def read_vocabulary(folder: Path) -> object:
    """An object to compare vocabularies by; None if the folder has no tokenizer.

    Equal objects mean equal vocabularies; different ones may be one vocabulary in two formats.

    Raises:
        ModelError: the file can't be read, or holds no vocabulary.
    """
    path = vocabulary_file(folder)
    if path is None:
        return None
    if path.name != "tokenizer.json":
        return path.name, read_bytes(path, MAX_TOKENIZER_BYTES)
    data = read_json(path, MAX_TOKENIZER_BYTES)
    try:
        vocabulary = data["model"]["vocab"]
        added = {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path} has no vocabulary in the form of a tokenizer.json.") from error
    return ({**vocabulary, **added},) if isinstance(vocabulary, dict) else (vocabulary, added)


def copy_side_file(source: Path, target: Path) -> None:
    """Copies a small file, without `auto_map` entries for code that is not copied along.

    Raises:
        ModelError: it is a link to a file with another name, too large, or a git-lfs pointer.
    """
    check_link(source)
    data = read_bytes(source, MAX_TOKENIZER_BYTES)
    if source.suffix == ".json" and b'"auto_map"' in data:
        parsed = parse_json(data, source, "it")
        if without_local_code(parsed) != parsed:
            text = json.dumps(without_local_code(parsed), indent=2, ensure_ascii=False)
            data = f"{text}\n".encode()
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(data)
