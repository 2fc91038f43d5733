"""The models that mergekit and gptailor both merge: made from seeds, identical to the last bit.

Six tiny Llamas with float32 weights of which no two magnitudes are equal: `base`, `red` and `green`
with tied embeddings, `untied/…` with a separate output head. This module does not use torch:
`tools/mergekit_models.py` runs it in mergekit's environment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit"
NUM_LAYERS = 5
_HIDDEN, _MLP, _VOCABULARY = 8, 12, 40
_SEEDS = {"base": 0, "red": 1, "green": 2}


def save_family(folder: Path) -> None:
    """Creates the six model folders below `folder`."""
    for tied in (True, False):
        base = _weights(0, tied)
        for name, seed in _SEEDS.items():
            step = _weights(seed, tied)
            weights = {
                key: value
                if seed == 0
                else value + np.float32(0.3) * (step[key] - step[key].mean())
                for key, value in base.items()
            }
            _save(folder / name if tied else folder / "untied" / name, weights, tied)


def _weights(seed: int, tied: bool) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.RandomState(seed)  # its numbers are the same in every version of numpy
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for i in range(NUM_LAYERS):
        layer = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (_HIDDEN, _HIDDEN)
        shapes[f"{layer}mlp.gate_proj.weight"] = (_MLP, _HIDDEN)
        shapes[f"{layer}mlp.up_proj.weight"] = (_MLP, _HIDDEN)
        shapes[f"{layer}mlp.down_proj.weight"] = (_HIDDEN, _MLP)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (_HIDDEN,)
    shapes["model.norm.weight"] = (_HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (_VOCABULARY, _HIDDEN)
    return {
        name: (random.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def _save(folder: Path, weights: Mapping[str, np.ndarray[Any, Any]], tied: bool) -> None:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": _VOCABULARY,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(_VOCABULARY - 4))]
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(vocabulary)},
            "unk_token": "<unk>",
        },
    }
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    for name, content in (
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", words),
    ):
        (folder / name).write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(_safetensors(weights))


def _safetensors(weights: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    header, position = {}, 0
    for name, value in weights.items():
        end = position + value.nbytes
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    data = b"".join(value.tobytes() for value in weights.values())
    return len(text).to_bytes(8, "little") + text + data
