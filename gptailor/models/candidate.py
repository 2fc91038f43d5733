"""A candidate: one model of a family, opened by its headers, and how a loader would read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gptailor.errors import ModelError, UsageError
from gptailor.models.architecture import (
    Architecture,
    cut_config,
    find_architecture,
    layer_count,
    text_config,
    untied,
)
from gptailor.models.calibration import Statistics, weights_digest
from gptailor.models.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from gptailor.models.leftovers import clean_config
from gptailor.models.reading import Reader, named_reading, plain_reading
from gptailor.models.untrusted import MAX_CONFIG_BYTES, check_config, read_json, shown


class Candidate:
    """One model of a family.

    Args:
        name: its name in the configuration.
        folder: its Hugging Face folder.
        io: how weights are read, see `Checkpoint`.
        reader: knows how a loader would read it; without one, names and shapes decide.

    Attributes:
        tensors: the tensors of its files that a loader would use.
        reading: how the folder is read.

    Raises:
        ModelError: config or weights are missing or corrupt.
    """

    def __init__(
        self, name: str, folder: str | Path, io: str | None = None, reader: Reader | None = None
    ) -> None:
        self.name = name
        self.folder = Path(folder)
        self.checkpoint = Checkpoint(self.folder, io)
        self._statistics: dict[tuple[str, str], Statistics] = {}
        config_file = self.folder / "config.json"
        config = read_json(config_file, MAX_CONFIG_BYTES)
        check_config(config, len(self.checkpoint.tensors), config_file)
        self.config = clean_config(config, self.checkpoint.tensors.values(), self.folder)
        self._reader = reader
        plain = plain_reading(self.checkpoint, self.config)
        if plain is None and reader is not None:
            plain = reader.read(self.checkpoint, self.config)
        self.reading = plain or named_reading(self.checkpoint)
        self.tensors: Mapping[str, TensorInfo] = {
            name: info
            for name, info in self.checkpoint.tensors.items()
            if name not in self.reading.ignored
        }
        self.architecture: Architecture = find_architecture(
            self.tensors, self.folder, self.reading.prefix
        )
        declared = layer_count(text_config(self.config))
        if declared not in (None, self.architecture.num_layers):
            raise ModelError(
                f"{self.folder}: config.json says {shown(declared)} layers, but the weights have "
                f"{self.architecture.num_layers}."
            )

    @property
    def num_layers(self) -> int:
        """The number of its layers."""
        return self.architecture.num_layers

    @property
    def is_tied(self) -> bool:
        """True if the output head is the embedding matrix and has no tensor of its own."""
        return self.reading.is_tied

    @cached_property
    def main_dtype(self) -> str:
        """The floating-point type of most of its elements, as safetensors names it."""
        elements = dict.fromkeys(FLOAT_DTYPES, 0)
        for info in self.tensors.values():
            if info.dtype in elements:
                elements[info.dtype] += info.n_elements
        return max(elements, key=lambda dtype: elements[dtype])

    def stays_precise(self, info: TensorInfo, dtype: str) -> bool:
        """True for a float32 tensor in a model of the type `dtype`: it is precise on purpose."""
        return info.dtype == "F32" and dtype == self.main_dtype != "F32"

    def cut_config(self, src_layers: Sequence[int]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Its config with only these layers, and notes on what else changes.

        Raises:
            UsageError: no config can describe these layers.
        """
        notes: tuple[str, ...] = ()
        config = self.config
        if self.reading.is_plain or self._reader is None:
            config = cut_config(config, src_layers)
        else:
            config, notes = self._reader.cut_config(self.checkpoint, config, src_layers)
        return (untied(config) if self.reading.unties else config), notes

    def check_bears_cut(self) -> None:
        """Raises a `UsageError` if no single layer can be dropped."""
        first: UsageError | None = None
        for gone in range(self.num_layers - 1, -1, -1):
            try:
                self.cut_config([i for i in range(self.num_layers) if i != gone])
            except UsageError as error:
                first = first or error
            else:
                return
        if first is not None and self.num_layers > 1:
            raise first

    def check_result(
        self,
        config: Mapping[str, Any],
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    ) -> None:
        """Compares names, types and shapes of a result's tensors with the model that its config
        describes; not needed for plain models.

        Raises:
            ModelError: a loader would make up a tensor, leave one out, or expect another shape.
        """
        if self._reader is not None and not self.reading.is_plain:
            self._reader.check_result(config, tensors)

    def statistics(self, folder: str, method: str) -> Statistics:
        """The statistics that `gptailor calibrate` wrote for it, opened once.

        Raises:
            UsageError: the folder has none for it.
            ModelError: the file is corrupt, or belongs to other weights.
        """
        if (folder, method) not in self._statistics:
            statistics = Statistics(folder, method, self.name)
            statistics.check_weights(weights_digest(self.tensors), self.folder)
            self.checkpoint.add_file(statistics.path)
            self._statistics[folder, method] = statistics
        return self._statistics[folder, method]
