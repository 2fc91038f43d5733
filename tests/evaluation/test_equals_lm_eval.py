"""A score equals what `lm_eval --model hf` gives for the stitched folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptailor.config import EvaluationConfig
from gptailor.evaluation.evaluator import Evaluator
from gptailor.models.family import Family
from gptailor.recipe import Merge, Recipe, Take
from gptailor.stitching.write import write_model
from tests.evaluation.own_tasks import tasks_of

TASKS = ("t_lambada", "t_shared", "t_long", "t_differing", "t_rolling", "t_generate", "t_group")
LEAVES = tuple(t for t in TASKS if t != "t_group")


def stitched(models: dict[str, str], dtype: str) -> Recipe:
    ta = (("lambda", 1.0), ("normalize", 0.0))
    ties = (("density", 0.5), ("lambda", 1.0), ("normalize", 1.0))
    layers = (
        Take("red", 0),
        Merge("task_arithmetic", 1, (("red", 0.5), ("green", 0.7)), ta),
        Merge("slerp", 3, (("green", 1.0), ("blue", 1.0)), (("t", 0.3),)),
        Merge("ties", 4, (("red", 1.0), ("blue", 1.0)), ties),
        Take("blue", 5),
    )
    return Recipe(models, "base", layers, "base", "base", dtype)


def lm_eval_results(
    folder: Path,
    tasks_dir: Path,
    names: tuple[str, ...],
    dtype: str,
    batch_size: int,
    **options: Any,
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    results: dict[str, Any] = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype={dtype},device=cpu",
        tasks=list(names),
        batch_size=batch_size,
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        bootstrap_iters=2,
        **options,
    )
    return results


def answers(evaluator: Evaluator) -> dict[tuple[str, int, int], Any]:
    tasks = evaluator.workloads["search"]._tasks
    return {
        (name, i.doc_id, i.idx): i.resps[0] for name, task in tasks.items() for i in task.instances
    }


def their_answers(results: dict[str, Any]) -> dict[tuple[str, int, int], Any]:
    return {
        (name, sample["doc_id"], idx): resp[0]
        for name, samples in results["samples"].items()
        for sample in samples
        for idx, resp in enumerate(sample["resps"])
    }


def loglikelihood(answer: Any) -> float:
    return float(answer[0] if isinstance(answer, tuple) else answer)


@pytest.mark.parametrize("names", [LEAVES, ("t_group",)])
def test_float32(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    recipe = stitched(models, "float32")
    family = Family(models, "base")
    config = EvaluationConfig(
        tasks=tasks_of(*names),
        include_path=str(tasks_dir),
        dtype="float32",
        device="cpu",
        batch_size=5,
    )
    evaluator = Evaluator(family, config, comparable=False)
    dense = Recipe(models, "base", tuple(Take("base", i) for i in range(6)), "base", "base")
    assert evaluator.evaluate(dense).status == "ok"  # an earlier recipe must leave no trace
    evaluator.resident.assemble(recipe)
    results = evaluator.workloads["search"].run(evaluator.lm)
    write_model(recipe, family, tmp_path / "out")
    theirs = lm_eval_results(tmp_path / "out", tasks_dir, names, "float32", 3)
    for name, metrics in theirs["results"].items():
        for key, value in metrics.items():
            if "," in key and results[name][key] != "N/A":
                if isinstance(value, str):
                    assert results[name][key] == value
                else:
                    assert results[name][key] == pytest.approx(value, rel=1e-4), (name, key)
    for name, samples in theirs["samples"].items():
        for key, values in results[name]["values"].items():
            if values:  # the metric is their mean
                assert list(values) == [sample[key.partition(",")[0]] for sample in samples]
    mine, other = answers(evaluator), their_answers(theirs)
    assert set(mine) == set(other)
    for key, answer in mine.items():
        if key[0] == "t_generate":
            assert answer == other[key]
        else:
            assert loglikelihood(answer) == pytest.approx(loglikelihood(other[key]), abs=1e-3)
            if isinstance(answer, tuple):
                assert answer[1] == other[key][1]


def test_bfloat16(models: dict[str, str], tasks_dir: Path, tmp_path: Path) -> None:
    """No further from lm-eval than lm-eval is from itself with another batch size."""
    recipe = stitched(models, "bfloat16")
    family = Family(models, "base")
    names = ("t_lambada", "t_shared", "t_long", "t_differing", "t_rolling")
    config = EvaluationConfig(
        tasks=tasks_of(*names),
        include_path=str(tasks_dir),
        dtype="bfloat16",
        device="cpu",
        batch_size=8,
    )
    evaluator = Evaluator(family, config, comparable=False)
    evaluator.resident.assemble(recipe)
    evaluator.workloads["search"].run(evaluator.lm)
    write_model(recipe, family, tmp_path / "out")
    theirs = [
        their_answers(lm_eval_results(tmp_path / "out", tasks_dir, names, "bfloat16", batch_size))
        for batch_size in (8, 3)
    ]
    mine = answers(evaluator)
    for task in names:
        keys = [key for key in mine if key[0] == task]
        values = [torch.tensor([loglikelihood(a[key]) for key in keys]) for a in (mine, *theirs)]
        noise = (values[1] - values[2]).abs()
        distance = (values[0] - values[1]).abs()
        assert distance.mean() <= max(noise.mean().item(), 1e-6) * 1.5 + 0.01, task
        assert distance.max() <= max(noise.max().item(), 0.07) * 1.5, task


def test_two_evaluations_agree_to_the_last_bit(models: dict[str, str], tasks_dir: Path) -> None:
    config = EvaluationConfig(tasks=tasks_of(*LEAVES), include_path=str(tasks_dir), device="cpu")
    evaluator = Evaluator(Family(models, "base"), config, comparable=False)
    recipe = stitched(models, "bfloat16")
    first = evaluator.evaluate(recipe)
    before = answers(evaluator)
    evaluator.evaluate(Recipe(models, "base", tuple(Take("red", i) for i in (0, 2)), "red", "red"))
    second = evaluator.evaluate(recipe)
    assert first.status == "ok", first.reason
    assert first.scores == second.scores
    assert answers(evaluator) == before


def test_few_shot_examples_and_a_choice_of_documents(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    recipe = stitched(models, "float32")
    family = Family(models, "base")
    tasks = [{"task": "t_shared", "num_fewshot": 2}, {"task": "t_long", "num_fewshot": 2}]
    config = EvaluationConfig.model_validate(
        {
            "tasks": tasks,
            "include_path": str(tasks_dir),
            "dtype": "float32",
            "device": "cpu",
            "rungs": [21],
        }
    )
    evaluator = Evaluator(family, config, seed=3)
    outcome = evaluator.evaluate(recipe)
    assert outcome.status == "ok", outcome.reason
    chosen = evaluator.workloads["search"]._samples
    samples = {name: sorted(numbers) for name, numbers in chosen.items() if numbers is not None}
    assert sum(map(len, samples.values())) == 21 == outcome.cost.num_documents
    write_model(recipe, family, tmp_path / "out")
    names = ("t_shared", "t_long")
    theirs = lm_eval_results(
        tmp_path / "out", tasks_dir, names, "float32", 4, num_fewshot=2, samples=samples
    )
    for score in outcome.scores:
        assert score.value == pytest.approx(theirs["results"][score.task]["acc,none"])
        assert score.stderr == pytest.approx(theirs["results"][score.task]["acc_stderr,none"])
        assert list(score.values) == [s["acc"] for s in theirs["samples"][score.task]]
