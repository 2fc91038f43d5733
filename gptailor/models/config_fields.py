"""Which config fields change what a model computes, and in which of them two configs differ.

Only fields that are known to have no effect are listed, so an unknown field counts as a difference.
This module does not know transformers' defaults: a field that only one of the two files has is a
difference, too, and `evaluation.agreement` asks transformers about it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gptailor.models.untrusted import shown

NAMES = frozenset({"_name_or_path", "name_or_path", "transformers_version"})
"""Fields that say where a config comes from; they differ in every family."""

_HARMLESS = NAMES | {
    # how it is loaded and run, not what it computes
    "dtype", "torch_dtype", "use_cache", "auto_map", "quantization_config", "pretraining_tp",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal", "_flash_attn_2_enabled", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "chunk_size_feed_forward",
    "num_logits_to_keep", "gradient_checkpointing",
    # what is returned besides the logits
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "use_return_dict", "torchscript",
    # training: initial weights, losses
    "initializer_range", "init_std", "initializer_factor", "init_method_std",
    "router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef",
    # heads of other tasks
    "architectures", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels",
    # layers after the stack that predict more tokens are left out
    "num_nextn_predict_layers", "num_mtp_layers",
    # vocabularies are compared by their contents
    "vocab_size", "tokenizer_class",
    # the files decide about it
    "tie_word_embeddings",
}  # fmt: skip
_TOKEN = re.compile(r"(?<!pad)_token_(id|ids|index)$")  # RoBERTa's positions begin at the padding
_DROPOUT = re.compile(r"(^|_)(dropout|pdrop|layerdrop|drop_path)(_|$)")

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""How many positions a model was made for; lm-eval takes this for its context length."""

SPELLED_OUT = {
    "max_window_layers": "layer_types",
    "use_sliding_window": "layer_types",
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "attn_layer_period": "layer_types",
    "attn_layer_offset": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
}
"""Fields that only determine each layer's kind → the list that gives it layer by layer."""


class _Absent:
    """The value of a field that is absent."""

    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()


class Difference(NamedTuple):
    """A field in which two configs differ.

    Attributes:
        key: its path, for example "text_config.rope_parameters.rope_theta" or "layer_types[3]".
        value: its value in the first; `ABSENT` if the field is not there.
        base_value: the same in the second.
    """

    key: str
    value: object
    base_value: object

    def __str__(self) -> str:
        return f"{self.key} {shown(self.value)} (the base: {shown(self.base_value)})"


def differences(config: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[Difference]:
    """All fields that differ, sorted; looks inside dictionaries and lists of equal length."""
    for key in sorted({*config, *base}):
        yield from _compared(key, config.get(key, ABSENT), base.get(key, ABSENT))


def _compared(key: str, value: object, base_value: object) -> Iterator[Difference]:
    if isinstance(value, dict) and isinstance(base_value, dict):
        texts = [{str(k): v for k, v in one.items()} for one in (value, base_value)]
        for inner in differences(*texts):
            yield inner._replace(key=f"{key}.{inner.key}")
    elif isinstance(value, list) and isinstance(base_value, list) and len(value) == len(base_value):
        for i, pair in enumerate(zip(value, base_value, strict=True)):
            yield from _compared(f"{key}[{i}]", *pair)
    elif not _same(value, base_value):
        yield Difference(key, value, base_value)


def _same(value: Any, base_value: Any) -> bool:
    """Whether two values are equal; numbers only need to be equal in float32, because some tools
    write 1e-6 as float32 stores it."""
    if not (_is_number(value) and _is_number(base_value)):
        return type(value) is type(base_value) and bool(value == base_value)
    if isinstance(value, int) and isinstance(base_value, int):
        return value == base_value
    try:
        pair = (float(value), float(base_value))
    except OverflowError:
        return bool(value == base_value)
    return all(map(math.isnan, pair)) or math.isclose(*pair, rel_tol=2**-23)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_harmless(difference: Difference) -> bool:
    """True if the field, or one that contains it, changes no layer of any architecture."""
    parts = re.sub(r"\[\d+\]", "", difference.key).split(".")
    if any(part in _HARMLESS or _TOKEN.search(part) for part in parts):
        return True
    if _DROPOUT.search(parts[-1]) is None:
        return False
    values = (difference.value, difference.base_value)
    return all(v is None or _is_number(v) for v in values)  # a rate: off at inference
