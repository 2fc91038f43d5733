from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptailor.config import EvaluationConfig, TaskSpec
from gptailor.errors import UsageError
from gptailor.evaluation.documents import choose_documents
from gptailor.evaluation.workload import Workload


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 60), min_size=1),
    st.integers(1, 100),
    st.integers(1, 100),
    st.integers(0, 5),
)
def test_documents_are_nested_shared_out_and_seeded(
    sizes: dict[str, int], first: int, second: int, seed: int
) -> None:
    small, large = sorted((first, second))
    few, many = (choose_documents(sizes, n, seed) for n in (small, large))
    assert few == choose_documents(sizes, small, seed)
    total = 0
    for name, size in sizes.items():
        everything = set(range(size))
        assert (few[name] or everything) <= (many[name] or everything) <= everything
        total += len(many[name] or everything)
    assert total == min(max(large, len(sizes)), sum(sizes.values()))
    if large < sum(sizes.values()):
        shares = [len(many[name] or ()) for name in sizes]
        full = [share for share, size in zip(shares, sizes.values(), strict=True) if share < size]
        assert not full or max(full) - min(full) <= 1  # equal, except for tasks used up


def test_a_choice_is_not_the_first_documents() -> None:
    chosen = choose_documents({"a": 1000}, 100, 0)["a"]
    assert chosen is not None
    assert chosen != set(range(100))
    assert chosen != choose_documents({"a": 1000}, 100, 1)["a"]


class NoModel:
    """Takes a model's place where a workload needs one only for an unused chat template."""


def workload(tasks_dir: Path, *specs: Any, **options: Any) -> Workload:
    config = EvaluationConfig(tasks=specs, include_path=str(tasks_dir), device="cpu")
    return Workload(config.tasks, config, NoModel(), **options)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"task": "t_long", "metric": "acc_nrom"}, "did you mean 'acc_norm'"),
        ({"task": "t_lambada", "metric": "perplexity"}, "better when it is lower"),
        ("t_rolling", "better when it is lower"),
    ],
)
def test_wrong_names_are_reported_before_anything_runs(
    tasks_dir: Path, spec: Any, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        workload(tasks_dir, spec)


def test_a_task_named_twice_is_refused(tasks_dir: Path) -> None:
    with pytest.raises(UsageError, match="named twice"):
        workload(tasks_dir, "t_shared", "t_group")


@pytest.mark.parametrize("metric", ["acc_norm", "acc_norm,none"])
def test_metric_keys(tasks_dir: Path, metric: str) -> None:
    found = workload(tasks_dir, TaskSpec(task="t_long", metric=metric))
    assert found._metrics == {"t_long": "acc_norm,none"}


def test_the_digest_tells_documents_apart(tasks_dir: Path) -> None:
    digests = [
        workload(tasks_dir, "t_shared").digest,
        workload(tasks_dir, "t_shared", num_documents=10).digest,
        workload(tasks_dir, "t_shared", num_documents=10, seed=1).digest,
        workload(tasks_dir, TaskSpec(task="t_shared", num_fewshot=1)).digest,
    ]
    assert len(set(digests)) == 4
    assert workload(tasks_dir, "t_shared").digest == digests[0]


def test_global_random_state_is_left_alone(tasks_dir: Path) -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    expected = random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    workload(tasks_dir, "t_shared")
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected  # noqa: NPY002


def test_the_digest_changes_with_the_answer_key(tasks_dir: Path, tmp_path: Path) -> None:
    import json
    import shutil

    other = tmp_path / "tasks"
    shutil.copytree(tasks_dir, other)
    rows = json.loads((other / "data.json").read_text())
    rows[0]["gold"] = 1 - rows[0]["gold"]
    (other / "data.json").write_text(json.dumps(rows))
    assert workload(tasks_dir, "t_shared").digest != workload(other, "t_shared").digest
