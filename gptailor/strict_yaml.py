"""Strict YAML: a duplicate key is an error.

Keys are names and always stay text: a model may be called `no`, `on`, `1e3` or `2026-01-01`, which
YAML would turn into a boolean, a number or a date. Among values only `true` and `false` are
booleans, as in YAML 1.2; where a boolean is expected, `truth` accepts the older words, too.

Recipes are passed around, so they are untrusted: nested aliases can expand a page to gigabytes, and
long numbers take quadratic time. Both are refused before they cost anything.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from gptailor.errors import UsageError, plain

MAX_YAML_CHARACTERS = 2_000_000
_MAX_FLOW_DEPTH = 100
_MAX_NUMBER_CHARACTERS = 64


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a duplicate key is an error, not a silent overwrite."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._flattened: dict[int, yaml.MappingNode] = {}

    def get_single_node(self) -> Any:
        """The document as nodes; refused if it is too large once its aliases are expanded."""
        node = super().get_single_node()
        if node is not None and _size(node, {}) > MAX_YAML_CHARACTERS:
            raise yaml.constructor.ConstructorError(
                None, None, "too large once its aliases are expanded", node.start_mark
            )
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges in what `<<` names; the mapping's own keys take precedence."""
        if id(node) not in self._flattened:
            self._flattened[id(node)] = node
            _check_unique(node)
            super().flatten_mapping(node)

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Limits open brackets: the scanner looks at all of them for each token that follows."""
        if self.flow_level >= _MAX_FLOW_DEPTH:
            raise yaml.scanner.ScannerError(
                None, None, f"brackets more than {_MAX_FLOW_DEPTH} deep", self.get_mark()
            )
        super().fetch_flow_collection_start(token)


class _Dumper(yaml.SafeDumper):
    """Writes YAML that the loader reads back unchanged."""


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters in a node, aliases counted each time; a node that contains itself is infinite."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value)
    if id(node) not in known:
        known[id(node)] = MAX_YAML_CHARACTERS + 1  # its size while it is being counted
        size = 1
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                size += _size(part, known)
        known[id(node)] = min(size, MAX_YAML_CHARACTERS + 1)
    return known[id(node)]


def _construct_number(loader: _StrictLoader, node: yaml.ScalarNode) -> Any:
    if len(node.value) > _MAX_NUMBER_CHARACTERS:
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(node.value)} characters", node.start_mark
        )
    if node.tag.endswith("int"):
        return loader.construct_yaml_int(node)
    return loader.construct_yaml_float(node)


def _check_unique(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is written twice", key.start_mark
                )
            seen.add(key.value)


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    loader.flatten_mapping(node)
    result = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                None, None, "a key that is a list or a mapping", key.start_mark
            )
        result[key.value] = loader.construct_object(value, deep=True)
    return result


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
# YAML 1.1 reads 1e-5, without a decimal point, as text; everybody means the number. The dumper must
# know this, too, so that it quotes names like that.
for _class in (_StrictLoader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
_BOOL, _DATE = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _DATE)]
    for first, resolvers in _StrictLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    _BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_number)


_TRUTH = {"yes": True, "on": True, "no": False, "off": False}


def truth(value: object) -> object:
    """Turns YAML 1.1's words for booleans into one; returns anything else unchanged."""
    return _TRUTH.get(value.lower(), value) if isinstance(value, str) else value


def read_text(path: Path) -> str:
    """The text of a YAML file, which may be a pipe; cut just past the limit if it is too long.

    Raises:
        OSError, UnicodeDecodeError: it can't be read, or is not text.
    """
    with path.open(encoding="utf-8") as file:
        return file.read(MAX_YAML_CHARACTERS + 1)


def load_yaml(text: str, source: str) -> Any:
    """Parses YAML strictly.

    Raises:
        UsageError: the text is not YAML, or has a duplicate key; the message names the line.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise UsageError(f"{source} has more than {MAX_YAML_CHARACTERS:,} characters.")
    try:
        return yaml.load(text, Loader=_StrictLoader)
    # a tag that does not fit its value (`!!bool x`) is a KeyError, AttributeError or IndexError
    except (
        yaml.YAMLError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
        RecursionError,
    ) as error:  # fmt: skip
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        if isinstance(error, (LookupError, AttributeError)):
            problem = "a value does not fit its tag"
        if problem == "but found another document":
            problem = "a second document begins here, but a file may hold only one"
        raise UsageError(f"{source}{line}: {plain(problem)}.") from error


def dump_yaml(data: Any, *, in_one_line: bool = False) -> str:
    """YAML that `load_yaml` reads as `data`; keys keep their order, long lines are not wrapped."""
    text: str = yaml.dump(
        data,
        Dumper=_Dumper,
        default_flow_style=in_one_line,
        sort_keys=False,
        allow_unicode=True,
        width=10_000,
    )
    return text
