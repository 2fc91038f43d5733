"""YAML as people type it, read strictly: a key that is written twice is an error."""

from __future__ import annotations

from typing import Any

import yaml

from gptailor.errors import UsageError


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that is written twice is an error, not a silent overwrite."""


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    pairs = [
        (loader.construct_object(k, deep=True), loader.construct_object(v, deep=True))
        for k, v in node.value
    ]
    result: dict[Any, Any] = {}
    for key, value in pairs:
        if key in result:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is written twice", node.start_mark
            )
        result[key] = value
    return result


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def load_yaml(text: str, source: str) -> Any:
    """Parses YAML strictly.

    Raises:
        UsageError: the text is not YAML, or writes a key twice; with the line.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UsageError(f"{source}{line}: {problem}.") from error
