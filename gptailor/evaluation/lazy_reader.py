"""A reader for families that imports transformers only for models that can't be read without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptailor.evaluation.reader import TransformersReader
    from gptailor.models.checkpoint import Checkpoint
    from gptailor.models.reading import Reading


class LazyReader:
    """A `Reader` that imports transformers on first use."""

    def __init__(self) -> None:
        self._reader: TransformersReader | None = None

    @property
    def now(self) -> TransformersReader:
        """The actual reader, made on first use."""
        if self._reader is None:
            from gptailor.evaluation.reader import TransformersReader

            self._reader = TransformersReader()
        return self._reader

    def read(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> Reading:
        """See `TransformersReader`."""
        return self.now.read(checkpoint, config)

    def cut_config(
        self, checkpoint: Checkpoint, config: Mapping[str, Any], src_layers: Sequence[int]
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """See `TransformersReader`."""
        return self.now.cut_config(checkpoint, config, src_layers)

    def check_result(
        self, config: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...]]]
    ) -> None:
        """See `TransformersReader`."""
        self.now.check_result(config, tensors)
