"""What an island tells the others in its journal, as values.

- `Header`: what the island searches; first of all, and again whenever its search was started again.
- `Evaluation`: one that ended, whole.
- `Measured`: what the layers of one candidate do.
- `Begun`: what is under way now.
- `Closed`: the search ended in good order; what was under way is given back.
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
        count: how many islands it was told that there are.
        config: the resolved configuration.
        fingerprint: changes when the model files do.
        documents: changes when tasks or documents do.
        family: depth, folders and parameter counts of the models, for the report.
    """

    island: int
    count: int
    config: Mapping[str, Any]
    fingerprint: str
    documents: str
    family: Mapping[str, Any]

    def check_same(self, theirs: Header, path: Path) -> None:
        """Compares what this island searches with the header in another's journal.

        Raises:
            UsageError: they search something else; it tells the difference.
        """
        different = config_difference(self.config, theirs.config)
        if different:
            raise UsageError(
                f"{path} is the journal of an island with another configuration: {different} "
                "there. Islands of one run search the same: name another output."
            )
        pairs = (
            (self.fingerprint, theirs.fingerprint, "other model files"),
            (self.documents, theirs.documents, "other documents of the tasks"),
        )
        for mine, other, what in pairs:
            if mine != other:
                raise UsageError(
                    f"{path} is the journal of an island with {what} than this one has: islands of "
                    "one run search the same, so name another output."
                )


@dataclass(frozen=True)
class Measured:
    """The similarity of the layers of one model."""

    model: str
    similarity: Similarity


@dataclass(frozen=True)
class Begun:
    """What an island has given to its workers."""

    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Closed:
    """An island's search ended in good order."""


Entry = Header | Evaluation | Measured | Begun | Closed
