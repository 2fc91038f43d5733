"""Finds the tasks of a configuration, in lm-eval or in texts, loads their data and sets them up.

lm-eval sets tasks up inside `simple_evaluate`; this module does the same, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from gptailor.config import TaskSpec
from gptailor.errors import UsageError, plain, unknown
from gptailor.evaluation.surroundings import SEEDS
from gptailor.evaluation.task_errors import not_loaded
from gptailor.evaluation.text import read_documents
from gptailor.evaluation.text_task import text_task


@dataclass(frozen=True)
class TaskSet:
    """Loaded tasks.

    Attributes:
        tasks: name → lm-eval's task, including those of groups and tags.
        groups: name → lm-eval's group, including nested groups.
        members: requested name → the tasks that it stands for.
        limits: task → lm-eval's limit for its documents.
    """

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
    limits: dict[str, float | None] = field(default_factory=dict)


def load_tasks(specs: Sequence[TaskSpec], include_path: str | None) -> TaskSet:
    """Loads tasks, groups and tags with their data.

    Raises:
        UsageError: a name is unknown, a task is named twice, or its data or text can't be loaded.
    """
    names = [spec.task for spec in specs if spec.text is None]
    manager = task_manager(include_path, names) if names else None
    found = TaskSet()
    for spec in specs:
        if spec.text is not None:
            loaded = {"tasks": {spec.task: text_task(spec.task, spec.text)}}
        else:
            loaded = _loaded(spec.task, manager, include_path)
        for name, task in loaded["tasks"].items():
            if name in found.tasks:
                raise UsageError(f"The task {name} is named twice (by {spec.task}, too).")
            _configure(task, spec)
            found.tasks[name] = task
            found.limits[name] = spec.limit
        found.groups.update(loaded.get("groups", {}))
        found.members[spec.task] = tuple(loaded["tasks"])
        if not found.members[spec.task]:
            raise UsageError(f"The group {spec.task} has no tasks.")
    return found


def _loaded(name: str, manager: Any, include_path: str | None) -> dict[str, Any]:
    """What lm-eval loads under a name."""
    if name not in manager.all_tasks:
        raise _unknown(name, manager, include_path)
    try:
        loaded: dict[str, Any] = manager.load([name])
    except Exception as error:  # a dataset's loader can raise anything
        raise not_loaded(name, error) from error
    return loaded


def unknown_tasks(specs: Sequence[TaskSpec], include_path: str | None) -> list[UsageError]:
    """An error for each name that lm-eval doesn't have and each text that can't be read.

    Loads no data of other tasks.
    """
    errors = []
    names = [spec.task for spec in specs if spec.text is None]
    if names:
        manager = task_manager(include_path, names)
        errors = [_unknown(n, manager, include_path) for n in names if n not in manager.all_tasks]
    for spec in specs:
        try:
            if spec.text is not None:
                read_documents(spec.text)
        except UsageError as error:
            errors.append(error)
    return errors


def task_manager(include_path: str | None, names: Sequence[str]) -> Any:
    """lm-eval's index of tasks: only `include_path` if it has all names, which is much faster."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(name in manager.all_tasks for name in names):
            return manager
    files = sorted(Path(include_path).rglob("*.yaml")) if include_path is not None else []
    return _whole_index(include_path, tuple((str(p), p.stat().st_mtime_ns) for p in files))


@cache
def _whole_index(include_path: str | None, own_files: tuple[tuple[str, int], ...]) -> Any:
    """The index with lm-eval's own tasks, whose 14,000 files take seconds; cached until
    `own_files` change."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def broken_file(folder: str | None) -> UsageError | None:
    """An error for the first unreadable YAML in a folder of tasks, which lm-eval would skip."""
    import yaml

    for path in sorted(Path(folder).rglob("*.yaml")) if folder is not None else ():
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(plain(line.strip()) for line in str(error).splitlines()[:3])
            return UsageError(f"{path} can't be read: {reason}.")
    return None


def _unknown(name: str, manager: Any, include_path: str | None) -> UsageError:
    """The error for a missing task: a file that lm-eval skipped, or a wrong name."""
    broken = broken_file(include_path)
    return broken or unknown("task", name, manager.all_tasks, "evaluation.tasks")


def _configure(task: Any, spec: TaskSpec) -> None:
    """Sets up a task as `simple_evaluate` does."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(
            f"The task {spec.task} runs code that a model wrote, which gptailor never does."
        )
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(
            f"The task {spec.task} uses images or audio, which gptailor's models don't "
            "take: leave it out."
        )
    if spec.num_fewshot and task.get_config("num_fewshot") == 0:
        raise UsageError(
            f"The task {spec.task} sets num_fewshot to 0 itself, which lm-eval always keeps: leave "
            "num_fewshot out."
        )
    if spec.num_fewshot is not None:
        task.set_config(key="num_fewshot", value=spec.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEEDS["fewshot"])
