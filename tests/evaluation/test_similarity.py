"""Block Influence and angular distance against a slow reference, one sequence at a time."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptailor.config import EvaluationConfig
from gptailor.errors import ModelError
from gptailor.evaluation.evaluator import Evaluator
from gptailor.evaluation.similarity import measure
from gptailor.models.family import Family
from tests.evaluation.own_tasks import tasks_of


def test_measures_equal_the_reference(models: dict[str, str], tasks_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = EvaluationConfig(
        tasks=tasks_of("t_shared", "t_long"),
        include_path=str(tasks_dir),
        dtype="float32",
        device="cpu",
    )
    evaluator = Evaluator(Family(models, "base"), config)
    workload = evaluator.workloads["search"]
    found = measure(evaluator.resident, evaluator.lm, workload, "red", "float32")
    model = AutoModelForCausalLM.from_pretrained(models["red"], dtype=torch.float32)
    states: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, args: states.append(args[0][0]))
    model.model.norm.register_forward_pre_hook(lambda m, args: states.append(args[0][0]))
    influence, angles, num_tokens = [0.0] * 6, torch.zeros(7, 7, dtype=torch.float64), 0
    contexts = workload.contexts(evaluator.lm, 128)
    for tokens in contexts:
        states.clear()
        with torch.inference_mode():
            model(input_ids=torch.tensor([tokens]))
        num_tokens += len(tokens)
        for i in range(6):
            for x, y in zip(states[i], states[i + 1], strict=True):
                influence[i] += 1 - float(x @ y / (x.norm() * y.norm()))
        for i in range(7):
            for j in range(7):
                x, y = states[i][-1].double(), states[j][-1].double()
                cosine = float((x @ y / (x.norm() * y.norm())).clamp(-1, 1))
                angles[i, j] += math.acos(cosine) / math.pi
    assert len(contexts) == 48
    assert found.block_influence == pytest.approx([v / num_tokens for v in influence], abs=1e-5)
    expected = angles / len(contexts)
    assert torch.tensor(found.angular).sub(expected).abs().max() < 1e-5


def test_a_candidate_that_gives_no_numbers_is_named(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    """So no control arm is made from meaningless numbers."""
    shutil.copytree(models["red"], tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][5, 7] = float("inf")
    save_file(weights, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    config = EvaluationConfig(tasks=tasks_of("t_shared"), include_path=str(tasks_dir), device="cpu")
    evaluator = Evaluator(
        Family({"base": models["base"], "red": str(tmp_path / "bad")}, "base"), config
    )
    assert evaluator.similarity("base", "bfloat16").block_influence
    with pytest.raises(ModelError, match="bad: the layers of red give numbers that are not finite"):
        evaluator.similarity("red", "bfloat16")
