"""Tiny random models of several architectures, in which no part is negligible."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptailor.evaluation.lm import ResidentLM
from gptailor.evaluation.loading import load_tokenizer
from tests.conftest import save_tokenizer

HIDDEN, VOCABULARY = 32, 96
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {**_HEADS, "head_dim": 8, "query_pre_attn_scalar": 8}
_NEOX = {"num_attention_heads": 4, "rotary_pct": 0.5}
_GPT2 = {"n_embd": HIDDEN, "n_head": 4, "n_inner": 80, "n_positions": 128}
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}  # fmt: skip
_OPT = {"ffn_dim": 80, "num_attention_heads": 4, "word_embed_proj_dim": HIDDEN}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_HEADS},
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "gpt_neox:sequential": {**_NEOX, "use_parallel_residual": False},
    "phi": {"num_attention_heads": 4, "partial_rotary_factor": 0.5},
    "falcon": {
        "num_attention_heads": 4, "parallel_attn": True, "new_decoder_architecture": False,
        "ffn_hidden_size": 80,
    },
    "opt": _OPT,
    "opt:after": {**_OPT, "do_layer_norm_before": False},
    "bloom": {"n_head": 4},
    "gemma2": {**_GEMMA},
    "olmo2": {**_HEADS},
    "granite": {**_HEADS, "residual_multiplier": 0.22, "embedding_multiplier": 6.0},
    "cohere": {**_HEADS},
    "mixtral": {**_HEADS, **_MIXTRAL},
    "qwen2_moe": {**_HEADS, **_QWEN_MOE},
    "granitemoe": {**_HEADS, **_MIXTRAL, "residual_multiplier": 0.5},
    "starcoder2": {**_HEADS, "use_bias": True},
}  # fmt: skip
"""Name → fields of its config; what is after a colon tells variants apart."""


OTHERS: dict[str, dict[str, Any]] = {
    "gemma2:windows": {
        **_GEMMA, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma3n_text": {
        **_HEADS, "head_dim": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 4,
        "layer_types": ["full_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
}  # fmt: skip
"""More of them, which some tests need."""


def tiny(name: str, num_layers: int = 2, seed: int = 0, dtype: str = "float32") -> Any:
    """A model whose weights all have a standard deviation of 0.3, norms around 1."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name.partition(":")[0]]
    known = {field.name for field in dataclasses.fields(kind)} | kind.attribute_map.keys()
    fields = {**_COMMON, **(ARCHITECTURES | OTHERS)[name], "num_hidden_layers": num_layers}
    config = kind(**{key: value for key, value in fields.items() if key in known})
    assert config.hidden_size == HIDDEN
    assert config.num_hidden_layers == num_layers
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.add_(noise, alpha=0.3)
    return model.to(getattr(torch, dtype)).eval()


def layers_of(model: Any) -> list[nn.Module]:
    """The layers of a model of any architecture."""
    count = model.config.num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return list(stacks[0])


def lm_of(model: Any, folder: Path) -> ResidentLM:
    """The model as lm-eval sees it, with the tests' tokenizer."""
    folder.mkdir(exist_ok=True)
    save_tokenizer(folder)
    return ResidentLM(model, load_tokenizer(folder), 4)


def save_tiny(
    folder: Path,
    name: str,
    num_layers: int,
    seed: int = 0,
    like: Path | None = None,
    dtype: str = "float32",
) -> Path:
    """Writes a model and the tests' tokenizer: random, or a step away from the one in `like`."""
    from transformers import AutoModelForCausalLM

    model = tiny(name, num_layers, seed)
    if like is not None:
        start = AutoModelForCausalLM.from_pretrained(like, dtype=torch.float32)
        with torch.no_grad():
            for parameter, step in zip(start.parameters(), model.parameters(), strict=True):
                parameter.add_(step, alpha=0.2)
        model = start
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
