"""How transformers builds a model folder and a cut of it, found without reading weights.

No table of architectures can be complete, so there is none. A model is built on torch's meta device
from the original config and from the config of a cut, and the kept layers are compared with their
source layers. To find which tensors a loader would miss or leave out, transformers loads tensors
without memory.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptailor.errors import GptailorError, ModelError, UsageError
from gptailor.evaluation.loading import build, load_config, load_shell, quiet
from gptailor.evaluation.signature import (
    Comparison,
    Constants,
    Signature,
    compare_layer,
    compare_outside,
    is_alike,
    signature,
)
from gptailor.models.architecture import cut_config, implied_lists, text_config
from gptailor.models.checkpoint import TensorInfo

_LONG = 130
"""Tokens in more than two of the usual chunks, where some models use a different attention."""

_KEPT_CUTS = 1024
"""Cuts that a structure remembers; most of them recur in a search's recipes."""


@dataclass(frozen=True)
class Cut:
    """A cut that transformers builds as intended.

    Attributes:
        config: for its config.json.
        model_config: the transformers config made from it.
        layers: for each output layer, the constants whose values differ from its source layer's.
        outside: the same for everything outside the layers.
    """

    config: dict[str, Any]
    model_config: Any
    layers: tuple[Constants, ...] = ()
    outside: Constants = field(default_factory=dict)

    @property
    def moved(self) -> set[str]:
        """Names of constants by which kept layers differ from their source layers."""
        return {
            ".".join(filter(None, place))
            for layer in self.layers
            for place, value in layer.items()
            if isinstance(value, float | torch.Tensor)
        }


