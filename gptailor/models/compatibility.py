"""Whether a candidate fits the base: its layers can stand in for the base's, as far as files tell.

Configs are compared in `config_fields`, and rows that a vocabulary lacks in `rows`.
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
            "untie the one or leave it out."
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
    """Vocabularies must be the same up to rows that no token uses.

    Returns:
        True if the tokenizers' files show it, or there are none; False if they have to be loaded.

    Raises:
        ModelError: the embeddings are of another size, and there is no tokenizer to tell why.
    """
    known, found = read_vocabulary(base.folder), read_vocabulary(candidate.folder)
    if known is not None and found is not None:
        return known == found
    rows = [[c.tensors[n].shape for n in c.architecture.embeddings] for c in (candidate, base)]
    if rows[0] != rows[1]:
        raise ModelError(
            f"{candidate.folder} has another vocabulary: its embeddings have another size, and "
            f"there is no tokenizer to tell why ({base.folder}). Leave it out, make it the base, "
            "or resize its embeddings to the base's tokenizer first."
        )
    return True
