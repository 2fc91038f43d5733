"""The interface to the other islands of a run, and its stand-in for a search without islands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, TypeVar

from gptailor.evaluation.outcome import Evaluation
from gptailor.evaluation.similarity import Similarity
from gptailor.run.journal_entry import Key, Measured

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")


class Peers(AbstractContextManager["Peers"], Protocol):
    """The other islands; leaving the context releases what this island had begun."""

    def refresh(self, *, at_once: bool = False) -> list[Evaluation]:
        """What others evaluated since the last call, each recipe and set of documents once.

        Args:
            at_once: read the journals even if they were read a moment ago.
        """
        ...

    @property
    def similarities(self) -> dict[str, Similarity]:
        """What others measured: model → similarity."""
        ...

    def begin(self, keys: Iterable[Key]) -> None:
        """Tells the others what is under way from now on."""
        ...

    def publish(self, evaluations: Sequence[Evaluation]) -> None:
        """Tells the others what was evaluated; durable on return."""
        ...

    def publish_similarities(self, measured: Sequence[Measured]) -> None:
        """Tells the others what was measured; durable on return."""
        ...

    def is_under_way(self, key: Key) -> bool:
        """Whether another island that is not lost is evaluating it."""
        ...

    def num_under_way(self, documents: str) -> int:
        """How many evaluations on these documents the others are running."""
        ...

    def wait(self) -> None:
        """Waits a moment for the others."""
        ...

    def rotated(self, items: Sequence[T]) -> list[T]:
        """Reorders work that all islands have, so that each begins at another place."""
        ...

    def seed(self, seed: int) -> int:
        """A seed of this island's own."""
        ...

    @property
    def is_alone(self) -> bool:
        """True if there are no islands; False even if no other island has started yet."""
        ...


class NoPeers:
    """A search without islands: receives nothing and tells nobody."""

    def refresh(self, *, at_once: bool = False) -> list[Evaluation]:
        """Nothing."""
        return []

    @property
    def similarities(self) -> dict[str, Similarity]:
        """Nothing."""
        return {}

    def begin(self, keys: Iterable[Key]) -> None:
        """Nobody is told."""

    def publish(self, evaluations: Sequence[Evaluation]) -> None:
        """Nobody is told."""

    def publish_similarities(self, measured: Sequence[Measured]) -> None:
        """Nobody is told."""

    def is_under_way(self, key: Key) -> bool:
        """False."""
        return False

    def num_under_way(self, documents: str) -> int:
        """0."""
        return 0

    def wait(self) -> None:
        """Returns at once."""

    def rotated(self, items: Sequence[T]) -> list[T]:
        """The items unchanged."""
        return list(items)

    def seed(self, seed: int) -> int:
        """The seed unchanged."""
        return seed

    @property
    def is_alone(self) -> bool:
        """True."""
        return True

    def __enter__(self) -> NoPeers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing was begun."""
