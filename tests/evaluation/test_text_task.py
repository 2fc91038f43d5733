"""A text as a task gives lm-eval's perplexity; a task with weight 0 is no part of the accuracy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptailor import verbs
from gptailor.config import EvaluationConfig, TaskSpec
from gptailor.errors import UsageError
from gptailor.evaluation.evaluator import Evaluator
from gptailor.evaluation.outcome import Outcome
from gptailor.evaluation.tasks import load_tasks, unknown_tasks
from gptailor.models.family import Family
from gptailor.recipe import Recipe, Take
from gptailor.run.archive import Archive
from tests.evaluation.own_tasks import words, write_task
from tests.evaluation.test_equals_lm_eval import lm_eval_results

DOCUMENTS = [words(70, 1), words(9, 5), "{{ w01 }} [w02]", f"{words(4)}\n", words(200, 3)]
METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "page",
    "metric_list": [
        {"metric": name, "aggregation": aggregation, "higher_is_better": False}
        for name, aggregation in zip(
            METRICS, ("weighted_perplexity", "weighted_perplexity", "bits_per_byte"), strict=True
        )
    ],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sample.jsonl"
    path.write_text("\n".join(json.dumps({"text": one, "n": 1}) for one in DOCUMENTS))
    return path


def evaluation_of(tasks_dir: Path, *held: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate(
        {
            "tasks": ["t_shared"],
            "holdout": {"tasks": held},
            "include_path": str(tasks_dir),
            "dtype": "float32",
            "device": "cpu",
        }
    )


def held_out(models: dict[str, str], config: EvaluationConfig, answer: Any = None) -> Outcome:
    """The holdout's outcome for the model `red`; `answer` replaces its rolling log-likelihoods."""
    family = Family({"red": models["red"]}, "red")
    evaluator = Evaluator(family, config)
    layers = tuple(Take("red", i) for i in range(family.num_layers))
    recipe = Recipe(family.refs, "red", layers, "red", "red", "float32")
    with pytest.MonkeyPatch.context() as patch:
        if answer is not None:
            patch.setattr(evaluator.lm, "loglikelihood_rolling", lambda some: [answer] * len(some))
        outcome = evaluator.evaluate(recipe, "holdout")
    assert outcome.status == "ok", outcome.reason
    return outcome


def test_a_text_equals_lm_eval(
    models: dict[str, str], tasks_dir: Path, text: Path, tmp_path: Path
) -> None:
    write_task(tmp_path, "own", [{"page": document} for document in DOCUMENTS], "", **ROLLING)
    theirs = lm_eval_results(Path(models["red"]), tmp_path, ("own",), "float32", 3)["results"]
    specs = [
        {"task": f"language {name}", "text": str(text), "weight": 0, "metric": name}
        for name in METRICS
    ]
    default = {"task": "language", "text": str(text), "weight": 0}
    outcome = held_out(models, evaluation_of(tasks_dir, default, "t_long", *specs))
    first, counted, *scores = outcome.scores
    assert outcome.accuracy == counted.value  # the only one with a weight
    assert first.value == scores[0].value and first.metric == "word_perplexity,none"
    for score, name in zip(scores, METRICS, strict=True):
        assert score.value == pytest.approx(theirs["own"][f"{name},none"], rel=1e-4)
        assert (score.weight, score.num_documents, score.stderr) == (0, len(DOCUMENTS), None)


def test_any_metric_is_shown_with_weight_0(models: dict[str, str], tasks_dir: Path) -> None:
    held = [{"task": "t_rolling", "weight": 0}, {"task": "t_long", "weight": 2}]
    lambada = {"task": "t_lambada", "weight": 0, "metric": "perplexity", "limit": 3}
    outcome = held_out(models, evaluation_of(tasks_dir, *held, lambada))
    rolling, counted, perplexity = outcome.scores
    assert outcome.accuracy == counted.value
    assert rolling.value > 1 and perplexity.value > 1 and perplexity.num_documents == 3
    with pytest.raises(UsageError, match="t_rolling is better when it is lower"):
        held_out(models, evaluation_of(tasks_dir, "t_rolling"))


