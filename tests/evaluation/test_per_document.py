"""A score follows from its documents' values, and chance is what guessing would score."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from gptailor.config import EvaluationConfig
from gptailor.evaluation.evaluator import Evaluator
from gptailor.evaluation.outcome import Score
from gptailor.evaluation.workload import Workload
from gptailor.models.family import Family
from gptailor.recipe import Recipe, Take
from tests.conftest import write_tasks

CHOICES = """output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_choice: "{{options}}"
doc_to_target: %s
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TASKS = {
    "few": CHOICES % '"{{gold}}"' + "tag: p_tag\n",
    "two_right": CHOICES % '"{{right}}"' + "tag: p_tag\n",
    "letters": """output_type: generate_until
doc_to_text: "{{ctx}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{gold}}"
generation_kwargs: {until: [" w05"], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "yes_or_no": """output_type: generate_until
doc_to_text: "{{ctx}}"
doc_to_target: "{{['yes', 'no'][gold]}}"
generation_kwargs: {until: [" w05"], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "own_metric": CHOICES % '"{{gold}}"' + "process_results: !function few.results\n",
}
GROUPS = """group: %s
task: %s
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: %s}
  - {metric: acc_norm, aggregation: mean, weight_by_size: true}
"""
NUM_CHOICES = (2, 3, 4, 2, 5, 3, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of 24 documents, of 7 documents with 2 to 5 choices each, and groups of both."""
    root = write_tasks(tmp_path_factory.mktemp("per_document"))
    rows = json.loads((root / "data.json").read_text())[: len(NUM_CHOICES)]
    for row, count in zip(rows, NUM_CHOICES, strict=True):
        row["options"] = [f"w{10 * i + 11}" for i in range(count)]
        row["right"] = [0, 1]
    (root / "few.json").write_text(json.dumps(rows))
    (root / "few.py").write_text(
        "import json, pathlib\nimport datasets\n\n"
        "def rows(**_):\n"
        "    text = (pathlib.Path(__file__).parent / 'few.json').read_text()\n"
        "    return {'test': datasets.Dataset.from_list(json.loads(text))}\n\n"
        "def results(doc, results):\n"
        "    return {'acc': 0.5, 'acc_norm': 0.25 * doc['gold']}\n"
    )
    for name, text in TASKS.items():
        head = f"task: p_{name}\ncustom_dataset: !function few.rows\ntest_split: test\n"
        (root / f"p_{name}.yaml").write_text(head + text)
    for name, leaves, by_size in (
        ("p_by_size", "[t_long, p_few]", "true"),
        ("p_alike", "[t_long, p_few]", "false"),
        ("p_nested", "[p_two_right, {group: p_inner, task: [t_long, p_few]}]", "false"),
        ("p_unknown", "[t_long, p_own_metric]", "false"),
    ):
        (root / f"{name}.yaml").write_text(GROUPS % (name, leaves, by_size))
    return root


@pytest.fixture(scope="module")
def lm(models: dict[str, str], folder: Path) -> Any:
    """The whole base, ready to answer."""
    config = EvaluationConfig.model_validate(
        {"tasks": ["t_shared"], "include_path": str(folder), "dtype": "float32", "device": "cpu"}
    )
    evaluator = Evaluator(Family(models, "base"), config)
    layers = tuple(Take("base", i) for i in range(evaluator.family.num_layers))
    evaluator.resident.assemble(Recipe(models, "base", layers, "base", "base"))
    return evaluator.lm


def scored(lm: Any, folder: Path, *tasks: Any) -> tuple[Score, ...]:
    config = EvaluationConfig.model_validate({"tasks": tasks, "include_path": str(folder)})
    workload = Workload(config.tasks, config, lm, comparable=False)
    return workload.scores(workload.run(lm))


FEW = statistics.mean(1 / n for n in NUM_CHOICES)
TWO = statistics.mean(2 / n for n in NUM_CHOICES)


@pytest.mark.parametrize(
    ("task", "metric", "chance"),
    [
        ("t_shared", "acc", 1 / 4),
        ("t_long", "acc_norm", 1 / 3),
        ("t_differing", "acc", 1 / 2),  # a context for each choice
        ("t_lambada", "acc", 0.0),
        ("t_generate", "exact_match", 0.0),
        ("p_few", "acc", FEW),
        ("p_few", "acc_norm", FEW),
        ("p_two_right", "acc", TWO),
        ("p_letters", "exact_match", FEW),
        ("p_yes_or_no", "exact_match", None),
        ("p_own_metric", "acc", None),
        ("p_by_size", "acc", (24 / 3 + 7 * FEW) / 31),
        ("p_by_size", "acc_norm", (24 / 3 + 7 * FEW) / 31),
        ("p_alike", "acc", (1 / 3 + FEW) / 2),
        ("p_alike", "acc_norm", (24 / 3 + 7 * FEW) / 31),
        ("p_nested", "acc", (TWO + 1 / 3 + FEW) / 3),
        ("p_unknown", "acc", None),
        ("p_tag", "acc", (FEW + TWO) / 2),
    ],
)
def test_chance_and_values(
    lm: Any, folder: Path, task: str, metric: str, chance: float | None
) -> None:
    (score,) = scored(lm, folder, {"task": task, "metric": metric})
    assert score.chance == (None if chance is None else pytest.approx(chance, abs=1e-12))
    assert len(score.values) == score.num_documents
    leaves = score.leaves or ((len(score.values), 1.0),)
    assert len(leaves) == {"p_nested": 3}.get(task, 2 if score.leaves else 1)
    rest, value = score.values, 0.0
    for count, weight in leaves:
        value += weight * statistics.mean(rest[:count])
        rest = rest[count:]
    assert rest == ()
    assert value == pytest.approx(score.value, abs=1e-12)


def test_a_group_has_the_documents_of_its_tasks(lm: Any, folder: Path) -> None:
    """Also where lm-eval gives all tasks equal weight, whatever their sizes."""
    apart = scored(lm, folder, "t_long", "p_few")
    for name, weights in (("p_by_size", (24 / 31, 7 / 31)), ("p_alike", (0.5, 0.5))):
        (score,) = scored(lm, folder, name)
        assert score.values == apart[0].values + apart[1].values
        assert score.leaves == ((24, weights[0]), (7, weights[1]))
    assert 0.0 < sum(apart[0].values) < 24.0


def test_a_metric_that_is_not_a_mean_has_no_values(lm: Any, folder: Path) -> None:
    (score,) = scored(lm, folder, {"task": "t_lambada", "metric": "perplexity"})
    assert (score.values, score.leaves, score.chance) == ((), (), None)
