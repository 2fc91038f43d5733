"""Tiny random models of any architecture in transformers, saved as a finetune would be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

DEMO = Path(__file__).resolve().parents[2] / "gptailor" / "demo" / "models" / "base"
VOCAB = 96

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
SMALL_GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4}


def save_real(
    folder: Path,
    model_type: str,
    *,
    seed: int = 0,
    small: Mapping[str, Any] = SMALL,
    raw: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    **keys: Any,
) -> Path:
    """Saves a random model with the demo's tokenizer.

    Args:
        folder: where to save it.
        model_type: the architecture's name in transformers.
        seed: seed of the weights.
        small: sizes for the config.
        raw: keys to set in the saved config.json.
        without: keys to remove from the saved config.json, because older files lack them.
        dtype: dtype of the weights.
        keys: further keys for the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**small, **keys})
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = 1.0 if parameter.ndim == 1 and "norm" in name else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(start + 0.15 * noise)
    model.to(dtype).save_pretrained(folder)
    for path in DEMO.glob("token*"):
        shutil.copy(path, folder)
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data = {key: value for key, value in data.items() if key not in without} | dict(raw or {})
    path.write_text(json.dumps(data))
    return folder


def logits_of(model: Any, num_tokens: int = 12) -> torch.Tensor:
    """The logits of two random sequences; shape (2, T, V)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 90, (2, num_tokens), generator=generator)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return found


def loaded(folder: Path) -> Any:
    """The model as stock transformers loads it, with every weight from its files."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()
