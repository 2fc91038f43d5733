"""A slow repair in float64: one sequence at a time, every pass from the start."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gptailor.evaluation.repair.reading import Reading

Rows = list[tuple[str, torch.Tensor, torch.Tensor]]
"""Group, tokens, and which of them count, of each sequence."""
Part = tuple[str, str, float]
"""Path, layout and gain of a writer."""


def open_exact(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()


def rows_of(reading: Reading) -> Rows:
    """Sequences without padding."""
    found = []
    for batch in reading.batches:
        for tokens, counts in zip(batch.input_BT, batch.counts_BT, strict=True):
            length = int(counts.nonzero()[-1]) + 1
            found.append((batch.group, tokens[:length], counts[:length]))
    return found


def stack(model: Any) -> tuple[nn.Module, str]:
    """The module that holds the layers, and their name in it."""
    count = model.config.num_hidden_layers
    return next(
        (module, name)
        for module in model.modules()
        for name, part in module.named_children()
        if isinstance(part, nn.ModuleList) and len(part) == count
    )


def layers_of(model: Any) -> list[nn.Module]:
    parent, name = stack(model)
    return list(getattr(parent, name))


def cut(model: Any, src_layers: Sequence[int]) -> Any:
    """A copy with only some layers."""
    result = copy.deepcopy(model)
    parent, name = stack(result)
    layers = [copy.deepcopy(getattr(parent, name)[src_layer]) for src_layer in src_layers]
    setattr(parent, name, nn.ModuleList(layers))
    result.config.num_hidden_layers = len(layers)
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    return result


@torch.no_grad()
def states(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What enters each layer, and what leaves the last one, (T, H) each."""
    found: list[torch.Tensor] = []
    layers = layers_of(model)
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: found.append((*args, *kwargs.values())[0][0]),
            with_kwargs=True,
        )
        for layer in layers
    ]
    hooks.append(
        layers[-1].register_forward_hook(
            lambda module, args, output: found.append(
                (output if isinstance(output, torch.Tensor) else output[0])[0]
            )
        )
    )
    model(input_ids=tokens[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def features(model: Any, out_layer: int, part: Part, tokens: torch.Tensor) -> torch.Tensor:
    """What each unit of a change of a part's parameters adds to the layer's output, (T, F).

    A projection has its inputs and, if it has a bias, a 1; a norm its normalized input.
    """
    path, layout, gain = part
    found: list[torch.Tensor] = []
    module: Any = layers_of(model)[out_layer].get_submodule(path)
    hook = module.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    model(input_ids=tokens[None], use_cache=False)
    hook.remove()
    x = found[0].reshape(len(tokens), -1)
    if layout == "channel":
        epsilon = getattr(module, "eps", None) or module.variance_epsilon
        size: torch.Tensor = (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
        return gain * x / size
    return gain * x


def repair(
    student: Any,
    src_layers: Sequence[int],
    teachers: Mapping[str, Any],
    rows: Rows,
    ridge: float,
    chosen: Sequence[bool],
    writers: Sequence[Part],
) -> list[tuple[float, float]]:
    """Repairs a cut model in place.

    Args:
        student: the result of `cut`.
        src_layers: its layers.
        teachers: group → model.
        rows: what is read; each group counts as much as any other.
        ridge: relative to the mean of the diagonal.
        chosen: for each layer, whether it is repaired.
        writers: of each layer, in their order.

    Returns:
        The relative errors before and after of each layer that is repaired.
    """
    lessons = [states(teachers[group], tokens) for group, tokens, _ in rows]
    depths = [*src_layers[1:], len(lessons[0]) - 1]
    counted: dict[str, int] = {}
    for group, _, counts in rows:
        counted[group] = counted.get(group, 0) + int(counts.sum())
    shares = [1.0 / counted[group] for group, *_ in rows]
    errors = []
    for out_layer, depth in enumerate(depths):
        if not chosen[out_layer]:
            continue
        targets = [
            lesson[depth][counts] for (*_, counts), lesson in zip(rows, lessons, strict=True)
        ]
        roots = [
            (share / (t.pow(2).mean(-1, keepdim=True) + 1e-6)).sqrt()
            for t, share in zip(targets, shares, strict=True)
        ]

        def residuals(
            out_layer: int = out_layer,
            targets: list[torch.Tensor] = targets,
            roots: list[torch.Tensor] = roots,
        ) -> torch.Tensor:
            found = [
                (target - states(student, tokens)[out_layer + 1][counts]) * root
                for (_, tokens, counts), target, root in zip(rows, targets, roots, strict=True)
            ]
            return torch.cat(found)

        whole = torch.cat([t * root for t, root in zip(targets, roots, strict=True)]).norm()
        layer = layers_of(student)[out_layer]
        kept, before = copy.deepcopy(layer.state_dict()), float(residuals().norm() / whole)
        are_norms = writers[-1][1] == "channel"
        stages = [writers] if are_norms else [writers[-1:]]
        for stage in stages:
            x = [
                torch.cat(
                    [
                        root * features(student, out_layer, part, tokens)[counts]
                        for (_, tokens, counts), root in zip(rows, roots, strict=True)
                    ]
                )
                for part in stage
            ]
            if are_norms:
                _fit_norms(layer, stage, x, residuals(), ridge)
            else:
                _fit_projections(layer, stage, x, torch.cat(roots), residuals(), ridge)
        after = float(residuals().norm() / whole)
        if after > before:
            layer.load_state_dict(kept)
            after = before
        errors.append((before, after))
    return errors


def _fit_projections(
    layer: nn.Module,
    stage: Sequence[Part],
    x: list[torch.Tensor],
    ones: torch.Tensor,
    residual: torch.Tensor,
    ridge: float,
) -> None:
    """All weights together, and the bias of the last one that has one."""
    parts = [layer.get_submodule(path) for path, *_ in stage]
    biased = [
        (part, gain)
        for part, (*_, gain) in zip(parts, stage, strict=True)
        if getattr(part, "bias", None) is not None
    ]
    columns = [*x, *([ones * biased[-1][1]] if biased else [])]
    solved = torch.from_numpy(_least_squares(torch.cat(columns, 1), residual, ridge))
    begin = 0
    for part, (_, layout, _) in zip(parts, stage, strict=True):
        weight: Any = part.weight
        count = weight.shape[0 if layout == "in_out" else 1]
        change = solved[begin : begin + count]
        weight.data = weight.data + (change if layout == "in_out" else change.T)
        begin += count
    if biased:
        bias: Any = biased[-1][0].bias
        bias.data = bias.data + solved[-1]


def _fit_norms(
    layer: nn.Module,
    stage: Sequence[Part],
    x: list[torch.Tensor],
    residual: torch.Tensor,
    ridge: float,
) -> None:
    """Each channel for itself; the ridge is relative to the mean over norms and channels."""
    mean = float(torch.stack(x).pow(2).sum(1).mean())
    for channel in range(residual.shape[1]):
        given = torch.stack([one[:, channel] for one in x], 1)
        own = ridge * mean / float(given.pow(2).sum(0).mean())
        solved = _least_squares(given, residual[:, channel : channel + 1], own)
        for (path, *_), change in zip(stage, solved[:, 0], strict=True):
            layer.get_parameter(f"{path}.weight").data[channel] += float(change)


def _least_squares(x: torch.Tensor, r: torch.Tensor, ridge: float) -> np.ndarray:
    size = x.shape[1]
    rows = np.sqrt(ridge * float(x.pow(2).sum(0).mean())) * np.eye(size)
    above, below = np.concatenate([x, rows]), np.concatenate([r, np.zeros((size, r.shape[1]))])
    return np.asarray(np.linalg.lstsq(above, below, rcond=None)[0])
