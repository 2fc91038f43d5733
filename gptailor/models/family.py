"""A family: one base and its finetuned variants, opened and checked as a whole, headers only.

All candidates must have the same layers with the same shapes, the same tying of embeddings and
configs that mean the same; then any layer of one can stand in for that layer of another. What files
alone do not tell stays open here and is settled by `evaluation.family.open_family`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gptailor.errors import ModelError, UsageError, unknown
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
from gptailor.models.config_fields import Difference, differences, is_harmless
from gptailor.models.ends import Ends, find_ends
from gptailor.models.leftovers import clean_config
from gptailor.models.reading import Reader, named_reading, plain_reading
from gptailor.models.rows import has_enough_rows, is_padding, uneven_tensors
from gptailor.models.side_files import HUB_IGNORED, HUB_PATTERNS, read_vocabulary
from gptailor.models.untrusted import (
    MAX_CONFIG_BYTES,
    check_config,
    home_expanded,
    is_folder,
    read_json,
    shown,
)


class Candidate:
    """One model of a family.

    Args:
        name: its name in the configuration.
        folder: its Hugging Face folder.
        io: how weights are read, see `Checkpoint`.
        reader: tells what a loader makes of it; without one names and shapes decide.

    Attributes:
        tensors: those of its files that count.
        reading: what is known of them.

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
        """How many layers it has."""
        return self.architecture.num_layers

    @property
    def is_tied(self) -> bool:
        """True if the output head is the embedding matrix, so that it has no tensor of its own."""
        return self.reading.is_tied

    @cached_property
    def main_dtype(self) -> str:
        """The floating point type of most of its elements, as safetensors names it."""
        elements = dict.fromkeys(FLOAT_DTYPES, 0)
        for info in self.tensors.values():
            if info.dtype in elements:
                elements[info.dtype] += info.n_elements
        return max(elements, key=lambda dtype: elements[dtype])

    def stays_precise(self, info: TensorInfo, dtype: str) -> bool:
        """True for a float32 tensor among others of the type `dtype`: it is precise on purpose."""
        return info.dtype == "F32" and dtype == self.main_dtype != "F32"

    def cut_config(self, src_layers: Sequence[int]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Its config for these layers, and notes on what else changes with them.

        Raises:
            UsageError: no config can describe them.
        """
        notes: tuple[str, ...] = ()
        config = self.config
        if self.reading.is_plain or self._reader is None:
            config = cut_config(config, src_layers)
        else:
            config, notes = self._reader.cut_config(self.checkpoint, config, src_layers)
        return (untied(config) if self.reading.unties else config), notes

    def check_bears_cut(self) -> None:
        """Raises a `UsageError` if not a single layer can be dropped."""
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
        """Compares name, type and shape of a result's tensors with the model of its config, unless
        names leave nothing open.

        Raises:
            ModelError: a loader would make up a tensor, leave one out, or meet another shape.
        """
        if self._reader is not None and not self.reading.is_plain:
            self._reader.check_result(config, tensors)

    def statistics(self, folder: str, method: str) -> Statistics:
        """What `gptailor calibrate` found out about it, opened once.

        Raises:
            UsageError: there is nothing for it in the folder.
            ModelError: the file is corrupt, or belongs to other weights.
        """
        if (folder, method) not in self._statistics:
            statistics = Statistics(folder, method, self.name)
            statistics.check_weights(weights_digest(self.tensors), self.folder)
            self.checkpoint.add_file(statistics.path)
            self._statistics[folder, method] = statistics
        return self._statistics[folder, method]


class Family:
    """The candidates of a search or a recipe.

    Args:
        models: name → local folder or hub id.
        base: the name of the base.
        io: how weights are read, see `Checkpoint`.
        folders: name → where its files are, for those that are not where `models` says.
        reader: see `Candidate`.

    Attributes:
        uneven: names of embeddings and output heads that don't have as many rows in all candidates.
        open_tokenizers: names of candidates whose tokenizer's files do not show that it is the
            base's, or that each of its tokens has a row.
        open_configs: name → how the candidate's config.json differs from the base's, where the
            files alone do not tell whether that changes what is computed.
        notes: sentences on what was found and changes nothing.

    Raises:
        ModelError: a candidate is unusable, or does not fit the base.
        UsageError: the base is not among the models, or there is no such `io`.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        base: str,
        io: str | None = None,
        *,
        folders: Mapping[str, Path] = {},
        reader: Reader | None = None,
    ) -> None:
        if base not in models:
            raise unknown("model", base, models, "base")
        self.refs = dict(models)
        self.base_name = base
        places = {n: folders[n] if n in folders else resolve(ref) for n, ref in models.items()}
        self.candidates = {n: Candidate(n, place, io, reader) for n, place in places.items()}
        self.open_tokenizers: set[str] = set()
        self.open_configs: dict[str, list[Difference]] = {}
        self.notes = tuple(note for c in self.candidates.values() for note in c.reading.notes)
        for candidate in self.candidates.values():
            if candidate is not self.base:
                _check_fits(candidate, self.base)
                is_known = _check_vocabulary(candidate, self.base)
                if not is_known or not has_enough_rows(candidate, self.base):
                    self.open_tokenizers.add(candidate.name)
                found = list(differences(candidate.config, self.base.config))
                if not all(map(is_harmless, found)):
                    self.open_configs[candidate.name] = found
        self.uneven = uneven_tensors(self.candidates.values(), self.base)

    @property
    def base(self) -> Candidate:
        """The candidate that gives config, tokenizer and whatever no entry names."""
        return self.candidates[self.base_name]

    @property
    def architecture(self) -> Architecture:
        """The architecture that all candidates share."""
        return self.base.architecture

    @property
    def num_layers(self) -> int:
        """How many source layers there are."""
        return self.base.num_layers

    def layer_parameters(self, src_layer: int) -> int:
        """The parameter count of one layer."""
        names = self.architecture.layers[src_layer].values()
        return sum(self.base.tensors[name].n_elements for name in names)

    def parameters(self, src_layers: Iterable[int] | None = None, rows: int | None = None) -> int:
        """The parameter count of a model.

        Args:
            src_layers: its layers; default: all of them.
            rows: of its embeddings, where candidates differ in them; default: the base's.
        """
        chosen = range(self.num_layers) if src_layers is None else src_layers
        outside = 0
        for name in (*self.architecture.embeddings, *self.architecture.head):
            info = self.base.tensors[name]
            outside += info.n_elements
            if rows is not None and name in self.uneven:
                outside += (rows - info.shape[0]) * math.prod(info.shape[1:])
        return outside + sum(self.layer_parameters(src) for src in chosen)

    @cached_property
    def ends(self) -> Ends:
        """Which candidates have the same embeddings and head; reads them when first asked for.

        Raises:
            ModelError: a file can't be read, or changed.
        """
        return find_ends(self)

    def settle(self, notes: Iterable[str]) -> None:
        """Notes that what was open has been judged and is without effect."""
        self.open_configs, self.open_tokenizers = {}, set()
        self.notes = (*self.notes, *notes)

    def check_settled(self) -> None:
        """Raises a `ModelError` while something is open: nothing may be computed then."""
        for name in sorted(self.open_tokenizers):
            raise ModelError(
                f"{self.candidates[name].folder}: its tokenizer has other files than the base's, "
                "and only transformers can tell whether they are one: open the models by "
                "open_family."
            )
        for name, found in self.open_configs.items():
            first = next(difference for difference in found if not is_harmless(difference))
            raise ModelError(
                f"{self.candidates[name].folder}: config.json has {first}, and only transformers "
                "can tell whether that matters: open the models by open_family."
            )

    def check_intact(self) -> None:
        """Raises a `ModelError` if a file that weights were read from changed meanwhile."""
        for candidate in self.candidates.values():
            candidate.checkpoint.check_intact()

    def fingerprint(self) -> dict[str, Any]:
        """Names, sizes and times of all weight files: what a resumed search compares."""
        return {name: c.checkpoint.fingerprint() for name, c in self.candidates.items()}


def resolve(ref: str) -> Path:
    """The local folder of a model: itself, or the snapshot of a hub id `org/name[@revision]`.

    Raises:
        ModelError: there is no such folder, and it can't be downloaded.
        UsageError: the form is not supported.
    """
    path = home_expanded(ref)
    if is_folder(path):
        return path
    if "+" in ref:
        raise UsageError(
            f"{ref!r}: base+adapter is not supported yet; merge the adapter into a folder with "
            "peft's merge_and_unload first."
        )
    if ref.startswith(("/", "./", "../", "~")) or ref.count("/") != 1:
        raise ModelError(f"The model folder {ref} does not exist.")
    name, _, revision = ref.partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=list(HUB_PATTERNS),
                ignore_patterns=list(HUB_IGNORED),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{ref} is neither a folder nor a model that can be had from the hub: {reason}"
        ) from error


def _check_fits(candidate: Candidate, base: Candidate) -> None:
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


def _check_vocabulary(candidate: Candidate, base: Candidate) -> bool:
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
