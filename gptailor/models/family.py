"""A family: one base and its finetuned variants, opened and checked as a whole, headers only.

All candidates must have the same layers with the same shapes, the same tying of embeddings, and
configs that mean the same; then a layer of one can replace the same layer of another. Questions
that the files alone can't answer stay open here and are settled by
`evaluation.family.open_family`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from gptailor.errors import ModelError, UsageError, unknown
from gptailor.models.architecture import Architecture
from gptailor.models.candidate import Candidate
from gptailor.models.compatibility import check_fits, check_vocabulary
from gptailor.models.config_fields import Difference, differences, is_harmless
from gptailor.models.ends import Ends, find_ends
from gptailor.models.reading import Reader
from gptailor.models.rows import has_enough_rows, uneven_tensors
from gptailor.models.side_files import HUB_IGNORED, HUB_PATTERNS
from gptailor.models.untrusted import home_expanded, is_folder


class Family:
    """The candidates of a search or a recipe.

    Args:
        models: name → local folder or hub id.
        base: the name of the base.
        io: how weights are read, see `Checkpoint`.
        folders: name → where its files are, for models that are not where `models` says.
        reader: see `Candidate`.

    Attributes:
        uneven: names of embeddings and output heads whose number of rows differs among candidates.
        open_tokenizers: names of candidates whose files do not show that their tokenizer is the
            base's, or that each of its tokens has a row.
        open_configs: name → how the candidate's config.json differs from the base's, if the files
            alone do not tell whether that changes what is computed.
        notes: sentences about findings without consequences.

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
                check_fits(candidate, self.base)
                is_known = check_vocabulary(candidate, self.base)
                if not is_known or not has_enough_rows(candidate, self.base):
                    self.open_tokenizers.add(candidate.name)
                found = list(differences(candidate.config, self.base.config))
                if not all(map(is_harmless, found)):
                    self.open_configs[candidate.name] = found
        self.uneven = uneven_tensors(self.candidates.values(), self.base)

    @property
    def base(self) -> Candidate:
        """The candidate that provides the config, the tokenizer, and whatever no entry names."""
        return self.candidates[self.base_name]

    @property
    def architecture(self) -> Architecture:
        """The architecture that all candidates share."""
        return self.base.architecture

    @property
    def num_layers(self) -> int:
        """The number of source layers."""
        return self.base.num_layers

    def layer_parameters(self, src_layer: int) -> int:
        """The parameter count of one layer."""
        names = self.architecture.layers[src_layer].values()
        return sum(self.base.tensors[name].n_elements for name in names)

    def parameters(self, src_layers: Iterable[int] | None = None, rows: int | None = None) -> int:
        """The parameter count of a model.

        Args:
            src_layers: its layers; default: all of them.
            rows: the number of rows of its embeddings, if candidates differ in it; default: the
                base's.
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
        """Which candidates have the same embeddings and head; reads the tensors on first use.

        Raises:
            ModelError: a file can't be read, or has changed.
        """
        return find_ends(self.candidates, self.base)

    def settle(self, notes: Iterable[str]) -> None:
        """Records that all open questions have been examined and make no difference."""
        self.open_configs, self.open_tokenizers = {}, set()
        self.notes = (*self.notes, *notes)

    def check_settled(self) -> None:
        """Raises a `ModelError` while a question is open; until then nothing may be computed."""
        for name in sorted(self.open_tokenizers):
            raise ModelError(
                f"{self.candidates[name].folder}: its tokenizer has other files than the base's, "
                "and only transformers can tell whether the two are equal: open the models with "
                "open_family."
            )
        for name, found in self.open_configs.items():
            first = next(difference for difference in found if not is_harmless(difference))
            raise ModelError(
                f"{self.candidates[name].folder}: config.json has {first}, and only transformers "
                "can tell whether that matters: open the models with open_family."
            )

    def check_intact(self) -> None:
        """Raises a `ModelError` if a file that weights were read from has changed since."""
        for candidate in self.candidates.values():
            candidate.checkpoint.check_intact()

    def fingerprint(self) -> dict[str, Any]:
        """Names, sizes and times of all weight files; a resumed search compares them."""
        return {name: c.checkpoint.fingerprint() for name, c in self.candidates.items()}


def resolve(ref: str) -> Path:
    """The local folder of a model: `ref` itself, or the snapshot of a hub id
    `org/name[@revision]`.

    Raises:
        ModelError: there is no such folder, and the model can't be downloaded.
        UsageError: this form of reference is not supported.
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
            f"{ref} is neither a folder nor a model that the hub provides: {reason}"
        ) from error
