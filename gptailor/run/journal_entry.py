"""The entries of an island's journal.

- `Header`: what the island searches; comes first, and again each time its search is restarted.
- `Evaluation`: a finished evaluation.
- `Measured`: the layer similarities of one candidate.
- `Begun`: what is under way from now on.
- `Closed`: the search ended cleanly; what was under way is released.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptailor.errors import UsageError
from gptailor.evaluation.outcome import Evaluation
from gptailor.evaluation.similarity import Similarity
from gptailor.run.config_difference import config_difference

Key = tuple[str, str]
"""Hash of the recipe and the documents; or a model's name and "similarity"."""


@dataclass(frozen=True)
class Header:
    """What an island searches.

    Attributes:
        island: its number, from 0.
        count: the number of islands it was started with.
        config: the resolved configuration.
        fingerprint: changes with the model files.
        documents: changes with the tasks or documents.
        family: depth, folders and parameter counts of the models, for the report.
    """

    island: int
    count: int
    config: Mapping[str, Any]
    fingerprint: str
    documents: str
    family: Mapping[str, Any]

    def check_same(self, theirs: Header, path: Path) -> None:
        """Compares what this island searches with the header of another island's journal.

        Raises:
            UsageError: the other searches something else; the message names the difference.
        """
        different = config_difference(self.config, theirs.config)
        if different:
            raise UsageError(
                f"{path} is the journal of an island with another configuration: {different} "
                "there. Islands of one run share a configuration: name another output."
            )
        pairs = (
            (self.fingerprint, theirs.fingerprint, "other model files"),
            (self.documents, theirs.documents, "other documents of the tasks"),
        )
        for mine, other, what in pairs:
            if mine != other:
                raise UsageError(
                    f"{path} is the journal of an island with {what} than this one: islands of "
                    "one run share them, so name another output."
                )


@dataclass(frozen=True)
class Measured:
    """The layer similarities of one model."""

    model: str
    similarity: Similarity


@dataclass(frozen=True)
class Begun:
    """Jobs that an island has given to its workers."""

    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Closed:
    """An island's search ended cleanly."""


Entry = Header | Evaluation | Measured | Begun | Closed
