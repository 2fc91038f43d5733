"""Loads a task's questions from a file in this folder, from anywhere and without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets


def load(file: str, **_metadata: Any) -> dict[str, datasets.Dataset]:
    """Return the only split, `test`, as lm-eval's `custom_dataset` expects it.

    `file` comes from the task's `dataset_kwargs`; lm-eval passes the task's metadata, too.
    """
    path = Path(__file__).resolve().parent / file
    with path.open(encoding="utf-8") as lines:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
