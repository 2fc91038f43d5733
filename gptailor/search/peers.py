"""What a search asks of the other islands of its run, and what it hears where there are none."""

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
    """The other islands; as a context, leaving it gives back what this island had begun."""

    def refresh(self, *, at_once: bool = False) -> list[Evaluation]:
        """What others evaluated since the last call, each recipe and set of documents once.

        Args:
            at_once: look even if the last look was just now.
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
        """True while another island is at it, and is not lost."""
        ...

    def num_under_way(self, documents: str) -> int:
        """How many evaluations on these documents the others are at."""
        ...

    def wait(self) -> None:
        """Waits a moment for the others."""
        ...

    def rotated(self, items: Sequence[T]) -> list[T]:
        """What everybody has to do, in an order in which islands don't get in each other's way."""
        ...

    def seed(self, seed: int) -> int:
        """A seed of this island's own."""
        ...

    @property
    def is_alone(self) -> bool:
        """True if there are no islands; False even where no other island came yet."""
        ...


class NoPeers:
    """A search alone: nothing comes from others, and nobody is told anything."""

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
        """The items as they are."""
        return list(items)

    def seed(self, seed: int) -> int:
        """The seed as it is."""
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
