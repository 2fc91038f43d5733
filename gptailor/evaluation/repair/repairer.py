"""The repair of an assembled model, layer by layer from the bottom, with its own states.

In a layer that is repaired, the last projection that writes to the residual stream is fitted. With
its inputs x and the layer's output y, the change D of its weight minimises

    Σₜ wₜ |S[d]ₜ − yₜ − xₜ D|² + λ · mean(diag G) |D|²,   wₜ = 1 / mean(S[d]ₜ²),   G = Σₜ wₜ xₜᵀ xₜ

where d is the source layer that the next kept layer comes from, and S[d] the teacher's state that
enters it. Norms that write to the stream are fitted after the projection. The layers above then see
the repaired states. Each group of documents has the same share of all weights wₜ.

ReplaceMe (arXiv 2505.02819) fits one map behind the last writer, from one model, in one place.

Shapes: B sequences, T tokens, N tokens that count, F inputs of writers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gptailor.errors import ModelError
from gptailor.evaluation.lm import ResidentLM
from gptailor.evaluation.repair.layer_error import LayerError, relative_error
from gptailor.evaluation.repair.reading import Reading
from gptailor.evaluation.repair.replay import check_replay, entering, run_layer, trace
from gptailor.evaluation.repair.solve import RidgeRegression, solve_channels
from gptailor.evaluation.repair.states_cache import Prefix, StatesCache
from gptailor.evaluation.repair.targets import Lesson
from gptailor.evaluation.repair.writers import Writer, find_writers, inputs_of
from gptailor.evaluation.resident import ResidentModel
from gptailor.recipe import Recipe
from gptailor.recipe.repair import Repair, repaired_layers

PROBED_ROWS = 4
"""Sequences that a probe of the architecture runs."""


@dataclass
class _Fit:
    """One layer while it is fitted.

    Attributes:
        outputs: the layer's output for each batch, (B, T, H).
        inputs: for each batch, writer → its input, (B, T, F).
    """

    outputs: list[torch.Tensor]
    inputs: list[dict[str, torch.Tensor]]


class Repairer:
    """Repairs recipes of one family.

    Args:
        resident: has assembled the recipe to repair.
        lm: runs it.
        cache_bytes: memory for states and weights of repaired lower layers, which recipes share.

    Attributes:
        num_tokens: tokens that went through a layer so far, divided by the number of layers of the
            family: comparable to tokens that went through the model.
    """

    def __init__(self, resident: ResidentModel, lm: ResidentLM, cache_bytes: int) -> None:
        self._resident = resident
        self._lm = lm
        self._writers: dict[tuple[str, str], list[tuple[Writer, ...]]] = {}
        self._is_checked = False
        self._cache = StatesCache(cache_bytes)
        self._layer_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that went through layers so far, in units of the whole model."""
        return self._layer_tokens // self._resident.family.num_layers

    @torch.no_grad()
    def look(self, dense: Recipe, reading: Reading) -> None:
        """Finds the writers of every source layer, if they are not yet known.

        They are looked for in a model that no recipe changes, as a repair must not depend on the
        recipes that were repaired before, not even in the last digit of a gain.

        Args:
            dense: a candidate, uncut; it may be assembled.
            reading: what is read.

        Raises:
            ModelError: the architecture can't be repaired.
        """
        key = reading.digest, dense.dtype
        if key in self._writers:
            return
        self._resident.assemble(dense)
        layers = self._resident.layers()
        probed_BT = reading.batches[0].input_BT[:PROBED_ROWS]
        seen = trace(self._lm, layers, probed_BT)
        check_replay(self._lm, layers, seen.arguments, probed_BT)
        found = [
            find_writers(layer, state, given)
            for layer, state, given in zip(layers, seen.states, seen.arguments, strict=False)
        ]
        if not any(found):
            raise ModelError(
                "No layer of this architecture has a projection or norm that writes to the "
                "residual stream, so a cut of it can't be repaired: leave repair out."
            )
        self._writers[key] = found

    @torch.no_grad()
    def repair(self, recipe: Recipe, lessons: Sequence[Lesson]) -> Prefix:
        """Repairs the assembled model in place.

        Args:
            recipe: the recipe that is assembled, with its repair, whose reading was looked at.
            lessons: of its teachers.

        Returns:
            The new parameters and the errors of each layer that was fitted.

        Raises:
            FloatingPointError: states are not finite, a system can't be solved, or a weight
                becomes too large for the recipe's dtype.
            ModelError: the architecture can't be repaired.
        """
        recipe = recipe.canonical()
        repair = recipe.repair
        assert repair is not None
        self._check(recipe, lessons)
        depths = [*recipe.src_layers[1:], self._resident.family.num_layers]
        chosen = repaired_layers(recipe.src_layers, depths[-1], repair.layers)
        errors: list[LayerError] = []
        found = self._cache.longest(recipe, depths)
        if found is None:
            states = [self._entering(lesson) for lesson in lessons]
            begin, changed = 0, dict[int, dict[str, nn.Parameter]]()
        else:
            states, begin = list(found.states), found.num_layers
            changed, errors = dict(found.changed), list(found.errors)
            for out_layer, parameters in changed.items():
                self._resident.replace(out_layer, parameters)
        last = max((j for j, is_chosen in enumerate(chosen) if is_chosen), default=-1)
        for out_layer in range(begin, last + 1):
            src_layer, depth = recipe.src_layers[out_layer], depths[out_layer]
            if chosen[out_layer]:
                states, new, error = self._fitted(recipe, repair, out_layer, depth, states, lessons)
                if new:
                    changed[out_layer] = new
                if error is not None:
                    errors.append(LayerError(out_layer, *error))
            else:
                states = self._passed(out_layer, src_layer, states, lessons)
            done = Prefix(out_layer + 1, tuple(states), dict(changed), tuple(errors))
            self._cache.keep(recipe, depths, done)
        return Prefix(recipe.num_layers, (), changed, tuple(errors))

    def _check(self, recipe: Recipe, lessons: Sequence[Lesson]) -> None:
        """Checks once that single layers compute what the model computes."""
        if self._is_checked:
            return
        first = lessons[0]
        layers = self._resident.layers()
        given = [first.arguments[src_layer] for src_layer in recipe.src_layers]
        check_replay(self._lm, layers, given, first.batch.input_BT)
        self._is_checked = True

    def _entering(self, lesson: Lesson) -> torch.Tensor:
        return entering(self._lm, self._resident.layers()[0], lesson.batch.input_BT)

    def _passed(
        self,
        out_layer: int,
        src_layer: int,
        states: Sequence[torch.Tensor],
        lessons: Sequence[Lesson],
    ) -> list[torch.Tensor]:
        layer = self._resident.layers()[out_layer]
        self._layer_tokens += sum(lesson.batch.input_BT.numel() for lesson in lessons)
        return [
            run_layer(layer, state, lesson.arguments[src_layer])
            for state, lesson in zip(states, lessons, strict=True)
        ]

    def _fitted(
        self,
        recipe: Recipe,
        repair: Repair,
        out_layer: int,
        depth: int,
        states: Sequence[torch.Tensor],
        lessons: Sequence[Lesson],
    ) -> tuple[list[torch.Tensor], dict[str, nn.Parameter], tuple[float, float] | None]:
        """Fits one layer; returns its outputs, new parameters, and the errors before and after.

        There are no new parameters if they would not help, which can be because of what stands
        behind the writers; there are no errors, either, if there is no writer.
        """
        src_layer = recipe.src_layers[out_layer]
        writers = self._writers[repair.calibration.digest, recipe.dtype][src_layer]
        if not writers:
            return self._passed(out_layer, src_layer, states, lessons), {}, None
        norms = [w for w in writers if w.layout == "channel"]
        stages = [stage for stage in ([w for w in writers if w not in norms][-1:], norms) if stage]
        new: dict[str, nn.Parameter] = {}
        old: dict[str, nn.Parameter] = {}
        unchanged: list[torch.Tensor] = []
        before = 0.0
        for number, stage in enumerate(stages):
            run = self._run(out_layer, src_layer, stage, states, lessons)
            if number == 0:
                unchanged, before = run.outputs, relative_error(run.outputs, lessons, depth)
            if stage is norms:
                changes = self._norm_changes(out_layer, norms, run, lessons, depth, repair.ridge)
            else:
                changes = self._changes(out_layer, stage[0], run, lessons, depth, repair.ridge)
            changed = self._rounded(recipe, out_layer, changes)
            is_end = number == len(stages) - 1
            is_added = stage is not norms and stage[0].is_last
            if is_end and is_added:
                states = self._corrected(out_layer, stage[0], run, changed)
            layer = self._resident.layers()[out_layer]
            old = {name: layer.get_parameter(name) for name in changed} | old
            self._resident.replace(out_layer, changed)
            new |= changed
            if is_end and not is_added:
                states = self._passed(out_layer, src_layer, states, lessons)
        after = relative_error(states, lessons, depth)
        if after > before:
            self._resident.replace(out_layer, old)
            return unchanged, {}, (before, before)
        return list(states), new, (before, after)

    def _run(
        self,
        out_layer: int,
        src_layer: int,
        stage: Sequence[Writer],
        states: Sequence[torch.Tensor],
        lessons: Sequence[Lesson],
    ) -> _Fit:
        layer = self._resident.layers()[out_layer]
        fit = _Fit([], [])
        for state, lesson in zip(states, lessons, strict=True):
            with inputs_of(layer, [writer.path for writer in stage]) as kept:
                fit.outputs.append(run_layer(layer, state, lesson.arguments[src_layer]))
            shape = state.shape[:2]  # some layers flatten it
            fit.inputs.append({path: x.reshape(*shape, x.shape[-1]) for path, x in kept.items()})
            self._layer_tokens += lesson.batch.input_BT.numel()
        return fit

    def _changes(
        self,
        out_layer: int,
        writer: Writer,
        fit: _Fit,
        lessons: Sequence[Lesson],
        depth: int,
        ridge: float,
    ) -> dict[str, torch.Tensor]:
        """The change of a projection's weight, and of its bias if it has one, float32."""
        part = self._resident.layers()[out_layer].get_submodule(writer.path)
        device = fit.outputs[0].device
        has_bias = getattr(part, "bias", None) is not None
        width = fit.inputs[0][writer.path].shape[-1]
        hidden_size = fit.outputs[0].shape[-1]
        num_tokens = sum(lesson.num_tokens for lesson in lessons)
        system = RidgeRegression(width + has_bias, hidden_size, num_tokens, device, ridge)
        for output, inputs, lesson in zip(fit.outputs, fit.inputs, lessons, strict=True):
            x_NF = lesson.counted(inputs[writer.path]) * writer.gain
            if has_bias:
                x_NF = torch.cat([x_NF, torch.full_like(x_NF[:, :1], writer.gain)], 1)
            system.add(x_NF, lesson.residual(output, depth), lesson.weights(depth, device))
        solved_FH = system.solve()
        change_FH = solved_FH[:width]
        weight = change_FH.T if writer.layout == "out_in" else change_FH
        changes = {writer.weight: weight}
        if has_bias:
            changes[f"{writer.path}.bias"] = solved_FH[-1]
        return changes

    def _norm_changes(
        self,
        out_layer: int,
        stage: Sequence[Writer],
        fit: _Fit,
        lessons: Sequence[Lesson],
        depth: int,
        ridge: float,
    ) -> dict[str, torch.Tensor]:
        """The change of each norm's weight, float32."""
        layer = self._resident.layers()[out_layer]
        device = fit.outputs[0].device
        x, r, w = [], [], []
        for output, inputs, lesson in zip(fit.outputs, fit.inputs, lessons, strict=True):
            units = [_unit_output(layer.get_submodule(n.path), inputs[n.path]) for n in stage]
            gains = [lesson.counted(unit) * n.gain for unit, n in zip(units, stage, strict=True)]
            x.append(torch.stack(gains))
            r.append(lesson.residual(output, depth))
            w.append(lesson.weights(depth, device))
        solved_KH = solve_channels(torch.cat(x, 1), torch.cat(r), torch.cat(w), ridge)
        return {n.weight: change for n, change in zip(stage, solved_KH, strict=True)}

    def _rounded(
        self, recipe: Recipe, out_layer: int, changes: Mapping[str, torch.Tensor]
    ) -> dict[str, nn.Parameter]:
        """The changed parameters, rounded as they would be in a file, then cast as they run."""
        layer = self._resident.layers()[out_layer]
        dtype: torch.dtype = getattr(torch, recipe.dtype)
        new = {}
        for name, change in changes.items():
            old = layer.get_parameter(name)
            exact = old.float() + change.to(old.device)
            is_precise = old.dtype is torch.float32 and layer_dtype(layer) is not torch.float32
            value = exact if is_precise else exact.to(dtype)
            if not bool(torch.isfinite(value).all()):
                raise FloatingPointError(
                    f"the repaired {name} of layer {out_layer} is too large for {recipe.dtype}"
                )
            new[name] = nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=False)
        return new

    def _corrected(
        self,
        out_layer: int,
        writer: Writer,
        fit: _Fit,
        changed: Mapping[str, nn.Parameter],
    ) -> list[torch.Tensor]:
        """The layer's outputs with a writer's new weights, on which nothing else in it depends."""
        layer = self._resident.layers()[out_layer]
        old = layer.get_parameter(writer.weight)
        step = (changed[writer.weight].float() - old.float()) * writer.gain
        step_IO = (step if writer.layout == "in_out" else step.T).to(old.dtype)
        bias = f"{writer.path}.bias"
        shift: torch.Tensor | float = 0.0
        if bias in changed:
            shift = (changed[bias].float() - layer.get_parameter(bias).float()) * writer.gain
        return [
            (output.float() + (inputs[writer.path] @ step_IO).float() + shift).to(output.dtype)
            for output, inputs in zip(fit.outputs, fit.inputs, strict=True)
        ]


def layer_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of most of a layer's parameters."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in layer.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=sizes.__getitem__)


def _unit_output(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a norm's output gains for each unit of its weight: it is affine in the weight."""
    kept = norm.get_parameter("weight")
    try:
        norm.weight = nn.Parameter(torch.ones_like(kept), requires_grad=False)
        one = norm(x)
        norm.weight = nn.Parameter(torch.zeros_like(kept), requires_grad=False)
        zero = norm(x)
    finally:
        norm.weight = kept
    difference: torch.Tensor = one - zero
    return difference
