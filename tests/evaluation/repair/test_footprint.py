"""The memory of a repair as it is planned, from shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gptailor.evaluation.repair import solve, targets
from gptailor.evaluation.repair.footprint import find_repair_footprints
from gptailor.evaluation.repair.solve import RidgeRegression
from gptailor.evaluation.repair.widths import find_widths
from gptailor.evaluation.structure import Structure
from gptailor.recipe import CalibrationDocuments, CalibrationTask, Repair
from tests.evaluation.repair.test_repairer import MIXED, assembled, evaluator_of, recipe
from tests.evaluation.repair.test_writers import WRITERS
from tests.evaluation.repair.tiny import ARCHITECTURES, HIDDEN, layers_of, tiny


def shell_of(model: Any) -> tuple[Any, str]:
    """The model without weights, and the path of its layers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    stack = next(
        path
        for path, part in shell.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == len(layers_of(model))
    )
    return shell, stack


def expected(model: Any, paths: Sequence[tuple[str, str]]) -> tuple[int, ...]:
    """F by the names of a layer's writers: that of the last projection."""
    widths = []
    for layer in layers_of(model):
        width = 0
        for path, layout in paths:
            part: Any = layer.get_submodule(path)
            if layout != "channel":
                width = part.weight.shape[1 if layout == "out_in" else 0]
                width += getattr(part, "bias", None) is not None
        widths.append(width)
    return tuple(widths)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_widths_without_weights_are_those_of_the_writers(name: str) -> None:
    model = tiny(name)
    paths = [(path, layout) for path, layout, _, _ in WRITERS[name]]
    assert find_widths(*shell_of(model), HIDDEN) == expected(model, paths)


def test_widths_of_a_model_that_cannot_run_without_values_are_an_upper_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def needs_values(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(x[..., : int(x.sum())])  # type: ignore[no-any-return]

    model = tiny("llama")
    shell, stack = shell_of(model)
    monkeypatch.setattr(LlamaMLP, "forward", needs_values)
    assert find_widths(shell, stack, HIDDEN) == expected(model, [("mlp.down_proj", "out_in")])


@pytest.mark.parametrize("ridge", [0.3, 0.001])
def test_a_repair_takes_what_was_planned(
    models: dict[str, str], tasks_dir: Path, monkeypatch: pytest.MonkeyPatch, ridge: float
) -> None:
    evaluator = evaluator_of(models, tasks_dir)
    tasks = CalibrationTask("t_differing"), CalibrationTask("t_rolling")
    repair = Repair(CalibrationDocuments(tasks, str(tasks_dir), documents=24), "gaps", "red", ridge)
    base = evaluator.family.base
    structure = Structure(base.folder, base.config, base.checkpoint.tensors)
    (found,) = find_repair_footprints(
        evaluator.family,
        structure.shell,
        structure.stack,
        [(repair, evaluator.repairs.reading(repair.calibration))],
        "float32",
    )
    systems: list[tuple[int, int, int]] = []
    states: list[int] = []

    class Watched(RidgeRegression):
        def solve(self) -> torch.Tensor:
            solved = super().solve()
            taken = 2 * (self._left.nbytes + self._right.nbytes)
            if self._is_dual:
                taken += 2 * len(self._left) ** 2 * 4 - self._left.nbytes + solved.nbytes
            systems.append((*solved.shape, taken))
            return solved

    room = targets._room

    def watched(shape: tuple[int, ...], dtype: torch.dtype, *, in_memory: bool) -> torch.Tensor:
        kept = room(shape, dtype, in_memory=in_memory)
        states.append(kept.nbytes)
        return kept

    monkeypatch.setattr("gptailor.evaluation.repair.repairer.RidgeRegression", Watched)
    monkeypatch.setattr(targets, "_room", watched)
    done = assembled(evaluator, recipe(models, *MIXED, repair=repair))
    widest = max(systems)
    assert (found.width, HIDDEN) == widest[:2]
    assert found.system == widest[2]
    assert found.system == solve.needed_bytes(found.width, HIDDEN, found.tokens, ridge)
    assert found.teachers == sum(states)
    assert found.tokens == done.num_tokens < found.run_tokens
    assert found.documents == 24
