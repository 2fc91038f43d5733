"""Configurations of mergekit, read as recipes.

`parse` reads the YAML into `config` and refuses what can't be done, `setting` gives a parameter
its value for one tensor, `convert` makes the recipe. The meaning is mergekit's
(github.com/arcee-ai/mergekit, version 0.1.5: its `config.py` and `plan.py`);
docs/merge_methods.md lists what differs.
"""

from __future__ import annotations

from gptailor.mergekit.config import MergekitConfig
from gptailor.mergekit.convert import to_recipe
from gptailor.mergekit.parse import read_mergekit

__all__ = ["MergekitConfig", "read_mergekit", "to_recipe"]
