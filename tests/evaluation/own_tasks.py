"""Tasks that a test writes for itself: a YAML file, its documents and, where needed, code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gptailor.config import TaskSpec

LOADER = """import json, pathlib
import datasets

def rows(**_):
    text = (pathlib.Path(__file__).parent / "{name}.json").read_text()
    return {{"test": datasets.Dataset.from_list(json.loads(text))}}
"""
ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
ACC_NORM = {**ACC, "metric": "acc_norm"}
EXACT_MATCH = {**ACC, "metric": "exact_match"}
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [ACC, ACC_NORM],
}
GENERATE: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "w05",
    "generation_kwargs": {"until": ["w06"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [EXACT_MATCH],
}


def tasks_of(*names: str) -> tuple[TaskSpec, ...]:
    """What `tasks: [name, …]` in a `search.yaml` becomes."""
    return tuple(TaskSpec(task=name) for name in names)


def words(count: int, start: int = 0) -> str:
    """Text of `count` tokens for the tests' tokenizer."""
    return " ".join(f"w{(7 * i + start) % 90:02d}" for i in range(count))


def rows(count: int = 4, **changes: Any) -> list[dict[str, Any]]:
    """Documents with a question and two options each; `changes` go into the last one."""
    found = [
        {"q": words(5, i), "options": [words(2, i), words(3, i + 1)], "gold": i % 2}
        for i in range(count)
    ]
    return [*found[:-1], found[-1] | changes]


def write_task(
    folder: Path, name: str, documents: Sequence[dict[str, Any]], code: str = "", **config: Any
) -> None:
    """Writes a task with these documents; `!name` in `config` is a function that `code` defines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(list(documents)))
    (folder / f"{name}_code.py").write_text(LOADER.format(name=name) + code)
    own = {"custom_dataset": "!rows", "test_split": "test", "fewshot_split": "test"}
    text = yaml.safe_dump({"task": name, **own, **config}, sort_keys=False)
    lines = []
    for line in text.splitlines():
        head, mark, function = line.partition("'!")
        called = f"{head}!function {name}_code.{function.rstrip(chr(39))}" if mark else line
        lines.append(called)
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")


def write_group(folder: Path, name: str, tasks: Sequence[Any], *rules: dict[str, Any]) -> None:
    """Writes a group of tasks; `rules` say what it aggregates."""
    data: dict[str, Any] = {"group": name, "task": list(tasks)}
    if rules:
        data["aggregate_metric_list"] = list(rules)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
