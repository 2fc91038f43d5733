"""What a search asks of the other islands of its run, and what it hears where there are none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from gptailor.evaluation.outcome import Evaluation
from gptailor.evaluation.similarity import Similarity
from gptailor.run.journal_entry import Key, Measured

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")


class NoPeers:
    """What a search asks of the other islands where there are none."""

    def refresh(self, *, at_once: bool = False) -> list[Evaluation]:
        """What others evaluated since the last call; `at_once` even if that was just now."""
        return []

    @property
    def similarities(self) -> dict[str, Similarity]:
        """What others measured: model → similarity."""
        return {}

    def begin(self, keys: Iterable[Key]) -> None:
        """Tells the others what is under way from now on."""

    def publish(self, evaluations: Sequence[Evaluation]) -> None:
        """Tells the others what was evaluated; durable on return."""

    def publish_similarities(self, measured: Sequence[Measured]) -> None:
        """Tells the others what was measured; durable on return."""

    def is_under_way(self, key: Key) -> bool:
        """True while another island is at it, and is not lost."""
        return False

    def num_under_way(self, documents: str) -> int:
        """How many evaluations on these documents the others are at."""
        return 0

    def wait(self) -> None:
        """Waits a moment for the others."""

    def rotated(self, items: Sequence[T]) -> list[T]:
        """What everybody has to do, in an order in which islands don't get in each other's way."""
        return list(items)

    def seed(self, seed: int) -> int:
        """A seed of this island's own."""
        return seed

    @property
    def is_alone(self) -> bool:
        """True if there are no islands."""
        return True

    def __enter__(self) -> NoPeers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives back what this island had begun."""
