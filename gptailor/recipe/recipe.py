"""A recipe: the description of one stitched model, pure data, no weights.

It reads and writes `recipe.yaml` (schema `gptailor/recipe/1`), checks every key and bound, and
converts itself to the canonical form that is built and hashed: two recipes that build the same
model have the same hash. The entry for one layer is in `entry.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptailor.errors import UsageError, plain, unknown
from gptailor.merging.registry import CALIBRATED, get_method
from gptailor.models.calibration import Calibration
from gptailor.models.untrusted import home_expanded, is_folder
from gptailor.recipe.canonical import canonical_end, canonical_layer, hashed
from gptailor.recipe.entry import Layer, Merge, Take, as_mapping, as_model, read_entry
from gptailor.recipe.repair import Repair, read_repair
from gptailor.strict_yaml import dump_yaml, load_yaml, read_text

SCHEMA = "gptailor/recipe/1"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Names used in recipes and by transformers → names used by safetensors."""

End = str | Layer
"""Embeddings or head: the model that provides them, or an entry whose `src_layer` is `NO_LAYER`."""

_KEYS = (
    "schema", "models", "base", "calibration", "dtype", "embeddings", "head", "repair", "layers",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One stitched model.

    Attributes:
        models: name → reference (a folder, or a hub id), in the file's order.
        base: the model that provides the config, the tokenizer, and whatever no entry names.
        layers: one entry for each output layer, bottom to top.
        embeddings: where the token embeddings come from.
        head: where the final norm and output head come from.
        dtype: of every floating-point tensor in the result: a key of `DTYPES`.
        calibration: the statistics that `fisher` and `regmean` use; None if there are none.
        repair: how the cuts are repaired; None if they are not.
    """

    models: Mapping[str, str]
    base: str
    layers: tuple[Layer, ...]
    embeddings: End
    head: End
    dtype: str = "bfloat16"
    calibration: Calibration | None = None
    repair: Repair | None = None
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_layers(self) -> int:
        """The number of output layers."""
        return len(self.layers)

    @property
    def src_layers(self) -> tuple[int, ...]:
        """The source layer of each output layer."""
        return tuple(layer.src_layer for layer in self.layers)

    @property
    def used_models(self) -> dict[str, str]:
        """The base and all models that contribute; the others need not exist."""
        used = {self.base}
        for entry in (self.embeddings, self.head, *self.layers):
            used.update((entry,) if isinstance(entry, str) else entry.used_models)
        if self.repair is not None:
            used.update(self.repair.used_models(self.models))
        return {name: ref for name, ref in self.models.items() if name in used}

    @property
    def used_statistics(self) -> tuple[tuple[str, str], ...]:
        """(method, model) of all statistics that are used, sorted."""
        return tuple(sorted(set(_statistics_of(*_entries(self.canonical())))))

    def statistics_of(self, entry: Layer) -> tuple[str, ...]:
        """Folder and digests of the statistics that a canonical entry uses; empty if none."""
        used = list(_statistics_of(entry))
        if self.calibration is None or not used:
            return ()
        return (self.calibration.folder, *(self.calibration.digest(*pair) for pair in used))

    def canonical(self) -> Recipe:
        """The same model in the form that is built, without anything that has no effect."""
        if "canonical" in self._cache:
            kept: Recipe = self._cache["canonical"]
            return kept
        known = self._cache.get("layers")
        layers = list(known or (canonical_layer(e, self.base, self.models) for e in self.layers))
        if layers[-1].scale != 1.0:
            layers[-1] = replace(layers[-1], scale=1.0)  # the final norm cancels it
        ends = self._cache.get("ends") or tuple(
            canonical_end(end, self.base, self.models) for end in (self.embeddings, self.head)
        )
        changed: dict[str, Any] = {"layers": tuple(layers), "_cache": {}}
        changed["embeddings"], changed["head"] = ends
        built = replace(self, **changed)
        if not any(_statistics_of(*_entries(built))):
            built = replace(built, calibration=None)
        if known is None:  # else it is quick to recompute, and a search keeps many recipes
            self._cache["canonical"] = built
        return built

    def remember_canonical(
        self, layers: Sequence[Layer], ends: tuple[End, End] | None = None
    ) -> None:
        """Saves `canonical` the work of computing entries that are already known.

        Args:
            layers: the result of `canonical_layer` for each of `layers`.
            ends: the results of `canonical_end` for embeddings and head, if known, too.
        """
        self._cache["layers"] = tuple(layers)
        if ends is not None:
            self._cache["ends"] = ends

    @property
    def hash(self) -> str:
        """SHA-256 (64 hex digits) of what the recipe builds, regardless of its models' names."""
        if "hash" not in self._cache:
            built = self.canonical()
            refs = built.models
            used = None if built.calibration is None else built.calibration.digest
            layers = [hashed(layer, refs, used) for layer in built.layers]
            ends = [
                refs[end] if isinstance(end, str) else hashed(end, refs, used)
                for end in (built.base, built.embeddings, built.head)
            ]
            ends.append(built.dtype)
            contents: list[Any] = [SCHEMA, ends, layers]
            if built.repair is not None:
                contents.append(built.repair.hashed(refs))
            text = json.dumps(contents, separators=(",", ":"))
            self._cache["hash"] = hashlib.sha256(text.encode()).hexdigest()
        digest: str = self._cache["hash"]
        return digest

    @property
    def point(self) -> str:
        """The short name of the recipe in a run: the first 8 digits of its hash."""
        return self.hash[:8]

    def to_dict(self) -> dict[str, Any]:
        """The recipe as it is written in `recipe.yaml`."""
        calibration = self.calibration
        return {
            "schema": SCHEMA,
            "models": dict(self.models),
            "base": self.base,
            **({} if calibration is None else {"calibration": _calibration_dict(calibration)}),
            "dtype": self.dtype,
            "embeddings": _end_dict(self.embeddings),
            "head": _end_dict(self.head),
            **({} if self.repair is None else {"repair": self.repair.to_dict()}),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def to_yaml(self) -> str:
        """The text of a `recipe.yaml`: keys in a fixed order, one line for each layer."""
        text = ""
        for key, value in self.to_dict().items():
            if key == "layers":
                text += "layers:\n" + "".join(f"  - {_line(layer)}\n" for layer in value)
            elif isinstance(value, dict) and key not in ("models", "repair"):
                text += f"{key}: {_line(value)}\n"
            else:
                text += dump_yaml({key: value})
        return text

    @classmethod
    def from_yaml(cls, text: str, source: str = "recipe") -> Recipe:
        """Reads a recipe; `source` is the name used in errors.

        Raises:
            UsageError: invalid YAML, an unknown or missing key, or a value outside its bounds.
        """
        return cls.from_dict(load_yaml(text, source), source)

    @classmethod
    def from_dict(
        cls, data: object, source: str = "recipe", known: KnownLayers | None = None
    ) -> Recipe:
        """Reads a recipe from a result of `to_dict`; raises like `from_yaml`.

        Args:
            data: the parsed recipe.
            source: the name used in errors.
            known: layers read before, for reading many recipes that share layers.
        """
        data = as_mapping(data, source)
        for key in data:
            if key not in _KEYS:
                raise unknown("key", key, _KEYS, source)
        if data.get("schema") != SCHEMA:
            raise UsageError(f"{source}: schema is {data.get('schema')!r}, but must be {SCHEMA!r}.")
        for key in ("models", "base", "layers"):
            if key not in data:
                raise UsageError(f"{source}: the key {key!r} is missing.")
        models = as_mapping(data["models"], f"{source}: models")
        for name, ref in models.items():
            if not isinstance(name, str):
                raise UsageError(f"{source}: models must map names to folders or hub ids.")
            if not isinstance(ref, str):
                raise UsageError(
                    f"{source}: models: {name} is {plain(repr(ref), 100)}, but must be a folder or "
                    "a hub id."
                )
            if not (name.isprintable() and ref.isprintable()):
                raise UsageError(f"{source}: models: {name!r} has characters that can't be shown.")
        base = as_model(data["base"], models, f"{source}: base")
        dtype = data.get("dtype", "bfloat16")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES, source)
        if not isinstance(data["layers"], list) or not data["layers"]:
            raise UsageError(f"{source}: layers must be a list with at least one entry.")
        entries = [(e, f"{source}: layers[{i}]") for i, e in enumerate(data["layers"])]
        canonical: list[Layer] = []
        if known is None:
            layers = [read_entry(entry, models, base, where) for entry, where in entries]
        else:
            pairs = [known.read(entry, models, base, where) for entry, where in entries]
            layers, canonical = ([pair[i] for pair in pairs] for i in range(2))
        recipe = cls(
            models=dict(models),
            base=base,
            layers=tuple(layers),
            embeddings=_read_end(data.get("embeddings", base), models, base, source, "embeddings"),
            head=_read_end(data.get("head", base), models, base, source, "head"),
            dtype=dtype,
            calibration=_read_calibration(data.get("calibration"), f"{source}: calibration"),
            repair=(
                read_repair(data["repair"], models, DTYPES, f"{source}: repair")
                if data.get("repair") is not None
                else None
            ),
        )
        if canonical:
            recipe.remember_canonical(canonical)
        return recipe

    def with_models_relative_to(self, folder: Path) -> Recipe:
        """The recipe with local folders (models, calibration) as absolute paths, from `folder`."""
        models = {name: absolute_ref(ref, folder) for name, ref in self.models.items()}
        calibration = self.calibration
        if calibration is not None:
            place = (folder / Path(calibration.folder).expanduser()).resolve()
            calibration = replace(calibration, folder=str(place))
        repair = None if self.repair is None else self.repair.relative_to(folder)
        return replace(self, models=models, calibration=calibration, repair=repair, _cache={})

    def with_repair(self, repair: Repair | None) -> Recipe:
        """The same layers, repaired this way; None for not at all."""
        if repair == self.repair:
            return self
        kept = {key: value for key, value in self._cache.items() if key in ("layers", "ends")}
        return replace(self, repair=repair, _cache=kept)

    def with_statistics_found(self) -> Recipe:
        """The recipe with the digests of the statistics now in its calibration folder.

        Raises:
            UsageError: a model's statistics are missing.
            ModelError: they are corrupt.
        """
        calibration, used = self.calibration, self.used_statistics
        if calibration is None or calibration.digests or not used:
            return self
        return replace(self, calibration=calibration.found(used), _cache={})


MAX_KNOWN_LAYERS = 50_000
"""About 100 MB; the 61,000 recipes of an hour on a thousand workers have about this many layers."""


class KnownLayers:
    """Layers that many recipes share, read and simplified once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[Layer, Layer]] = {}

    def read(
        self, entry: object, models: Mapping[str, str], base: str, where: str
    ) -> tuple[Layer, Layer]:
        """An entry as a layer, and its canonical form; raises like `Recipe.from_dict`."""
        key = base, tuple(models.items()), json.dumps(entry)
        found = self._known.get(key)
        if found is None:
            layer = read_entry(entry, models, base, where)
            if len(self._known) >= MAX_KNOWN_LAYERS:
                self._known.clear()
            found = self._known[key] = layer, canonical_layer(layer, base, models)
        return found


def _entries(recipe: Recipe) -> tuple[Layer, ...]:
    ends = (end for end in (recipe.embeddings, recipe.head) if not isinstance(end, str))
    return (*recipe.layers, *ends)


def _statistics_of(*entries: Layer) -> Iterator[tuple[str, str]]:
    """(method, model) of each source of a merge that needs statistics."""
    for entry in entries:
        for part in (entry, *(part for _, part in entry.modules)):
            if isinstance(part, Merge) and get_method(part.method).is_calibrated:
                yield from ((part.method, model) for model in part.models)


def _calibration_dict(calibration: Calibration) -> str | dict[str, Any]:
    digests: dict[str, dict[str, str]] = {}
    for method, model, digest in calibration.digests:
        digests.setdefault(method, {})[model] = digest
    return {"folder": calibration.folder, **digests} if digests else calibration.folder


def _read_calibration(value: object, where: str) -> Calibration | None:
    """`calibration: FOLDER`, or with digests: `{folder: FOLDER, fisher: {math: 1f3a…}}`."""
    if value is None:
        return None
    parts = {"folder": value} if isinstance(value, str) else dict(as_mapping(value, where))
    folder = parts.pop("folder", None)
    if not isinstance(folder, str) or not folder or not folder.isprintable():
        raise UsageError(f"{where} must name the folder that `gptailor calibrate` wrote.")
    digests = []
    for method, named in parts.items():
        if method not in CALIBRATED:
            raise unknown("key", method, ("folder", *CALIBRATED), where)
        for model, digest in as_mapping(named, f"{where}: {method}").items():
            if not (isinstance(model, str) and isinstance(digest, str)):
                raise UsageError(f"{where}: {method} must map models to digests.")
            digests.append((method, model, digest))
    return Calibration(folder, tuple(sorted(digests)))


def _end_dict(end: End) -> str | dict[str, Any]:
    return end if isinstance(end, str) else end.to_dict()


def _line(entry: Mapping[str, Any]) -> str:
    return dump_yaml(entry, in_one_line=True).strip()


def _read_end(value: object, models: Mapping[str, str], base: str, source: str, key: str) -> End:
    where = f"{source}: {key}"
    if not isinstance(value, dict) or not ("merge" in value or "take" in value):
        return as_model(value, models, where)
    end = read_entry(value, models, base, where, is_layer=False)
    return end.model if isinstance(end, Take) and not end.modules else end


def dense_recipe(
    models: Mapping[str, str], base: str, model: str, num_layers: int, dtype: str
) -> Recipe:
    """One of the models, whole, as a recipe.

    Args:
        models, base, dtype: as for `Recipe`.
        model: its name.
        num_layers: its layers.
    """
    layers = tuple(Take(model, src_layer) for src_layer in range(num_layers))
    return Recipe(models, base, layers, model, model, dtype)


def absolute_ref(ref: str, folder: Path) -> str:
    """`ref` as an absolute path, resolved from `folder`, if it names a folder; else unchanged."""
    if ref.startswith(("./", "../", "/", "~")) or is_folder(folder / ref):
        return str((folder / home_expanded(ref)).resolve())
    return ref


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a file; local models are relative to the file's folder.

    Raises:
        UsageError: the file is missing or is not a recipe.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"The recipe {path} can't be read: {reason}.") from error
    return Recipe.from_yaml(text, str(path)).with_models_relative_to(path.parent)