class Structure:
    """The modules of one model folder.

    Args:
        folder: the model folder.
        config: the contents of its config.json.
        tensors: the tensors of its checkpoint.
        dtype: in which constants are computed; None for that of the config.

    Attributes:
        shell: the model on the meta device.
        stack: the path of its layers.
        num_layers: the number of layers.
        module_names: tensor of the files → parameter or buffer of the model, None if unused.
        converted: tensors that transformers fuses, splits or reshapes on load.

    Raises:
        ModelError: transformers can't build it, or does not keep its layers in one stack.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.folder = folder
        self._raw = dict(config)
        self._tensors = tensors
        self._dtype = dtype
        self.shell = load_shell(folder, tensors)
        self.stack = self._find_stack()
        self.num_layers = len(self.shell.get_submodule(self.stack))
        self.module_names, self.converted = module_names(self.shell, tensors)
        self._cuts: dict[tuple[int, ...], Cut | str] = {}
        self._passes: dict[frozenset[Hashable], str] = {}  # kinds of layers → why it fails

    @cached_property
    def prefix(self) -> str:
        """The part before the layer's number in the files' tensor names.

        Raises:
            ModelError: the files name the layers in several ways.
        """
        numbered = re.compile(rf"{re.escape(self.stack)}\.([0-9]+)\.")
        common: set[str] | None = None
        for name, module_name in self.module_names.items():
            if inside := numbered.match(module_name or ""):
                places = re.finditer(rf"(?:^|(?<=\.)){inside[1]}\.", name)
                found = {name[: place.start()] for place in places}
                common = found if common is None else common & found
        if not common:
            raise ModelError(
                f"{self.folder}: its files number the layers differently from transformers, so it "
                "can't be cut."
            )
        return min(common, key=len)

    def cut(self, src_layers: Sequence[int]) -> Cut:
        """Builds the model of a cut and compares its layers with their source layers.

        Args:
            src_layers: the source layer of each output layer.

        Raises:
            UsageError: no config describes it: a layer would change its kind, or transformers
                can't run it.
        """
        key = tuple(src_layers)
        if key not in self._cuts:
            if len(self._cuts) >= _KEPT_CUTS:
                self._cuts.clear()
            self._cuts[key] = self._try(key)
        found = self._cuts[key]
        if isinstance(found, str):
            raise UsageError(found)
        return found

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all layers are alike and depend neither on their index nor on the depth, so the
        layers of any cut equal their source layers."""
        probes = [(0,), (self.num_layers - 1,), tuple(range(0, self.num_layers, 2))]
        if not is_alike(self._layers, self._layers[0]):
            return False
        for probe in probes:
            try:
                config = self._resolved(self._configs(probe)[0])
                layers, outside = self._signatures(self._built(config))
            except GptailorError:
                return False
            if len(layers) != len(probe) or not is_alike(layers, self._layers[0]):
                return False
            if compare_outside(self._outside, outside) != Comparison():
                return False
        return True

    @cached_property
    def _whole(self) -> tuple[list[Signature], Signature]:
        return self._signatures(self._built(self.shell.config))

    @property
    def _layers(self) -> list[Signature]:
        return self._whole[0]

    @property
    def _outside(self) -> Signature:
        return self._whole[1]

    @cached_property
    def _implied(self) -> dict[str, list[Any]]:
        """Per-layer lists that the config leaves to its class."""
        resolved = self.shell.config.get_text_config().to_dict()
        return implied_lists(text_config(self._raw), resolved, self.num_layers)

    def _configs(self, src_layers: Sequence[int]) -> list[dict[str, Any]]:
        """Proposals for the config.json of a cut, the one closest to the file first."""
        if list(src_layers) == list(range(self.num_layers)):
            return [dict(self._raw)]
        proposals = [cut_config(self._raw, src_layers, {}, self.num_layers)]
        if self._implied:
            proposals.insert(0, cut_config(self._raw, src_layers, self._implied, self.num_layers))
        resolved = json.loads(json.dumps(self.shell.config.to_dict(), default=str))
        return [*proposals, cut_config(resolved, src_layers, {}, self.num_layers)]

    def _try(self, src_layers: tuple[int, ...]) -> Cut | str:
        reasons = []
        for proposal in self._configs(src_layers):
            found = self._compared(proposal, src_layers)
            if isinstance(found, Cut):
                return found
            reasons.append(found)
        return reasons[0]

    def _compared(self, proposal: dict[str, Any], src_layers: tuple[int, ...]) -> Cut | str:
        kept = _shown(src_layers)
        try:
            config = self._resolved(proposal)
            model = self._built(config)
        except GptailorError as error:
            return f"{self.folder} can't be cut to the layers {kept}: {error}"
        if type(config) is not type(self.shell.config):
            return f"{self.folder} can't be cut to the layers {kept}: it would be another model."
        layers, outside = self._signatures(model)
        if len(layers) != len(src_layers):
            return (
                f"{self.folder} can't be cut: config.json gives the number of layers in a way "
                "that gptailor does not know."
            )
        constants = []
        for out_layer, src_layer in enumerate(src_layers):
            compared = compare_layer(self._layers, layers, src_layers, out_layer)
            if compared.problems:
                return (
                    f"{self.folder} can't be cut to the layers {kept}: layer {out_layer} of the "
                    f"result would not be what layer {src_layer} is ({compared.problems[0]}), as "
                    "its kind follows from its index and config.json can't change that; choose "
                    "layers that each keep their kind."
                )
            constants.append(compared.constants)
        around = compare_outside(self._outside, outside)
        if around.problems:
            return (
                f"{self.folder} can't be cut to the layers {kept}: outside the layers "
                f"{around.problems[0]}, which depends on the number of layers."
            )
        kinds = frozenset(layer.kind for layer in layers)
        if kinds not in self._passes:
            self._passes[kinds] = _dry_pass(config)[0] if self._runs else ""
        if reason := self._passes[kinds]:
            return f"{self.folder} can't be cut to the layers {kept}: it would not run: {reason}"
        return Cut(proposal, config, tuple(constants), around.constants)

    def check_steady(self, model: Any = None) -> None:
        """Raises a `ModelError` if a forward pass changes the model itself, or depends on chance.

        Args:
            model: with weights, for the few models that can't run without values; None: only the
                others are checked.
        """
        reason, changed = self._whole_pass
        if reason and model is not None:
            most = getattr(self.shell.config.get_text_config(), "max_position_embeddings", None)
            changed = _pass(model)[1] or _pass(model, min(most or _LONG, _LONG))[1]
        if changed:
            kind = self.shell.config.model_type
            raise ModelError(
                f"{self.folder}: a model of this type ({kind}) {changed} while it runs, so a "
                "search can't compare its recipes; it can still be stitched."
            )

    @property
    def _runs(self) -> bool:
        """Whether a pass of a cut without values is meaningful: the whole model's must succeed."""
        return not self._whole_pass[0]

    @cached_property
    def _whole_pass(self) -> tuple[str, str]:
        return _dry_pass(self.shell.config)

    def _resolved(self, proposal: Mapping[str, Any]) -> Any:
        """transformers' config of a config.json; uses a file, as some values only survive there."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(proposal))
            try:
                return load_config(Path(folder))
            except ModelError as error:
                raise ModelError(str(error).replace(folder, str(self.folder))) from error

    def _built(self, config: Any) -> Any:
        return build(config, self.folder, self._dtype)

    def _signatures(self, model: nn.Module) -> tuple[list[Signature], Signature]:
        layers = model.get_submodule(self.stack)
        assert isinstance(layers, nn.ModuleList)
        return [signature(layer) for layer in layers], signature(model, without=self.stack)

    def _find_stack(self) -> str:
        """The path of the layers: the one list of modules whose length is the layer count.

        Raises:
            ModelError: there is none, or several.
        """
        text = self.shell.config.get_text_config()
        declared = int(getattr(text, "num_hidden_layers", None) or 0)
        lists = _lists_of(self.shell, declared)
        if len(lists) > 1:
            fewer = self._raw_with(declared - 1) if declared > 1 else None
            if fewer is not None:
                lists = [p for p in lists if p in _lists_of(fewer, declared - 1)]
        if len(lists) != 1:
            where = f"in {len(lists)} lists ({', '.join(lists)})" if lists else "elsewhere"
            raise ModelError(
                f"{self.folder}: transformers keeps its {declared} layers {where}, but gptailor "
                "only cuts models with a single stack of layers."
            )
        return lists[0]

    def _raw_with(self, num_layers: int) -> Any:
        """The model with only the first `num_layers` layers; None if that can't be built."""
        try:
            config = cut_config(self._raw, range(num_layers), {}, num_layers + 1)
            return build(self._resolved(config), self.folder, None)
        except GptailorError:
            return None


