"""Reads a mergekit YAML, checking every key and every value.

It opens no model. Unsupported features are refused by name, with a workaround.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptailor.errors import UsageError, unknown
from gptailor.mergekit.config import (
    MERGEKIT_METHODS,
    PASSTHROUGH,
    MergekitConfig,
    Slice,
    SliceSource,
    merged_models,
    mergekit_parameters,
    needs_base,
)
from gptailor.mergekit.setting import Setting, parse_setting
from gptailor.merging.registry import METHODS
from gptailor.models.untrusted import home_expanded, is_folder
from gptailor.recipe import DTYPES, absolute_ref
from gptailor.strict_yaml import load_yaml, read_text

MAX_MODELS = 1000
_NO_EFFECT = "int8_mask"  # how mergekit stores its masks; it does not change results
_KEYS = (
    "models", "slices", "merge_method", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source",
)  # fmt: skip
_REFUSED = {
    "modules": "modules of a multi-part model are not supported: merge the text model alone, with "
    "models or slices",
    "tokenizer": "tokenizers are not rebuilt: leave the key out to use the base's tokenizer",
    "chat_template": "chat templates are not changed: leave the key out to use the base's, then "
    "edit tokenizer_config.json of the result",
}


def read_mergekit(path: str | Path) -> MergekitConfig | None:
    """The mergekit configuration in a file; None if the file is missing or something else.

    Raises:
        UsageError: see `parse_mergekit`.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError):
        return None
    if "merge_method" not in text:  # most recipes are parsed once only
        return None
    data = load_yaml(text, str(path))
    if not isinstance(data, dict) or "merge_method" not in data or "schema" in data:
        return None
    return parse_mergekit(data, path, text)


def parse_mergekit(data: dict[Any, Any], path: Path, text: str = "") -> MergekitConfig:
    """Checks a mergekit YAML.

    Args:
        data: the parsed YAML.
        path: the file; local models are relative to its folder.
        text: the YAML itself.

    Raises:
        UsageError: a key or a value is wrong or not supported; the message names it.
    """
    source = str(path)
    for key, reason in _REFUSED.items():
        if data.get(key) is not None:
            raise UsageError(f"{source}: {key}: {reason}.")
    _check_keys(data, (*_KEYS, *_REFUSED), source)
    method = data.get("merge_method")
    if method not in MERGEKIT_METHODS:
        raise _unknown_method(method, source)
    return _Parser(data, str(method), path).config(text)


