"""The architecture of a model: which tensor belongs to which layer, found from names and shapes.

There is no table with an entry for each architecture. The layer stack is the numbered group of
tensors that holds most bytes; what is left over is embeddings or head, by name. The same module
cuts a config to the kept layers, since which keys are per-layer is a fact about architectures too.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from gptailor.errors import ModelError, UsageError
from gptailor.models.checkpoint import TensorInfo

Role = Literal["embeddings", "head"]

_EMBEDDINGS = re.compile(r"embed(?!_out)|(^|\.)(wte|wpe|tok_embeddings|emb)\b|inv_freq|rotary")
_RESIDUAL_WRITERS = re.compile(
    r"(^|\.)(o_proj|down_proj|out_proj|c_proj|dense|dense_4h_to_h|fc2|wo|w2)\.(weight|bias)$"
)
_POST_NORMS = re.compile(r"post_feedforward|post_attention_norm\b|post_mlp|post_self_attn")
_NUMBER = r"(0|[1-9][0-9]{0,5})"
_LAYER = re.compile(rf"{_NUMBER}\.")
_MAX_NUMBERS = 8
"""How deep in a name a layer's number is looked for: layers lie outside, experts inside."""
_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_INDEX_LIST_KEYS = (
    "mlp_only_layers", "cross_attention_layers", "attn_layer_indices", "moe_layers",
    "full_attn_idxs", "hybrid_layer_ids",
)  # fmt: skip
_PREFIX_COUNT_KEYS = ("first_k_dense_replace",)
_PATTERN_KEYS: dict[str, tuple[object, str]] = {
    # key → the value with which it has no effect on which layer is of which kind,
    # and the list that stands above it where the config has one
    "sliding_window_pattern": (None, "layer_types"),
    "no_rope_layer_interval": (None, "no_rope_layers"),
    "decoder_sparse_step": (1, "mlp_layer_types"),
    "attn_layer_period": (None, "layer_types"),
    "expert_layer_period": (None, "mlp_layer_types"),
    "interleave_moe_layer_step": (1, "moe_layers"),
    "full_attention_interval": (None, "layer_types"),
    "num_kv_shared_layers": (0, ""),
}
_IMPLIED_LISTS: dict[str, tuple[str, ...]] = {
    # list → the model types (of transformers) that fill it in by a rule where it is missing
    "layer_types": (
        "afmoe", "bailing_hybrid", "beam", "cohere2", "cohere2_moe", "cwm", "deepseek_v4",
        "diffusion_gemma_text", "dots3_note_text", "embedding_gemma2_text", "exaone4",
        "exaone_moe", "flint", "gemma2", "gemma3_text", "gemma3", "gemma3n_text", "gemma4_text",
        "gemma4_unified_text", "glm5_next_text", "gpt_oss", "granite_swa", "granitemoe_swa",
        "inkling2_text", "inkling_text", "kimi_linear", "kolibri1", "lfm3", "llama4_text",
        "mimo_v2_flash", "minimax", "modernbert-decoder", "muse_glimmer_text", "muse_spark_text",
        "neomme", "olmo3", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
        "qwen4_exp_text", "t5gemma2_text", "vaultgemma",
    ),
    "no_rope_layers": ("llama4_text", "smollm3", "mistral_large4_text"),
    "mlp_layer_types": (
        "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v4", "dots3_note_text",
        "ernie4_5_vl_moe_text", "exaone_moe", "glm4_moe_lite", "glm5_next_text", "hy_v3", "hy_v4",
        "kimi_linear", "laguna", "mimo_v2_flash", "mistral_large4_text", "step3p5",
        "unlimited_ocr_text",
    ),
    "indexer_types": ("hy_v4",),
    "activation_sparsity_pattern": ("gemma3n_text",),
    "layers_block_type": ("zamba", "zamba2"),
    "attention_layers": ("gpt_neo",),
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Where the layers of a model are.

    Attributes:
        prefix: what stands before the layer's number, for example "model.layers.".
        num_layers: how many layers there are.
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
            UsageError: they can't be told, or a norm follows them, so that no scale folds into
                them exactly.
        """
        suffixes = tuple(self.layers[layer])
        found = tuple(s for s in suffixes if _RESIDUAL_WRITERS.search(s))
        weights = [s for s in found if s.endswith(".weight")]
        if len(weights) != 2 or any(_POST_NORMS.search(s) for s in suffixes):
            raise UsageError(
                f"scale can't be folded into {self.prefix}{layer}: this architecture does not "
                "write to the residual stream through exactly two plain projections."
            )
        return found


def find_architecture(tensors: Mapping[str, TensorInfo], where: object) -> Architecture:
    """Finds the layer stack among a checkpoint's tensors.

    Args:
        tensors: the checkpoint's tensors.
        where: the model, for errors.

    Raises:
        ModelError: there is no numbered stack, or a number is missing.
    """
    n_bytes: dict[str, int] = defaultdict(int)
    for name, info in tensors.items():
        for match in islice(re.finditer(rf"(?:^|\.){_NUMBER}\.", name), _MAX_NUMBERS):
            n_bytes[name[: match.start(1)]] += info.n_bytes
    if not n_bytes:
        raise ModelError(f"{where} has no numbered layers, so there is nothing to cut.")
    prefix = max(n_bytes, key=lambda p: (n_bytes[p], -len(p)))
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


def _inside(name: str, prefix: str) -> re.Match[str] | None:
    """The layer's number and the dot after it, where the name goes on like that."""
    return _LAYER.match(name, len(prefix)) if name.startswith(prefix) else None


def role_of(name: str) -> Role:
    """Whether a tensor outside the stack belongs to the embeddings or to the head."""
    return "embeddings" if _EMBEDDINGS.search(name) else "head"


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the layer stack: itself, or its `text_config`."""
    nested = config.get("text_config")
    if isinstance(nested, dict) and not any(key in config for key in _COUNT_KEYS):
        return nested
    return config


def layer_count(text: Mapping[str, Any]) -> int | None:
    """The number of layers that a config names, or None."""
    counts = (text[key] for key in _COUNT_KEYS if type(text.get(key)) is int)
    return next(counts, None)


def per_layer_lists(config: Mapping[str, Any], num_layers: int) -> dict[str, list[Any]]:
    """The lists of a config that have one entry for each layer."""
    return {
        key: value
        for key, value in config.items()
        if isinstance(value, list)
        and len(value) == num_layers
        and key not in _INDEX_LIST_KEYS
        and key != "architectures"
        and not key.endswith(("token_id", "token_ids"))
    }


def cut_config(config: Mapping[str, Any], src_layers: Sequence[int]) -> dict[str, Any]:
    """A config for the kept layers: layer count and every per-layer list cut to match.

    Args:
        config: what `config.json` holds.
        src_layers: the source layer of each output layer.

    Raises:
        ModelError: the config has no layer count.
        UsageError: the kind of a layer follows from its index by a rule that a cut would break.
    """
    result = copy.deepcopy(dict(config))
    text = text_config(result)
    num_layers = layer_count(text)
    if num_layers is None:
        raise ModelError(f"config.json names no layer count (one of {', '.join(_COUNT_KEYS)}).")
    lists = per_layer_lists(text, num_layers)
    if list(src_layers) != list(range(num_layers)):
        _refuse_patterns(text, lists)
    for key, values in lists.items():
        text[key] = [values[src] for src in src_layers]
    for key in _INDEX_LIST_KEYS:
        if isinstance(text.get(key), list):
            named = {src for src in text[key] if isinstance(src, (int, float))}
            text[key] = [out for out, src in enumerate(src_layers) if src in named]
    for key in _PREFIX_COUNT_KEYS:
        if isinstance(text.get(key), int):
            kinds = [src < text[key] for src in src_layers]
            _check_prefix(key, kinds)
            text[key] = sum(kinds)
    if isinstance(text.get("max_window_layers"), int):
        kinds = [src < text["max_window_layers"] for src in src_layers]
        if text.get("use_sliding_window") and "layer_types" not in lists:
            _check_prefix("max_window_layers", kinds)
        text["max_window_layers"] = sum(kinds)
    for key in _COUNT_KEYS:
        if key in text:
            text[key] = len(src_layers)
    return result


def _check_prefix(key: str, kinds: Sequence[bool]) -> None:
    if list(kinds) != sorted(kinds, reverse=True):
        raise UsageError(f"{key} of config.json needs its first layers to stay in order.")


def _refuse_patterns(text: Mapping[str, Any], lists: Iterable[str]) -> None:
    """Raises a `UsageError` where a layer's kind follows from its index, which a cut changes."""
    explicit = {*lists, *(key for key in _INDEX_LIST_KEYS if isinstance(text.get(key), list))}
    rule = "so that a layer's kind follows from its index, and a cut would change it"
    for key, (harmless, instead) in _PATTERN_KEYS.items():
        if text.get(key) not in (None, harmless) and instead not in explicit:
            hint = f": save the config with an explicit {instead} list first" if instead else ""
            raise UsageError(f"config.json sets {key}, {rule}{hint}.")
    if any(isinstance(text.get(key), int) for key in _PREFIX_COUNT_KEYS):
        explicit.add("mlp_layer_types")
    for key, model_types in _IMPLIED_LISTS.items():
        if text.get("model_type") in model_types and key not in explicit:
            raise UsageError(
                f"config.json has no list {key}, {rule}: load and save the config with "
                "transformers, which writes the list."
            )
