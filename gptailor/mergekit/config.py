"""A mergekit configuration as data (models, slices, settings), and the inputs of its methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gptailor.mergekit.setting import Setting
from gptailor.merging.registry import METHODS, Method

PASSTHROUGH = "passthrough"
_SHARED = (method for method in METHODS.values() if method.in_mergekit)
MERGEKIT_METHODS = (
    PASSTHROUGH,
    *(method.name for method in sorted(_SHARED, key=lambda method: method.uses_base)),
)
"""The supported mergekit methods; all but passthrough have the same name in the registry.

Methods that only gptailor has, such as average, are left out, so that a YAML means the same in both
programs.
"""


@dataclass(frozen=True)
class SliceSource:
    """One model in a slice, under its name in the recipe."""

    model: str
    parameters: Mapping[str, Setting]


@dataclass(frozen=True)
class Slice:
    """Consecutive output layers, made of the same source layers of each model.

    Attributes:
        sources: at least one; the base is where mergekit puts it.
        layer_range: half-open range of source layers; None for all of them.
        parameters: the slice's own settings.
        where: its place in the file, for errors.
    """

    sources: tuple[SliceSource, ...]
    layer_range: tuple[int, int] | None
    parameters: Mapping[str, Setting]
    where: str

    @property
    def models(self) -> tuple[str, ...]:
        """The names of its models."""
        return tuple(source.model for source in self.sources)


@dataclass(frozen=True)
class MergekitConfig:
    """A mergekit configuration.

    Attributes:
        models: name → reference, in the file's order; the base comes last if it is named only as
            the base.
        base: the model that provides config and tokenizer: base_model, or else the first model.
        has_base: True if the file names a base_model.
        method: a name of `MERGEKIT_METHODS`.
        slices: bottom to top; the `models:` form is one slice.
        parameters: the global settings.
        dtype: of the result; None for that of the models' tensors.
        source: the file, for errors.
        text: the file's text for a model card, with absolute paths cut to their last part.
    """

    models: Mapping[str, str]
    base: str
    has_base: bool
    method: str
    slices: tuple[Slice, ...]
    parameters: Mapping[str, Setting]
    dtype: str | None
    source: str
    text: str


def mergekit_parameters(method: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a method's parameters: (those of the whole merge, those of each model)."""
    if method == PASSTHROUGH:
        return (), ("scale",)
    declared = [p for p in METHODS[method].parameters if p.in_mergekit]
    of_all = tuple(p.name for p in declared if not p.per_source)
    of_each = tuple(p.name for p in declared if p.per_source)
    return of_all, (("weight", *of_each) if METHODS[method].weighted else of_each)


def needs_base(method: Method) -> bool:
    """True if mergekit gives the base_model, if there is one, a special role."""
    return method.base != "never" or method.starts_at_base


def merged_models(method: Method, models: Iterable[str], base: str | None) -> tuple[str, ...]:
    """The models that a method merges, without the base if the formula uses it separately."""
    if base is None or not needs_base(method):
        return tuple(models)
    others = tuple(model for model in models if model != base)
    return (base, *others) if method.starts_at_base else others