class _Parser:
    """Parses one file; holds its folder, its method, and the models found so far."""

    def __init__(self, data: dict[str, Any], method: str, path: Path) -> None:
        self.data, self.method, self.folder, self.source = data, method, path.parent, str(path)
        self.refs: dict[str, str] = {}  # reference → name
        self.private: set[str] = set()  # absolute paths in the file
        self.of_all, self.of_each = mergekit_parameters(method)

    def config(self, text: str) -> MergekitConfig:
        slices = self._slices()
        base = self.data.get("base_model")
        base_name = None if base is None else self.model(base, f"{self.source}: base_model")
        if "models" in self.data:
            slices = [_with_base(slices[0], base_name)]
        for part in slices:
            self._check_count(part, base_name)
        self._check_tokenizer(base)
        parameters = self.parameters(self.data, self.source)
        models = {name: ref for ref, name in self.refs.items()}
        return MergekitConfig(
            models=models,
            base=base_name or slices[0].models[0],
            has_base=base_name is not None,
            method=self.method,
            slices=tuple(slices),
            parameters=parameters,
            dtype=self._dtype("out_dtype") or self._dtype("dtype"),
            source=self.source,
            text=self._without_paths(text),
        )

    def _without_paths(self, text: str) -> str:
        for path in sorted(self.private, key=len, reverse=True):
            text = text.replace(path, Path(path).name)
        return text

    def _slices(self) -> list[Slice]:
        forms = [key for key in ("models", "slices") if self.data.get(key) is not None]
        if len(forms) != 1:
            found = "both" if forms else "neither"
            raise UsageError(f"{self.source} needs either 'models' or 'slices', but has {found}.")
        where = f"{self.source}: {forms[0]}"
        entries = self._list(self.data[forms[0]], where)
        if forms == ["slices"]:
            return [self._slice(entry, f"{where}[{i}]") for i, entry in enumerate(entries)]
        sources = tuple(
            self._source(entry, ("model", "parameters"), f"{where}[{i}]")
            for i, entry in enumerate(entries)
        )
        return [Slice(sources, None, {}, where)]

    def _slice(self, entry: object, where: str) -> Slice:
        entry = _mapping(entry, where)
        _check_keys(entry, ("sources", "base_model", "residual_weight", "parameters"), where)
        if entry.get("residual_weight") is not None:
            raise UsageError(
                f"{where}: residual_weight has no effect in mergekit: leave it out, or scale "
                "o_proj and down_proj with passthrough's `scale`."
            )
        base, top = entry.get("base_model"), self.data.get("base_model")
        if base is not None and (top is None or self._ref(base, where) != self._ref(top, where)):
            raise UsageError(
                f"{where}: base_model: a slice can't have a base of its own: name one base_model "
                "at the top, or stitch in two steps."
            )
        if "sources" not in entry:
            raise UsageError(f"{where}: the key 'sources' is missing.")
        sources, ranges = [], []
        for i, item in enumerate(self._list(entry["sources"], f"{where}: sources")):
            place = f"{where}: sources[{i}]"
            keys = ("model", "layer_range", "parameters")
            sources.append(self._source(item, keys, place))
            ranges.append(_layer_range(item, place))
        if len(set(ranges)) > 1:
            raise UsageError(
                f"{where}: layer_range differs among the sources, but one layer is always made of "
                "the same source layer of every model: give all sources one layer_range."
            )
        return Slice(tuple(sources), ranges[0], self.parameters(entry, where), where)

    def _source(self, entry: object, keys: tuple[str, ...], where: str) -> SliceSource:
        entry = _mapping(entry, where)
        _check_keys(entry, keys, where)
        if "model" not in entry:
            raise UsageError(f"{where}: the key 'model' is missing.")
        settings = self.parameters(entry, where, of_model=True)
        return SliceSource(self.model(entry["model"], f"{where}: model"), settings)

    def parameters(
        self, entry: Mapping[str, Any], where: str, *, of_model: bool = False
    ) -> dict[str, Setting]:
        """The settings at one level; a model can't have parameters of the whole merge."""
        place = f"{where}: parameters"
        result = {}
        for name, value in _mapping(entry.get("parameters") or {}, place).items():
            if name == _NO_EFFECT:
                continue
            if name not in (*self.of_all, *self.of_each):
                known = (*self.of_all, *self.of_each, _NO_EFFECT)
                raise unknown(f"parameter of {self.method}", name, known, place)
            if of_model and name in self.of_all:
                raise UsageError(
                    f"{place}: {name} of {self.method} can't be set for a single model (mergekit "
                    "does not look for it here): move it to the slice's or the file's parameters."
                )
            result[name] = parse_setting(value, f"{place}: {name}")
        return result

    def model(self, value: object, where: str) -> str:
        """The name of a model in the recipe, derived from the last part of its path."""
        ref = self._ref(value, where)
        if ref not in self.refs and len(self.refs) >= MAX_MODELS:
            raise UsageError(f"{where}: more than {MAX_MODELS} models are named.")
        if ref not in self.refs:
            name = stem = Path(ref).name.partition("@")[0] or "model"
            number = 1
            while name in self.refs.values():
                number += 1
                name = f"{stem}-{number}"
            self.refs[ref] = name
        return self.refs[ref]

    def _ref(self, value: object, where: str) -> str:
        """A reference as used in recipes, from mergekit's text or mapping."""
        if isinstance(value, dict):
            value = _text_of(value, where)
        if not isinstance(value, str) or not value or not value.isprintable():
            raise UsageError(f"{where} is {value!r:.60}, but must be a folder or a hub id.")
        ref = absolute_ref(value, self.folder)
        if value.startswith(("/", "~")):
            self.private.add(value)
        if "+" in value and not is_folder(Path(ref)):
            raise UsageError(
                f"{where}: {value!r}: base+lora is not supported: merge the adapter into a folder "
                "with peft's merge_and_unload first, and name that folder."
            )
        in_working_directory = home_expanded(value)  # where mergekit looks
        absolute = Path(ref).is_absolute() and is_folder(Path(ref))
        if is_folder(in_working_directory) and not absolute:
            return str(in_working_directory.resolve())
        return ref

    def _list(self, value: object, where: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise UsageError(f"{where} must be a list with at least one entry.")
        return value

    def _dtype(self, key: str) -> str | None:
        value = self.data.get(key)
        if value is None:
            return None
        name = str(value).removeprefix("torch.")
        if name not in DTYPES:
            raise unknown("dtype", value, DTYPES, f"{self.source}: {key}")
        return name

    def _check_tokenizer(self, base: object) -> None:
        value, where = self.data.get("tokenizer_source"), f"{self.source}: tokenizer_source"
        if value is None:
            return
        if value == "base" and base is None:
            raise UsageError(f"{where} is 'base', but the file names no base_model: add one.")
        if value == "union":
            raise UsageError(
                f"{where}: 'union' is not supported, because tokenizers are not merged: write "
                "'base'."
            )
        if value != "base" and (base is None or self._ref(value, where) != self._ref(base, where)):
            raise UsageError(
                f"{where}: the tokenizer always comes from base_model: write 'base', and name the "
                "model with that tokenizer as base_model."
            )

    def _check_count(self, part: Slice, base: str | None) -> None:
        """Raises a `UsageError` for a wrong number of models, or a missing base."""
        twice = [model for model, count in Counter(part.models).items() if count > 1]
        if twice:
            raise UsageError(
                f"{part.where}: {twice[0]} is named twice, and mergekit would use only the last "
                "one: name each model once."
            )
        if self.method == PASSTHROUGH:
            if len(part.sources) != 1:
                extra = " (base_model counts as one)" if base in part.models else ""
                raise UsageError(
                    f"{part.where}: passthrough takes exactly one model, not "
                    f"{len(part.sources)}{extra}: use slices, or another merge_method."
                )
            return
        method = METHODS[self.method]
        if base is None and (method.uses_base or method.starts_at_base):
            raise UsageError(f"{self.source}: {self.method} needs a base_model: name one.")
        if base is not None and needs_base(method) and base not in part.models:
            raise UsageError(
                f"{part.where}: base_model is not among the sources, and {self.method} needs its "
                "layers: add it as a source with the same layer_range."
            )
        count = len(merged_models(method, part.models, base))
        low, high = method.min_sources, method.max_sources
        if not low <= count <= high:
            wanted = f"{low} to {high}" if low != high else f"exactly {low}"
            aside = "" if base is None or method.base == "never" else " besides base_model"
            raise UsageError(
                f"{part.where}: {self.method} takes {wanted} models{aside}, not {count}."
            )


def _with_base(part: Slice, base: str | None) -> Slice:
    """The one slice of the `models:` form; a base that is not listed is added, as mergekit does."""
    if base is None or base in part.models:
        return part
    return Slice((*part.sources, SliceSource(base, {})), None, part.parameters, part.where)


def _layer_range(entry: Mapping[str, Any], where: str) -> tuple[int, int]:
    value = entry.get("layer_range")
    if isinstance(value, list) and len(value) == 2 and all(type(i) is int for i in value):
        first, end = value
        if 0 <= first < end:
            return first, end
    raise UsageError(
        f"{where}: layer_range is {value!r:.60}, but must be two integers [first, end], with the "
        "end excluded."
    )


def _text_of(value: dict[str, Any], where: str) -> str:
    """mergekit's long form of a model, `{model: {path, revision}}`, as text."""
    _check_keys(value, ("model", "lora", "override_architecture"), where)
    for key, way_out in (
        ("lora", "merge the adapter into a folder with peft's merge_and_unload first"),
        ("override_architecture", "it is not needed, so leave it out"),
    ):
        if value.get(key) is not None:
            raise UsageError(f"{where}: {key} is not supported: {way_out}.")
    inner = value.get("model")
    if isinstance(inner, dict):
        _check_keys(inner, ("path", "revision"), where)
        revision = inner.get("revision")
        inner = f"{inner.get('path')}@{revision}" if revision else inner.get("path")
    return str(inner or "")


def _check_keys(entry: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in entry:
        if key not in known:
            raise unknown("key", key, known, where)


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be a mapping of keys to values.")
    return value


def _unknown_method(method: object, source: str) -> UsageError:
    if method == "ramplus_tl":
        return UsageError(f"{source}: merge_method: ramplus_tl is not supported: ram is.")
    return unknown("merge_method", method, MERGEKIT_METHODS, source)
