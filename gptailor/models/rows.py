"""Rows of embeddings and output heads: one for each token, and padding that no token uses.

Candidates of one vocabulary may have other numbers of rows: some tools pad them to a round number,
some resize them to the tokenizer. What no token uses is no input, but its logits count in every
probability.
"""

from __future__ import annotations

from collections.abc import Iterable

from gptailor.errors import ModelError
from gptailor.models.architecture import text_config
from gptailor.models.candidate import Candidate
from gptailor.models.side_files import read_vocabulary


def is_padding(name: str, candidate: Candidate, base: Candidate) -> bool:
    """True if a tensor of two candidates is a vocabulary's, and differs in its rows only."""
    shapes = [one.tensors[name].shape for one in (candidate, base)]
    is_end = name in base.architecture.embeddings or name in base.architecture.head
    if not is_end or not all(shapes) or shapes[0][1:] != shapes[1][1:]:
        return False
    declared = [text_config(one.config).get("vocab_size") for one in (candidate, base)]
    # positions have rows, too
    return all(n in (None, shape[0]) for n, shape in zip(declared, shapes, strict=True))


def uneven_tensors(candidates: Iterable[Candidate], base: Candidate) -> frozenset[str]:
    """The tensors that don't have as many rows in all candidates of a family."""
    return frozenset(
        name
        for candidate in candidates
        for name in (*base.architecture.embeddings, *base.architecture.head)
        if candidate.tensors[name].shape != base.tensors[name].shape
    )


def has_enough_rows(candidate: Candidate, base: Candidate) -> bool:
    """Whether files tell that each token of the base's tokenizer has a row in the candidate, too.

    Raises:
        ModelError: a token has none.
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
    """Raises a `ModelError` unless each of so many tokens has a row in a candidate.

    It is not asked of one that has as many rows as the base or more.
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
    """The tensors that have fewer rows than those of the base."""
    uneven = sorted(uneven_tensors([candidate], base))
    return [n for n in uneven if candidate.tensors[n].shape[0] < base.tensors[n].shape[0]]
