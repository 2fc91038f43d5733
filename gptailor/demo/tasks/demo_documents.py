"""Reads the documents of a demo task from the JSON lines file next to this module.

lm-eval resolves `data_files` against the working directory; this module does not, and it leaves
nothing in the Hugging Face cache.
"""

from __future__ import annotations

import json
from pathlib import Path

import datasets


def load(file: str, **_metadata: object) -> dict[str, datasets.Dataset]:
    """Returns the rows of `file` (a name in this folder) as the only split, `test`."""
    lines = (Path(__file__).resolve().parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
