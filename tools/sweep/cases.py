"""The families to try: one of each model type, and variants.

Variants cover layers that differ by rules that are easily overlooked, modules that compute a
constant from their position, and configs on the hub in an older spelling than `save_pretrained`
writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Case:
    """One family to try.

    Attributes:
        name: the model type, followed by a colon and the variant if there are several.
        changes: config fields in addition to the rules'; a mapping goes into the sub-config of that
            name.
        raw: rewrites config.json of the candidates, for spellings of older versions.
        raw_base: the same, for the base only.
        dtype: of the weights, and of results.
        forward: the dtype of running models; empty for `dtype`.
        wide: tensors whose name contains this are float32 in the files nevertheless.
        recipes: names of the recipes to try; all if empty.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    raw: Callable[[dict[str, Any]], None] | None = None
    raw_base: Callable[[dict[str, Any]], None] | None = None
    dtype: str = "float32"
    forward: str = ""
    wide: str = "—"
    recipes: tuple[str, ...] = ()

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return self.name.partition(":")[0]


def model_types() -> list[str]:
    """All model types with a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


_DEPTH = 7
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def _without(*keys: str) -> Callable[[dict[str, Any]], None]:
    """Removes keys from a config, like versions of transformers that did not write them."""

    def edit(config: dict[str, Any]) -> None:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                for key in keys:
                    part.pop(key, None)

    return edit


def _with(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Sets keys of a config, and removes those whose value is None."""

    def edit(config: dict[str, Any]) -> None:
        for key, value in values.items():
            config.pop(key, None)
            if value is not None:
                config[key] = value

    return edit


_PARTLY_FLOAT32 = (
    "llama", "gpt2", "afmoe", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v4",
    "dots1", "ernie4_5_moe", "flint", "gpt_oss", "hy_v4", "inkling_text", "kolibri1",
    "longcat_flash", "mimo_v2_flash", "minimax", "mamba", "nemotron_h", "rwkv", "solar_open",
)  # fmt: skip
"""Model types to try in bfloat16, too; most of them keep some tensors in float32."""


