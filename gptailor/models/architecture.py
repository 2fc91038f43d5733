"""The architecture of a model: which tensor belongs to which layer, found from names and shapes.

There is no table with an entry for each architecture. The layer stack is the numbered group of
tensors with the most bytes; the remaining tensors belong to the embeddings or the head, by name.
This module also cuts a config to the kept layers, since which of its keys are per-layer is a fact
about architectures, too.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal

from gptailor.errors import ModelError, UsageError
from gptailor.models.checkpoint import TensorInfo

Role = Literal["embeddings", "head"]

_EMBEDDINGS = re.compile(r"embed(?!_out)|(^|\.)(wte|wpe|tok_embeddings|emb)\b|inv_freq|rotary")
_RESIDUAL_WRITERS = re.compile(
    r"(^|\.)(o_proj|down_proj|out_proj|c_proj|dense|dense_4h_to_h|fc2|wo|w2)\.(weight|bias)$"
)
_PLAIN_PARTS = re.compile(
    r"(^|\.)([a-z_]*norm[a-z_0-9]*|ln_[a-z0-9]+|[qkvo]_proj|qkv_proj|out_proj|query_key_value|dense"
    r"|gate_proj|up_proj|down_proj|gate_up_proj|fc[12]|c_attn|c_proj|c_fc|dense_h_to_4h"
    r"|dense_4h_to_h|w[123qkvo]|wqkv)\.(weight|bias)$"
)
_POST_NORMS = re.compile(r"post_feedforward|post_attention_norm\b|post_mlp|post_self_attn")
_NUMBER = r"(0|[1-9][0-9]{0,5})"
_LAYER = re.compile(rf"{_NUMBER}\.")
_MAX_NUMBERS = 8
"""How many numbers in a name are considered: the layer's comes early, an expert's later."""
_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks")
_INDEX_LIST_KEYS = (
    "mlp_only_layers", "cross_attention_layers", "attn_layer_indices", "moe_layers",
    "full_attn_idxs", "hybrid_layer_ids", "local_layer_ids",
)  # fmt: skip
_PREFIX_COUNT_KEYS = (
    "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_hash_layers",
    "max_window_layers",
)  # fmt: skip
_SUFFIX_COUNT_KEYS = ("num_kv_shared_layers",)
_LAST_INDEX_KEYS = ("moe_layer_end_index",)
_TILED_KEYS = ("block_types",)
"""Lists that are repeated until every layer has an entry."""
_LETTER_KEYS = ("hybrid_override_pattern",)


@dataclass(frozen=True)
class Architecture:
    """Which tensors make up the layers of a model.

    Attributes:
        prefix: the part of a name before the layer's number, for example "model.layers.".
        num_layers: the number of layers.
        layers: for each layer, suffix ("self_attn.q_proj.weight") → full name.
        embeddings: names of tensors before the stack.
        head: names of tensors after the stack: final norm and output head.
    """

    prefix: str
    num_layers: int
    layers: tuple[Mapping[str, str], ...]
    embeddings: tuple[str, ...]
    head: tuple[str, ...]

    def name(self, layer: int, suffix: str) -> str:
        """The full name of a layer's tensor."""
        return f"{self.prefix}{layer}.{suffix}"

    def residual_writers(self, layer: int) -> tuple[str, ...]:
        """Suffixes of the projections that write to the residual stream.

        Raises:
            UsageError: no scale folds into the layer exactly: these projections can't be
                identified, a norm follows them, or other parts of the layer may write there, too.
        """
        suffixes = tuple(self.layers[layer])
        found = tuple(s for s in suffixes if _RESIDUAL_WRITERS.search(s))
        weights = [s for s in found if s.endswith(".weight")]
        is_plain = all(_PLAIN_PARTS.search(s) for s in suffixes)
        if len(weights) != 2 or not is_plain or any(_POST_NORMS.search(s) for s in suffixes):
            raise UsageError(
                f"scale can't be folded into {self.prefix}{layer}: this architecture does not "
                "write to the residual stream through exactly two plain projections."
            )
        return found


def find_architecture(
    tensors: Mapping[str, TensorInfo], where: object, prefix: str | None = None
) -> Architecture:
    """Finds the layer stack among a checkpoint's tensors.

    Args:
        tensors: the checkpoint's tensors.
        where: the model, for errors.
        prefix: of the layers' tensors, up to the number; None for the group with the most bytes.

    Raises:
        ModelError: there is no numbered stack, or a number is missing.
    """
    if prefix is None:
        prefix = _largest_group(tensors, where)
    stack: dict[int, dict[str, str]] = defaultdict(dict)
    for name in tensors:
        if inside := _inside(name, prefix):
            stack[int(inside.group(1))][name[inside.end() :]] = name
    num_layers = max(stack) + 1
    missing = next((i for i in range(num_layers) if i not in stack), None)
    if missing is not None:
        raise ModelError(
            f"{where} lacks the layer {prefix}{missing}, but has {prefix}{max(stack)}."
        )
    outside = [name for name in tensors if _inside(name, prefix) is None]
    return Architecture(
        prefix=prefix,
        num_layers=num_layers,
        layers=tuple(stack[i] for i in range(num_layers)),
        embeddings=tuple(n for n in outside if role_of(n) == "embeddings"),
        head=tuple(n for n in outside if role_of(n) == "head"),
    )


