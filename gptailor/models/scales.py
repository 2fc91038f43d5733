"""Model types for which a factor on a layer's output folds into its weights exactly.

This requires that everything that reads the residual stream normalises it first. Tensor names can't
tell: GPT and GPT-2 have the same ones, but in GPT the norms come last. So the types are listed;
`python -m tools.sweep` compares each of them with stock transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptailor.errors import UsageError
from gptailor.models.architecture import text_config

NORMS_FIRST = frozenset((
    "arcee", "biogpt", "bitnet", "bloom", "cohere", "cohere2", "cohere_compass_text", "cwm",
    "ernie4_5", "falcon", "fuyu", "gemma", "glm", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "granite", "helium", "hunyuan_v1_dense", "internlm3", "iquestcoder", "jais2", "lfm2", "llama",
    "ministral", "ministral3", "mistral", "nanochat", "nemotron", "olmo", "opt", "persimmon", "phi",
    "phi3", "phi4_multimodal", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
    "vaultgemma", "xglm",
))  # fmt: skip
"""`model_type`s of transformers in which norms come first."""

_NORMS_LAST = {"do_layer_norm_before": False, "apply_residual_connection_post_layernorm": True}
"""Settings with which some of them (OPT, BLOOM) read the stream without a norm."""


def check_scales(config: Mapping[str, Any], where: object) -> None:
    """Raises a `UsageError` if a scale can't be folded into models with this config.

    Args:
        config: the contents of config.json.
        where: the model, for the error.
    """
    text = text_config(dict(config))
    kind = text.get("model_type", config.get("model_type"))
    others = [key for key, value in _NORMS_LAST.items() if text.get(key) is value]
    if kind in NORMS_FIRST and not others:
        return
    why = f"with {others[0]}" if others else "of this type"
    raise UsageError(
        f"{where}: scale can't be folded into a model {why} ({kind}), because its layers may read "
        "each other's output without a norm; take the layer without scale."
    )