@pytest.mark.parametrize("answer", [-1e6, -math.inf])
def test_a_perplexity_that_overflows(
    models: dict[str, str], tasks_dir: Path, text: Path, tmp_path: Path, answer: float
) -> None:
    """The model has its accuracy; the archive holds JSON that everyone reads."""
    spec = {"task": "language", "text": str(text), "weight": 0}
    outcome = held_out(models, evaluation_of(tasks_dir, spec, "t_long"), answer)
    assert outcome.scores[0].value == math.inf
    assert outcome.accuracy == outcome.scores[1].value
    recipe = Recipe({"red": "r"}, "red", (Take("red", 0),), "red", "red")
    with Archive(tmp_path) as archive:
        archive.record(recipe, "holdout", 1, outcome)
        [(scores,)] = archive._db.execute("SELECT scores FROM evaluations").fetchall()
        assert json.loads(scores, parse_constant=pytest.fail)[0]["value"] is None
        assert archive.evaluations()[0].outcome == outcome


def test_a_name_is_looked_up_only_without_a_text(text: Path, tmp_path: Path) -> None:
    spec = TaskSpec(task="piqa", text=str(text), weight=0, limit=2)
    found = load_tasks([spec], None)
    assert [row["text"] for row in found.tasks["piqa"].eval_docs] == DOCUMENTS
    assert (found.members, found.limits) == ({"piqa": ("piqa",)}, {"piqa": 2})
    missing = spec.model_copy(update={"text": str(tmp_path / "gone.txt")})
    assert unknown_tasks([spec], None) == []
    [error] = unknown_tasks([spec, missing], None)
    assert str(error) == f"The text {tmp_path}/gone.txt can't be read: No such file or directory."
    with pytest.raises(UsageError, match="piqa is named twice"):
        load_tasks([spec, spec], None)


def test_a_search_with_a_text(
    models: dict[str, str], tasks_dir: Path, text: Path, tmp_path: Path
) -> None:
    """Checked, planned, fetched, searched, reported, and scored again by `eval --like`."""
    (tmp_path / "sample.jsonl").write_text(text.read_text())
    held = ["t_long", {"task": "language", "text": "sample.jsonl", "weight": 0}]
    data = {
        "models": models,
        "base": "base",
        "evaluation": {
            "tasks": ["t_shared"],
            "include_path": str(tasks_dir),
            "holdout": {"tasks": held},
            "device": "cpu",
        },
        "search": {"population": 4, "evaluations": 7, "arms": ["dense", "angular"]},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(data))
    assert verbs.check(path) == verbs.check(path, fast=True) == []
    assert verbs.plan(path, probe=False).sizes["holdout"].documents == 24 + len(DOCUMENTS)
    assert verbs.prefetch(path).documents == {"search": 24, "holdout": 24 + len(DOCUMENTS)}
    run = verbs.search(path)
    front = json.loads((run / "front.json").read_text())
    points = [p for p in (*front["front"], *front["control_arms"]) if p["holdout"]]
    base = next(p for p in points if "dense:base" in p["arms"])
    of_base = base["holdout"]["scores"][-1]
    assert of_base["metric"] == "word_perplexity,none" and of_base["value"] > 1
    for point in points:
        counted, shown = point["holdout"]["scores"]
        assert point["holdout"]["accuracy"] == counted["value"]
        assert (shown["task"], shown["weight"]) == ("language", 0)
        assert (shown["best_dense"], shown["retention_percent"]) == (of_base["value"], None)
    assert "holdout:language:word_perplexity,none" in (run / "front.csv").read_text()
    again = verbs.evaluate(models["base"], like=run / "config.yaml", dtype="bfloat16")
    assert again[-1].task == "language"
    assert again[-1].value == pytest.approx(of_base["value"], rel=1e-2)
    (tmp_path / "sample.jsonl").unlink()
    [problem] = verbs.check(path, ["output=other"], fast=True)
    assert problem.startswith(f"The text {tmp_path}/sample.jsonl can't be read")
    for verb in (verbs.plan, verbs.prefetch):
        with pytest.raises(UsageError, match=r"The text .*sample.jsonl can't be read"):
            verb(path)
