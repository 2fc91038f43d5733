"""Models into whose layers a factor on a layer's output folds exactly.

Each reader of the residual stream has to normalise it first, the final norm among them. Names of
tensors can't tell: GPT and GPT-2 have the same ones, and in GPT the norms come behind. So the types
are listed; each of them is compared with stock transformers by `python -m tools.sweep`.
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
"""Model types of transformers."""

_NORMS_LAST = {"do_layer_norm_before": False, "apply_residual_connection_post_layernorm": True}
"""Settings with which some of them (OPT, BLOOM) read the stream otherwise."""


def check_scales(config: Mapping[str, Any], where: object) -> None:
    """Raises a `UsageError` if a scale does not fold into models of this config.

    Args:
        config: what config.json holds.
        where: the model, for the error.
    """
    text = text_config(dict(config))
    kind = text.get("model_type", config.get("model_type"))
    others = [key for key, value in _NORMS_LAST.items() if text.get(key) is value]
    if kind in NORMS_FIRST and not others:
        return
    why = f"with {others[0]}" if others else "of this type"
    raise UsageError(
        f"{where}: scale can't be folded into a model {why} ({kind}): its layers are not known to "
        "read what the others wrote through a norm; take the layer without scale."
    )
