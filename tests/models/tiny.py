"""Tiny models written by hand: Llama's names and shapes, no torch, every layer identifiable.

`save_model` writes what transformers would write, or what it never would: every test of a broken
file starts from a good one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]
Entry = tuple[str, tuple[int, ...], bytes]

HIDDEN, HEADS, FFN, VOCAB = 16, 2, 24, 20
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8}
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

LAYER_SHAPES: dict[str, tuple[int, ...]] = {
    "input_layernorm.weight": (HIDDEN,),
    "mlp.down_proj.weight": (HIDDEN, FFN),
    "mlp.gate_proj.weight": (FFN, HIDDEN),
    "mlp.up_proj.weight": (FFN, HIDDEN),
    "post_attention_layernorm.weight": (HIDDEN,),
    "self_attn.k_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.v_proj.weight": (HIDDEN, HIDDEN),
}


def encoded(values: Array, dtype: str) -> bytes:
    """Float values as the bytes of a safetensors dtype, rounded to nearest even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8"}
    return np.asarray(values).astype(kinds[dtype]).tobytes()


def decoded(raw: bytes, dtype: str) -> Array:
    """The bytes of a safetensors dtype as float64."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype("f8")
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).astype("f8")


def file_bytes(header: object, data: bytes = b"") -> bytes:
    """A safetensors file; `header` is bytes that are used as they are, or an object for JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def save_tensors(path: Path, tensors: Mapping[str, Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [position, position + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += len(raw)
    path.write_bytes(file_bytes(header, b"".join(raw for _, _, raw in tensors.values())))


def load_tensors(path: Path) -> dict[str, Entry]:
    """A separate reader, so that the code under test does not check itself."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    header.pop("__metadata__", None)
    return {
        name: (e["dtype"], tuple(e["shape"]), raw[slice(*(begin + n for n in e["data_offsets"]))])
        for name, e in header.items()
    }


def load_model(folder: Path) -> dict[str, Entry]:
    result: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.safetensors")):
        result |= load_tensors(path)
    return result


def floats(entry: Entry) -> Array:
    return decoded(entry[2], entry[0]).reshape(entry[1])


def drawn(model: str, name: str, shape: tuple[int, ...]) -> Array:
    """Values unique to this model and tensor: a start that models share, plus the model's step."""

    def normal(key: str) -> Array:
        return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)

    start = 1.0 if name.endswith("norm.weight") else 0.0
    return start + 0.2 * normal(name) + 0.05 * normal(f"{model}/{name}")


def llama_tensors(
    model: str,
    num_layers: int = 4,
    *,
    dtype: str = "BF16",
    tied: bool = True,
    vocab: int = VOCAB,
    values: Callable[[str, str, tuple[int, ...]], Array] = drawn,
) -> dict[str, Entry]:
    shapes: dict[str, tuple[int, ...]] = {} if tied else {"lm_head.weight": (vocab, HIDDEN)}
    shapes["model.embed_tokens.weight"] = (vocab, HIDDEN)
    for i in range(num_layers):
        shapes |= {f"model.layers.{i}.{suffix}": s for suffix, s in LAYER_SHAPES.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    return {n: (dtype, s, encoded(values(model, n, s), dtype)) for n, s in shapes.items()}


def llama_config(num_layers: int = 4, *, tied: bool = True, vocab: int = VOCAB) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def save_tokenizer(folder: Path, words: Sequence[str] | None = None) -> None:
    words = [f"w{i}" for i in range(VOCAB - 4)] if words is None else words
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_model(
    folder: Path,
    num_layers: int = 4,
    *,
    name: str = "",
    dtype: str = "BF16",
    tied: bool = True,
    vocab: int = VOCAB,
    tensors: Mapping[str, Entry] | None = None,
    config: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
    shards: int = 1,
) -> Path:
    """Writes a whole model folder; `tensors` and `config` replace or add to its contents."""
    folder.mkdir(parents=True, exist_ok=True)
    made = llama_tensors(name or folder.name, num_layers, dtype=dtype, tied=tied, vocab=vocab)
    made |= tensors or {}
    if shards == 1:
        save_tensors(folder / "model.safetensors", made)
    else:
        save_shards(folder, made, shards)
    text = llama_config(num_layers, tied=tied, vocab=vocab) | dict(config or {})
    (folder / "config.json").write_text(json.dumps(text))
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_shards(folder: Path, tensors: Mapping[str, Entry], shards: int) -> None:
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_tensors(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    save_index(folder, weight_map)


def save_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_family(
    root: Path, names: Sequence[str] = ("base", "red", "green"), **kwargs: Any
) -> dict[str, str]:
    """Saves models side by side; returns a recipe's `models`."""
    return {name: str(save_model(root / name, **kwargs)) for name in names}


def run_python(
    code: str, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program in its own process; returns the completed process, with output as text."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@contextmanager
def mounted(folder: Path, *words: str) -> Iterator[Path]:
    """Runs `mount WORDS FOLDER` and unmounts at the end; skips the test if it is not permitted."""
    folder.mkdir(exist_ok=True)
    command = ["mount", *words, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"nothing can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[Path]:
    """A file system of that size at `folder`; skips the test if mounting is not permitted."""
    with mounted(folder, "-t", "tmpfs", "-o", f"size={n_bytes}", "gptailor-test"):
        yield folder


def free_bytes(folder: Path) -> int:
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize
