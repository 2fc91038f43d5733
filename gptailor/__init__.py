"""gptailor makes a language model smaller: it cuts, stitches and merges layers of its finetunes.

The public names are the verbs of the command line and the objects that they take and give.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptailor.archive import Archive
    from gptailor.config import Config, read_config
    from gptailor.models.family import Family
    from gptailor.recipe import Merge, Recipe, Take, read_recipe
    from gptailor.verbs import check, demo, evaluate, report, search, stitch

_HOMES = {
    "archive": ("Archive",),
    "config": ("Config", "read_config"),
    "models.family": ("Family",),
    "recipe": ("Merge", "Recipe", "Take", "read_recipe"),
    "verbs": ("check", "demo", "evaluate", "report", "search", "stitch"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "Archive",
    "Config",
    "Family",
    "Merge",
    "Recipe",
    "Take",
    "check",
    "demo",
    "evaluate",
    "read_config",
    "read_recipe",
    "report",
    "search",
    "stitch",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import gptailor` costs nothing."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gptailor' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gptailor.{_HOME_OF[name]}"), name)
