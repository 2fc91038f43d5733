"""A config's keys about quantization and code: true of the weights, or leftovers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptailor.errors import ModelError
from gptailor.models.family import Family
from gptailor.recipe import Recipe, Take
from gptailor.stitching.write import write_model
from tests.models.tiny import Entry, save_model

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def written(folder: Path, out: Path) -> dict[str, Any]:
    recipe = Recipe({"m": str(folder)}, "m", (Take("m", 0), Take("m", 2)), "m", "m")
    write_model(recipe, Family({"m": str(folder)}, "m"), out, sync=False)
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


@pytest.mark.parametrize("quantization", [BNB, FP8, {"quant_method": "gptq", "bits": 4}])
def test_a_leftover_quantization(tmp_path: Path, quantization: dict[str, Any]) -> None:
    """As in finetunes that were trained on a quantized model and merged back."""
    from transformers import AutoModelForCausalLM

    code = {"AutoConfig": "configuration_llama.LlamaConfig", "AutoModel": "org/code--x.Y"}
    changes = {"quantization_config": quantization, "auto_map": code}
    folder = save_model(tmp_path / "left", config=changes)
    config = written(folder, tmp_path / "out")
    assert "quantization_config" not in config
    assert config["auto_map"] == {"AutoModel": "org/code--x.Y"}  # this code is still there
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(next(model.parameters()).dtype) == "torch.bfloat16"
    plain = save_model(tmp_path / "plain")
    assert not Family({"left": str(folder), "plain": str(plain)}, "left").open_configs


def test_rounding_in_the_forward_pass_is_not_a_leftover(tmp_path: Path) -> None:
    """BitNet's weights are stored unrounded and rounded whenever they are used."""
    bitnet = {"quant_method": "bitnet", "quantization_mode": "online"}
    folder = save_model(tmp_path / "m", config={"quantization_config": bitnet})
    with pytest.raises(
        ModelError, match=r"rounded whenever they are used \('bitnet'\), which is n"
    ):
        Family({"m": str(folder)}, "m")


def _entry(dtype: str, *shape: int) -> Entry:
    return dtype, shape, bytes(int(np.prod(shape)) * {"F32": 4, "I32": 4, "BF16": 2}.get(dtype, 1))


QUANTIZED: dict[str, tuple[dict[str, Any] | None, dict[str, Entry]]] = {
    "bitsandbytes 4 bit": (
        BNB,
        {f"{Q_PROJ}.weight": _entry("U8", 128, 1), f"{Q_PROJ}.weight.absmax": _entry("F32", 4)},
    ),
    "bitsandbytes 8 bit": (BNB, {f"{Q_PROJ}.weight": _entry("I8", 16, 16)}),
    "fp8": (FP8, {f"{Q_PROJ}.weight": _entry("F8_E4M3", 16, 16)}),
    "fp8 without a word": (None, {f"{Q_PROJ}.weight": _entry("F8_E4M3", 16, 16)}),
    "scales": (FP8, {f"{Q_PROJ}.weight_scale_inv": _entry("F32", 1, 1)}),
    "gptq": ({"quant_method": "gptq"}, {f"{Q_PROJ}.qweight": _entry("I32", 2, 16)}),
    "awq without a word": (None, {f"{Q_PROJ}.qzeros": _entry("I32", 1, 2)}),
    "mxfp4": (None, {"model.layers.0.mlp.experts.down_proj_blocks": _entry("U8", 2, 4, 16)}),
    "packed": ({"quant_method": "aqlm"}, {f"{Q_PROJ}.codes": _entry("I8", 2, 16)}),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_that_are_quantized(tmp_path: Path, name: str) -> None:
    quantization, tensors = QUANTIZED[name]
    config = {"quantization_config": quantization} if quantization else {}
    folder = save_model(tmp_path / "m", tensors=tensors, config=config)
    with pytest.raises(ModelError) as caught:
        Family({"m": str(folder)}, "m")
    text = str(caught.value)
    by = f" by {quantization['quant_method']!r}" if quantization else ""
    first = f" ({next(iter(tensors))} has the type {next(iter(tensors.values()))[0]})"
    assert text == (
        f"{folder} is quantized{by}{first}, so it can't be merged or cast: save it in "
        "bfloat16 first (dequantize() of transformers)."
    )


def test_integer_masks_are_not_quantization(tmp_path: Path) -> None:
    """Old files of GPT-2 and related models hold the causal attention mask."""
    masks = {f"model.layers.{i}.self_attn.bias": _entry("U8", 1, 1, 8, 8) for i in range(4)} | {
        f"model.layers.{i}.self_attn.seen": _entry("BOOL", 8, 8) for i in range(4)
    }
    folder = save_model(tmp_path / "m", tensors=masks, config={"quantization_config": BNB})
    Family({"m": str(folder)}, "m")
