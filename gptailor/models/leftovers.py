"""Removes stale entries from a config.json: quantization that no longer applies, and code that is
not copied along.

A finetune that was trained on a quantized model and merged back often keeps the quantization in its
config; a loader would then quantize the weights, or fail. Weights that really are quantized are
refused: they can be neither merged nor cast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptailor.errors import ModelError
from gptailor.models.checkpoint import TensorInfo
from gptailor.models.untrusted import shown

_QUANTIZATION = ("quantization_config", "compression_config")
_IN_THE_FORWARD_PASS = ("bitnet",)
"""Methods that store unquantized weights and round them at run time; for these the config's entry
is not stale."""
_MARKS = frozenset(
    {
        "qweight", "qzeros", "g_idx", "absmax", "nested_absmax", "quant_map", "SCB",
        "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_packed", "weight_zero_point",
        "bitsandbytes__nf4", "bitsandbytes__fp4",
    }
)  # fmt: skip
"""Last parts of names that only quantized weights have."""


def clean_config(
    config: Mapping[str, Any], tensors: Iterable[TensorInfo], folder: Path
) -> dict[str, Any]:
    """A config without stale quantization and without `auto_map` to files of the folder.

    Args:
        config: the contents of config.json.
        tensors: those of the folder's files.
        folder: for errors.

    Raises:
        ModelError: the weights are quantized.
    """
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    declared = [part[key] for part in parts for key in _QUANTIZATION if part.get(key)]
    methods = [d.get("quant_method") for d in declared if isinstance(d, dict)]
    for method in methods:
        if method in _IN_THE_FORWARD_PASS:
            raise ModelError(
                f"{folder}: according to config.json its weights are rounded whenever they are "
                f"used ({shown(method)}), which is not supported: use a model without this."
            )
    info = next((info for info in tensors if _is_quantized(info, bool(declared))), None)
    if info is not None:
        by = f" by {shown(methods[0])}" if methods and methods[0] else ""
        raise ModelError(
            f"{folder} is quantized{by} ({info.name} has the type {info.dtype}), so it can't be "
            "merged or cast: save it in bfloat16 first (dequantize() of transformers)."
        )
    return {
        key: _cleaned(value) if isinstance(value, dict) else value
        for key, value in _cleaned(config).items()
    }


def _cleaned(part: Mapping[str, Any]) -> dict[str, Any]:
    return without_local_code({k: v for k, v in part.items() if k not in _QUANTIZATION})


def without_local_code(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` without `auto_map` entries for files of the folder; "org/name--file.Class" stays."""
    result = dict(data)
    code = result.pop("auto_map", None)
    if isinstance(code, dict):
        code = {key: value for key, value in code.items() if "--" in str(value)}
    elif "--" not in str(code):
        code = None
    return result | {"auto_map": code} if code else result


def _is_quantized(info: TensorInfo, declared: bool) -> bool:
    leaf = info.name.rpartition(".")[2]
    if info.dtype.startswith("F8_") or leaf in _MARKS:
        return True
    if info.dtype in ("BOOL", "BF16", "F16", "F32", "F64") or len(info.shape) < 2:
        return False
    # in old GPT-2 files, causal attention masks are integers and called bias
    return leaf == "weight" or leaf.endswith("_blocks") or (declared and leaf[-4:] != "bias")
