"""Reports candidates whose tokenizer or generation settings differ from the base's.

A candidate on its own, as lm-eval loads it, uses its own tokenizer and generation settings.
Recipes, including control arms, use the base's. Where the two differ, scores may differ too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptailor.evaluation.tokenizers import TEXTS
from gptailor.models.candidate import Candidate
from gptailor.models.family import Family
from gptailor.models.side_files import has_tokenizer, side_files
from gptailor.models.untrusted import (
    MAX_CONFIG_BYTES,
    MAX_TOKENIZER_BYTES,
    is_file,
    read_bytes,
    read_json,
)

_GENERATION = "generation_config.json"
_WITHOUT_EFFECT = frozenset(
    {
        # lm-eval sets these itself, or does not sample
        "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff",
        "eta_cutoff", "max_length", "max_new_tokens", "max_time", "use_cache", "pad_token_id",
        "bos_token_id",
        # how the model runs, what it returns, where the file comes from
        "cache_implementation", "cache_config", "output_attentions", "output_hidden_states",
        "output_scores", "output_logits", "return_dict_in_generate", "transformers_version",
        "_from_model_config",
    }
)  # fmt: skip


def habits(family: Family) -> list[str]:
    """One sentence for each candidate whose tokenizer or generation settings differ.

    Raises:
        ModelError: a file can't be read, or a tokenizer can't be loaded.
    """
    notes = []
    for candidate in family.candidates.values():
        found = [*_of_tokenizer(candidate, family.base), *_of_generation(candidate, family.base)]
        if found:
            notes.append(
                f"{candidate.name}: its {' and '.join(found)} differ from the base's, which are "
                "used for every score, so lm-eval may score it differently on its own."
            )
    return notes


def _of_tokenizer(candidate: Candidate, base: Candidate) -> Iterator[str]:
    folders = candidate.folder, base.folder
    if not has_tokenizer(candidate.folder) or _files(folders[0]) == _files(folders[1]):
        return
    from gptailor.evaluation.loading import load_tokenizer

    mine, bases = map(load_tokenizer, folders)
    if mine.chat_template != bases.chat_template:
        yield "chat template"
    if any(mine.encode(text) != bases.encode(text) for text in TEXTS):
        yield "tokens of a text"


def _files(folder: Path) -> dict[str, bytes]:
    """The files that may belong to a tokenizer."""
    names = (name for name in side_files(folder) if name != _GENERATION)
    return {name: read_bytes(folder / name, MAX_TOKENIZER_BYTES) for name in names}


def _of_generation(candidate: Candidate, base: Candidate) -> Iterator[str]:
    mine, bases = _settings(candidate), _settings(base)
    keys = {key for key in {*mine, *bases} - _WITHOUT_EFFECT if mine.get(key) != bases.get(key)}
    if keys:
        yield f"settings for generating ({', '.join(sorted(keys))})"


def _settings(candidate: Candidate) -> dict[str, Any]:
    """Generation settings as transformers finds them: in their own file, else only the EOS token
    of the config."""
    path = candidate.folder / _GENERATION
    if is_file(path):
        return read_json(path, MAX_CONFIG_BYTES)
    return {key: value for key, value in candidate.config.items() if key == "eos_token_id"}