def stacks_of(tensors: Iterable[str], num_layers: int) -> list[str]:
    """Prefixes of all groups of tensors that are numbered from 0 to `num_layers` − 1 and are not
    inside another such group; a model with towers for images or sound has several."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        for match in islice(re.finditer(rf"(?:^|\.){_NUMBER}\.", name), _MAX_NUMBERS):
            numbers[name[: match.start(1)]].add(int(match.group(1)))
    found = [prefix for prefix, n in numbers.items() if n == set(range(num_layers))]
    return [p for p in found if not any(p != outer and p.startswith(outer) for outer in found)]


def _largest_group(tensors: Mapping[str, TensorInfo], where: object) -> str:
    """The prefix of the numbered group of tensors with the most bytes."""
    n_bytes: dict[str, int] = defaultdict(int)
    for name, info in tensors.items():
        for match in islice(re.finditer(rf"(?:^|\.){_NUMBER}\.", name), _MAX_NUMBERS):
            n_bytes[name[: match.start(1)]] += info.n_bytes
    if not n_bytes:
        raise ModelError(f"{where} has no numbered layers, so there is nothing to cut.")
    return max(n_bytes, key=lambda p: (n_bytes[p], -len(p)))


def _inside(name: str, prefix: str) -> re.Match[str] | None:
    """A match of the layer's number and the dot after it, if they follow the prefix."""
    return _LAYER.match(name, len(prefix)) if name.startswith(prefix) else None


def role_of(name: str) -> Role:
    """Whether a tensor outside the stack belongs to the embeddings or to the head."""
    return "embeddings" if _EMBEDDINGS.search(name) else "head"


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the layer stack: all of it, or its `text_config`."""
    nested = config.get("text_config")
    if isinstance(nested, dict) and not any(key in config for key in _COUNT_KEYS):
        return nested
    return config


def layer_count(text: Mapping[str, Any]) -> int | None:
    """The number of layers according to a config; None if it gives none."""
    counts = (text[key] for key in _COUNT_KEYS if type(text.get(key)) is int)
    return next(counts, None)


def per_layer_lists(config: Mapping[str, Any], num_layers: int) -> dict[str, list[Any]]:
    """The lists of a config that have one entry per layer."""
    return {
        key: value
        for key, value in config.items()
        if isinstance(value, list)
        and len(value) == num_layers
        and key not in _INDEX_LIST_KEYS
        and key != "architectures"
        and not key.endswith(("token_id", "token_ids"))
    }


def implied_lists(
    text: Mapping[str, Any], resolved: Mapping[str, Any], num_layers: int
) -> dict[str, list[Any]]:
    """Per-layer lists that a config leaves to its class.

    Args:
        text: the part of a config.json that describes the layer stack.
        resolved: the same with all defaults filled in.
        num_layers: the number of layers.
    """
    lists = per_layer_lists(resolved, num_layers)
    lists |= {k: resolved[k] for k in _INDEX_LIST_KEYS if isinstance(resolved.get(k), list)}
    return {key: value for key, value in lists.items() if text.get(key) is None}


def cut_config(
    config: Mapping[str, Any],
    src_layers: Sequence[int],
    implied: Mapping[str, list[Any]] = MappingProxyType({}),
    num_layers: int | None = None,
) -> dict[str, Any]:
    """A config for the kept layers, with the layer count and all per-layer keys adapted.

    The meaning of its keys is inferred from their names and sizes, so the result is a proposal: it
    is checked by building the model and comparing its layers (`evaluation.structure`).

    Args:
        config: the contents of `config.json`.
        src_layers: the source layer of each output layer.
        implied: per-layer lists that the config leaves to its class; they are written out.
        num_layers: the number of layers, for a config that leaves that to its class, too.

    Raises:
        ModelError: the number of layers is unknown.
    """
    result = copy.deepcopy(dict(config))
    text = text_config(result)
    declared = layer_count(text)
    if declared is None:
        if num_layers is None:
            raise ModelError(f"config.json has no layer count (one of {', '.join(_COUNT_KEYS)}).")
        declared = text[_COUNT_KEYS[0]] = num_layers
    text |= copy.deepcopy(dict(implied))
    whole = list(range(declared))
    for key in _TILED_KEYS:
        if isinstance(text.get(key), list) and text[key]:
            text[key] = [text[key][src % len(text[key])] for src in whole]
    for key, values in per_layer_lists(text, declared).items():
        text[key] = [values[src] for src in src_layers]
    for key in _INDEX_LIST_KEYS:
        if isinstance(text.get(key), list):
            named = {src for src in text[key] if isinstance(src, (int, float))}
            text[key] = [out for out, src in enumerate(src_layers) if src in named]
    for key, value in text.items():
        if "layer" in key and isinstance(value, dict) and _is_by_index(value, declared):
            by_index = {int(k): v for k, v in value.items()}
            text[key] = {
                str(out): by_index[src] for out, src in enumerate(src_layers) if src in by_index
            }
        elif key in _LETTER_KEYS and isinstance(value, str) and len(value) == declared:
            text[key] = "".join(value[src] for src in src_layers)
        elif key in _PREFIX_COUNT_KEYS and type(value) is int:
            text[key] = sum(src < value for src in src_layers)
        elif key in _SUFFIX_COUNT_KEYS and type(value) is int:
            text[key] = sum(src >= declared - value for src in src_layers)
        elif key in _LAST_INDEX_KEYS and type(value) is int and value >= 0:
            text[key] = sum(src <= value for src in src_layers) - 1
    for key in _COUNT_KEYS:
        if type(text.get(key)) is int and text[key] == declared:
            text[key] = len(src_layers)
    return result


def _is_by_index(value: Mapping[object, Any], num_layers: int) -> bool:
    return bool(value) and all(str(k).isdecimal() and int(str(k)) < num_layers for k in value)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose output head has a matrix of its own."""
    result = copy.deepcopy(dict(config))
    for part in (result, text_config(result)):
        if part is result or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    return result
