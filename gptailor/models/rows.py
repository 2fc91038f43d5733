"""Rows of embeddings and output heads: one for each token, and padding that no token uses.

Candidates with the same vocabulary may have different numbers of rows: some tools pad them to a
round number, some resize them to the tokenizer. A row that no token uses is never an input, but its
logit counts in every probability.
"""

from __future__ import annotations

from collections.abc import Iterable

from gptailor.errors import ModelError
from gptailor.models.architecture import text_config
from gptailor.models.candidate import Candidate
from gptailor.models.side_files import read_vocabulary


def is_padding(name: str, candidate: Candidate, base: Candidate) -> bool:
    """True if a tensor belongs to the vocabulary, and only its number of rows differs."""
    shapes = [one.tensors[name].shape for one in (candidate, base)]
    is_end = name in base.architecture.embeddings or name in base.architecture.head
    if not is_end or not all(shapes) or shapes[0][1:] != shapes[1][1:]:
        return False
    declared = [text_config(one.config).get("vocab_size") for one in (candidate, base)]
    # positions have rows, too
    return all(n in (None, shape[0]) for n, shape in zip(declared, shapes, strict=True))


def uneven_tensors(candidates: Iterable[Candidate], base: Candidate) -> frozenset[str]:
    """The tensors whose number of rows differs among the candidates of a family."""
    return frozenset(
        name
        for candidate in candidates
        for name in (*base.architecture.embeddings, *base.architecture.head)
        if candidate.tensors[name].shape != base.tensors[name].shape
    )


def has_enough_rows(candidate: Candidate, base: Candidate) -> bool:
    """Whether the files show that each token of the base's tokenizer has a row in the candidate.

    Raises:
        ModelError: a token has no row.
    """
    if not _short(candidate, base):
        return True
    vocabulary = read_vocabulary(base.folder)
    parts = vocabulary if isinstance(vocabulary, tuple) else ()
    ids: set[object] = set()
    for part in parts:
        if isinstance(part, dict):
            ids.update(part.values())
        elif isinstance(part, list):
            ids.update(range(len(part)))
        else:
            return False  # a format that only its tokenizer can read
    check_rows(candidate, base, 1 + max((i for i in ids if isinstance(i, int)), default=-1))
    return bool(parts)


def check_rows(candidate: Candidate, base: Candidate, num_tokens: int) -> None:
    """Raises a `ModelError` unless each of `num_tokens` tokens has a row in the candidate.

    A candidate with at least as many rows as the base always passes.
    """
    for name in _short(candidate, base):
        rows, base_rows = (one.tensors[name].shape[0] for one in (candidate, base))
        if rows < num_tokens:
            raise ModelError(
                f"{candidate.folder}: {name} has {rows} rows ({base_rows} in the base "
                f"{base.folder}), but the tokenizer has {num_tokens} tokens: resize its embeddings "
                "to the tokenizer, or leave it out."
            )


def _short(candidate: Candidate, base: Candidate) -> list[str]:
    """The tensors that have fewer rows than the base's."""
    uneven = sorted(uneven_tensors([candidate], base))
    return [n for n in uneven if candidate.tensors[n].shape[0] < base.tensors[n].shape[0]]