def _lists_of(model: nn.Module, length: int) -> list[str]:
    """Paths of the module lists of that length that are not nested in another one."""
    found: list[str] = []
    for path, module in model.named_modules():
        is_inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == length and not is_inside:
            found.append(path)
    return found


def module_names(
    shell: Any, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, str | None], set[str]]:
    """Maps tensors to parameters or buffers with transformers' own renaming.

    Args:
        shell: the model; its parameters may be on the meta device.
        tensors: the tensors of the files.

    Returns:
        What each tensor becomes, None if it is left out; and the names of tensors that are fused,
        split or reshaped on load, which are mapped to the first parameter that they become.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(shell)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    known = {**dict(shell.named_parameters(remove_duplicate=False)), **shell.state_dict()}
    prefix = shell.base_model_prefix
    names: dict[str, str | None] = {}
    converted = set()
    for name in sorted(tensors, key=dot_natural_key):  # some renamings depend on the order
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], prefix, known)
        names[name] = target if target in known else None
        if pattern is not None and target in known:
            converted.add(name)
    return names, converted


def _dry_pass(config: Any) -> tuple[str, str]:
    """`_pass` of the model of a config on the meta device, without values."""
    from transformers import AutoModelForCausalLM

    reason = ""
    for kwargs in ({"experts_implementation": "batched_mm"}, {}):  # other kinds need values
        try:
            with quiet(), torch.device("meta"):
                model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **kwargs).eval()
        except Exception as error:  # whatever transformers raises
            found = (str(error).strip().splitlines() or [type(error).__name__])[0]
        else:
            found, changed = _pass(model)
            if not found:
                return "", changed
        reason = reason or found
    return reason, ""


def _pass(model: Any, num_tokens: int = 4) -> tuple[str, str]:
    """Runs a forward pass of a few tokens.

    Args:
        model: on any device.
        num_tokens: how many tokens.

    Returns:
        Why it fails, or empty; why two passes can differ, as a clause, or empty.
    """
    versions = {name: p._version for name, p in model.named_parameters()}
    modules = {path: type(module) for path, module in model.named_modules()}
    device = next(model.parameters()).device
    chance = _Chance()  # type: ignore[no-untyped-call]
    try:
        with quiet(), torch.no_grad(), chance:
            model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long, device=device))
    except Exception as error:  # whatever the model's own code raises
        return (str(error).strip().splitlines() or [type(error).__name__])[0], ""
    for name, parameter in model.named_parameters():
        if versions.get(name, parameter._version) != parameter._version:
            return "", f"writes into its own weights ({name})"
    for path, module in model.named_modules():
        if modules.get(path) is not type(module):
            return "", f"replaces its own modules ({path})"
    return "", f"draws random numbers ({chance.drawn})" if chance.drawn else ""


class _Chance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Detects whether an operation draws random numbers; `drawn` names it."""

    drawn = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # fused attention has the tag because of dropout, which is off in evaluation
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.name():
            self.drawn = func.name()
        return func(*args, **(kwargs or {}))


def _shown(src_layers: Sequence[int]) -> str:
    """Layers as ranges: 0-3, 5."""
    runs: list[list[int]] = []
    for src in src_layers:
        if runs and src == runs[-1][-1] + 1:
            runs[-1].append(src)
        else:
            runs.append([src])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