def variants() -> list[Case]:
    """Families in addition to the plain one of each type."""
    mixed = ["sliding_attention", "full_attention"] * 2
    late = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    hybrid = ["linear_attention", "moe", "full_attention", "linear_attention"]
    sparse = {"decoder_sparse_step": 2}
    return [
        Case("llama:tied", {"tie_word_embeddings": True}),
        Case("llama:untied", {"tie_word_embeddings": False}),
        Case("llama:wide norms", dtype="bfloat16", wide="norm"),
        Case("llama:wide norms, float32", dtype="bfloat16", wide="norm", forward="float32"),
        Case("gpt2:inverse", {"scale_attn_by_inverse_layer_idx": True}),
        Case("afmoe:dense 2", {"num_dense_layers": 2, "global_attn_every_n_layers": 2}),
        Case(
            "afmoe:old",
            {"num_dense_layers": 2, "global_attn_every_n_layers": 2},
            raw=_without("layer_types"),
        ),
        Case(
            "big_bird:sparse",
            {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1},
        ),
        Case("bloom:post", {"apply_residual_connection_post_layernorm": True}),
        Case("cohere2:old", raw=_with(layer_types=None, sliding_window_pattern=2)),
        Case("deepseek_v2:dense 2", {"first_k_dense_replace": 2}),
        Case("deepseek_v3:dense 2", {"first_k_dense_replace": 2}),
        Case("dots1:window", {"layer_types": mixed, "sliding_window": 6}),
        Case("ernie4_5_moe:interval", {"moe_layer_interval": 2}),
        Case("ernie4_5_moe:end", {"moe_layer_start_index": 1, "moe_layer_end_index": 2}),
        Case("exaone4:letters", {"layer_types": mixed}, raw=_with(sliding_window_pattern="LG")),
        Case("falcon:alibi", {"alibi": True, "new_decoder_architecture": False}),
        Case("falcon:new", {"new_decoder_architecture": True}),
        Case("gemma2:old", raw=_without("layer_types")),
        Case("gemma2:old base", raw_base=_without("layer_types")),
        Case("gemma3_text:mixed", {"layer_types": mixed}),
        Case(
            "gemma3_text:old",
            {"layer_types": None, "sliding_window_pattern": 2},
            raw=_with(layer_types=None, sliding_window_pattern=2),
        ),
        Case(
            "gemma3_text:old base",
            {"layer_types": mixed},
            raw_base=_with(layer_types=None, sliding_window_pattern=2),
        ),
        Case("gemma3n_text:shared", {"num_kv_shared_layers": 2}),
        Case("gemma3n_text:no per-layer", {"hidden_size_per_layer_input": 0}),
        Case("gemma3n_text:sparse", {"activation_sparsity_pattern": [0.9, 0.0, 0.9, 0.0]}),
        Case("gemma4_text:shared", {"num_kv_shared_layers": 2}),
        Case("gemma4_text:no per-layer", {"hidden_size_per_layer_input": 0}),
        Case("gemma4_unified_text:shared", {"num_kv_shared_layers": 2, "layer_types": mixed}),
        Case("glm_moe_dsa:shared", {"indexer_types": ["full", "shared", "full", "shared"]}),
        Case("glm4_moe:dense 2", {"first_k_dense_replace": 2}),
        Case("gpt_neox:sequential", {"use_parallel_residual": False}),
        Case("granite_swa:thetas", {"layer_rope_theta": [1e4, 0, 1e5, 1e4]}),
        Case("jamba:period 3", {"attn_layer_period": 3, "attn_layer_offset": 1}),
        Case(
            "lfm2:indices",
            {"layer_types": ["conv", "full_attention"] * 2},
            raw=_with(layer_types=None, full_attn_idxs=[1, 3]),
        ),
        Case("lfm2_moe:dense 1", {"num_dense_layers": 1}),
        Case("lfm2_moe:dense 3", {"num_dense_layers": 3}),
        Case("llama4_text:mixed", {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2}),
        Case(
            "llama4_text:old",
            {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2},
            raw=_without("moe_layers", "no_rope_layers", "layer_types"),
        ),
        Case("modernbert-decoder:mixed", {"layer_types": mixed}),
        Case("nemotron_h:mixed", {"layer_types": hybrid}),
        Case(
            "nemotron_h:hub",
            {"layer_types": hybrid},
            raw=_with(
                hybrid_override_pattern="ME*M",
                layer_types=None,
                layers_block_type=None,
                num_hidden_layers=4,
            ),
        ),
        Case(
            "nemotron_h:blocks",
            {"layer_types": hybrid},
            raw=_with(
                layers_block_type=["mamba", "moe", "attention", "mamba"],
                layer_types=None,
                num_hidden_layers=4,
            ),
        ),
        Case("opt:after", {"do_layer_norm_before": False}),
        Case(
            "qwen2:mixed", {"use_sliding_window": True, "sliding_window": 6, "layer_types": mixed}
        ),
        Case("qwen2:old base", raw_base=_without("layer_types")),
        Case("qwen2:window", {"use_sliding_window": True, "max_window_layers": 2}),
        Case(
            "qwen2:window old",
            {"use_sliding_window": True, "max_window_layers": 2},
            raw=_without("layer_types"),
        ),
        Case(
            "qwen2:late", {"use_sliding_window": True, "max_window_layers": 2, "layer_types": late}
        ),
        Case("qwen2_moe:step 2", sparse),
        Case("qwen3_moe:step 2", sparse),
        Case("qwen3_moe:dense 1", {"mlp_only_layers": [1]}),
        Case("qwen3:old base", raw_base=_without("layer_types")),
        Case("qwen3_next:interval", {"layer_types": ["linear_attention", "full_attention"] * 2}),
        Case(
            "qwen3_next:old",
            raw=_with(layer_types=None, full_attention_interval=2),
            changes={"layer_types": ["linear_attention", "full_attention"] * 2},
        ),
        Case("recurrent_gemma:three", {"block_types": ["recurrent", "recurrent", "attention"]}),
        Case(
            "recurrent_gemma:four",
            {"block_types": ["recurrent", "recurrent", "attention", "recurrent"]},
        ),
        Case("rwkv:plain", {"rescale_every": 0}),
        Case("smollm3:mixed", {"no_rope_layer_interval": 2}),
        Case(
            "smollm3:old",
            {"no_rope_layer_interval": 2},
            raw=_without("no_rope_layers", "layer_types"),
        ),
        Case(
            "zamba:hub",
            {"attn_layer_period": 1, "attn_layer_offset": 0},
            raw=_without("layers_block_type"),
        ),
        Case("zamba2:two", {"num_mem_blocks": 2}),
    ]


def implied_cases() -> list[Case]:
    """Families of seven layers whose config.json leaves per-layer lists to its class.

    Configs on the hub are often like that: what `save_pretrained` now writes out was a rule when
    they were made.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from tools.sweep.fields import DROP, EXCEPTIONS
    from tools.sweep.tiny import tiny_config

    some = ("all", "no first", "no third", "no last", "mixed")
    found = []
    for model_type in model_types():
        lists = [k for k, v in EXCEPTIONS.get(model_type, {}).items() if isinstance(v, list)]
        names = {f.name for f in dataclasses.fields(CONFIG_MAPPING[model_type])}
        count = next((key for key in _COUNTS if key in names), None)
        if count is None:
            continue
        changes = {**dict.fromkeys(lists, DROP), count: _DEPTH}
        try:
            config = tiny_config(model_type, changes).to_dict()
            lists = [k for k, v in config.items() if isinstance(v, list) and len(v) == _DEPTH]
            rest = {key: value for key, value in config.items() if key not in lists}
            again = CONFIG_MAPPING[model_type].from_dict(rest).to_dict()
        except Exception:  # it can't leave them out
            continue
        implied = [key for key in lists if again.get(key) == config[key]]
        if implied:
            raw = _without(*implied)
            found.append(Case(f"{model_type}:implied", changes, raw, recipes=some))
    return found


@cache
def all_cases() -> tuple[Case, ...]:
    """A plain family for each model type, followed by its variants."""
    more = variants()
    some = ("all", "no second", "mixed", "merged")
    more += implied_cases()
    more += [Case(f"{t}:bfloat16", dtype="bfloat16", recipes=some) for t in _PARTLY_FLOAT32]
    result: list[Case] = []
    for model_type in model_types():
        result.append(Case(model_type))
        result += [case for case in more if case.model_type == model_type]
    return tuple(result)
