"""gptailor makes a language model smaller: it cuts, stitches and merges layers of its finetunes.

`verbs` has a function for each verb of the command line; the other names are the objects that these
functions take and return.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptailor import verbs
    from gptailor.config import Config, read_config
    from gptailor.models.family import Family
    from gptailor.recipe import Merge, Recipe, Take, read_recipe
    from gptailor.run.archive import Archive

_HOMES = {
    "archive": ("Archive",),
    "config": ("Config", "read_config"),
    "models.family": ("Family",),
    "recipe": ("Merge", "Recipe", "Take", "read_recipe"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "Archive",
    "Config",
    "Family",
    "Merge",
    "Recipe",
    "Take",
    "read_config",
    "read_recipe",
    "verbs",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so `import gptailor` costs nothing."""
    if name == "verbs":
        return importlib.import_module("gptailor.verbs")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gptailor' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gptailor.{_HOME_OF[name]}"), name)
