"""Reads mergekit configurations as recipes.

`parse` reads the YAML into `config` and refuses what is not supported, `setting` evaluates a
parameter for one tensor, and `convert` makes the recipe. The semantics are mergekit's
(github.com/arcee-ai/mergekit, version 0.1.5: its `config.py` and `plan.py`);
docs/merge_methods.md lists the differences.
"""

from __future__ import annotations

from gptailor.mergekit.config import MergekitConfig
from gptailor.mergekit.convert import to_recipe
from gptailor.mergekit.parse import read_mergekit

__all__ = ["MergekitConfig", "read_mergekit", "to_recipe"]
