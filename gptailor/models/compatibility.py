"""Checks whether a candidate fits the base: whether its layers can replace the base's, as far as
files can tell.

Configs are compared in `config_fields`, and missing vocabulary rows in `rows`.
"""

from __future__ import annotations

from gptailor.errors import ModelError
from gptailor.models.candidate import Candidate
from gptailor.models.checkpoint import FLOAT_DTYPES
from gptailor.models.rows import is_padding
from gptailor.models.side_files import read_vocabulary


def check_fits(candidate: Candidate, base: Candidate) -> None:
    """Raises a `ModelError` unless every layer of `candidate` can replace the base's."""
    if candidate.num_layers != base.num_layers:
        raise ModelError(
            f"{candidate.folder} has {candidate.num_layers} layers, but the base {base.folder} has "
            f"{base.num_layers}: a family needs the same depth."
        )
    if candidate.is_tied != base.is_tied:
        tied, untied = (candidate, base) if candidate.is_tied else (base, candidate)
        raise ModelError(
            f"{tied.folder} ties its output head to the embeddings, but {untied.folder} does not: "
            "untie the first, or leave it out."
        )
    names = set(base.tensors) ^ set(candidate.tensors)
    if names:
        name = min(names)
        lacks, has = (candidate, base) if name in base.tensors else (base, candidate)
        raise ModelError(f"{lacks.folder} lacks the tensor {name}, which {has.folder} has.")
    for name, info in base.tensors.items():
        shape = candidate.tensors[name].shape
        if shape != info.shape and not is_padding(name, candidate, base):
            raise ModelError(
                f"{candidate.folder}: {name} has the shape {list(shape)}, but {list(info.shape)} "
                f"in the base {base.folder}."
            )
        dtypes = (candidate.tensors[name].dtype, info.dtype)
        if dtypes[0] != dtypes[1] and not set(dtypes) <= set(FLOAT_DTYPES):
            raise ModelError(
                f"{candidate.folder}: {name} has dtype {dtypes[0]}, but {dtypes[1]} in the base "
                f"{base.folder}; only {', '.join(FLOAT_DTYPES)} can be mixed."
            )


def check_vocabulary(candidate: Candidate, base: Candidate) -> bool:
    """Checks whether the vocabularies are equal, apart from rows that no token uses.

    Returns:
        True if the tokenizers' files show that they are, or there are no such files; False if only
        loading the tokenizers can tell.

    Raises:
        ModelError: the embeddings have another size, and there is no tokenizer to tell why.
    """
    known, found = read_vocabulary(base.folder), read_vocabulary(candidate.folder)
    if known is not None and found is not None:
        return known == found
    rows = [[c.tensors[n].shape for n in c.architecture.embeddings] for c in (candidate, base)]
    if rows[0] != rows[1]:
        raise ModelError(
            f"{candidate.folder} has another vocabulary: its embeddings differ in size from those "
            f"of {base.folder}, and there is no tokenizer to tell why. Leave it out, make it the "
            "base, or resize its embeddings to the base's tokenizer first."
        )
    return True
