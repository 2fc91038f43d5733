"""A slow repair of Llama models in float64: one sequence at a time, every pass from the start."""

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
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def open_exact(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def rows_of(reading: Reading) -> Rows:
    """Sequences without padding."""
    found = []
    for batch in reading.batches:
        for tokens, counts in zip(batch.input_BT, batch.counts_BT, strict=True):
            length = int(counts.nonzero()[-1]) + 1
            found.append((batch.group, tokens[:length], counts[:length]))
    return found


def cut(model: Any, src_layers: Sequence[int]) -> Any:
    """A copy with only some layers."""
    result = copy.deepcopy(model)
    layers = [copy.deepcopy(model.model.layers[src_layer]) for src_layer in src_layers]
    result.model.layers = nn.ModuleList(layers)
    result.config.num_hidden_layers = len(layers)
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    return result


@torch.no_grad()
def states(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What enters each layer, and what leaves the last one, (T, H) each."""
    found: list[torch.Tensor] = []
    layers = model.model.layers
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
def inputs(model: Any, out_layer: int, path: str, tokens: torch.Tensor) -> torch.Tensor:
    """What enters one projection, (T, F)."""
    found: list[torch.Tensor] = []
    part = model.model.layers[out_layer].get_submodule(path)
    hook = part.register_forward_pre_hook(lambda module, args: found.append(args[0][0]))
    model(input_ids=tokens[None], use_cache=False)
    hook.remove()
    return found[0]


def repair(
    student: Any,
    src_layers: Sequence[int],
    teachers: Mapping[str, Any],
    rows: Rows,
    ridge: float,
    chosen: Sequence[bool],
) -> None:
    """Repairs a cut model in place.

    Args:
        student: the result of `cut`.
        src_layers: its layers.
        teachers: group → model.
        rows: what is read.
        ridge: relative to the mean of the diagonal.
        chosen: for each layer, whether it is repaired.
    """
    lessons = [states(teachers[group], tokens) for group, tokens, _ in rows]
    depths = [*src_layers[1:], len(lessons[0]) - 1]
    for out_layer, (src_layer, depth) in enumerate(zip(src_layers, depths, strict=True)):
        if not chosen[out_layer]:
            continue
        stages = [_WRITERS[1:]] if depth == src_layer + 1 else [_WRITERS, _WRITERS[1:]]
        for stage in stages:
            x, r = [], []
            for (_, tokens, counts), lesson in zip(rows, lessons, strict=True):
                target = lesson[depth][counts]
                root = 1.0 / (target.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
                given = [inputs(student, out_layer, path, tokens)[counts] for path in stage]
                output = states(student, tokens)[out_layer + 1][counts]
                x.append(torch.cat(given, 1) * root)
                r.append((target - output) * root)
            solved = _least_squares(torch.cat(x).numpy(), torch.cat(r).numpy(), ridge)
            begin = 0
            for path in stage:
                weight = student.model.layers[out_layer].get_submodule(path).weight
                change = torch.from_numpy(solved[begin : begin + weight.shape[1]])
                begin += weight.shape[1]
                weight.data = weight.data + change.T


def _least_squares(x: np.ndarray, r: np.ndarray, ridge: float) -> np.ndarray:
    size = x.shape[1]
    rows = np.sqrt(ridge * np.square(x).sum(0).mean()) * np.eye(size)
    above, below = np.concatenate([x, rows]), np.concatenate([r, np.zeros((size, r.shape[1]))])
    return np.asarray(np.linalg.lstsq(above, below, rcond=None)[0])
