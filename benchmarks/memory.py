"""Measures peak memory of `gptailor stitch`, without page cache, for models larger than memory.

Makes two models of a 70B-parameter Llama shape in bfloat16 as sparse files (141 GB each, taking no
disk space), then stitches in separate processes and reads `RssAnon` (/proc/PID/status) every few
milliseconds: once with all 80 layers passed through, keeping holes, and once with two layers
merged, one by `linear`, one by `ties`, which writes 3.4 GB.

    python benchmarks/memory.py [--work FOLDER] [--io pread] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from stitch import layer_shapes

HIDDEN, INTERMEDIATE, VOCABULARY, KV, LAYERS = 8192, 28672, 128256, 1024, 80
LAYERS_PER_SHARD = 4


def write_sparse_model(folder: Path) -> None:
    """Writes shards that consist of headers and holes."""
    from gptailor.demo import PATH

    folder.mkdir(parents=True)
    ends = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN]}
    parts = [ends]
    in_layer = layer_shapes(HIDDEN, INTERMEDIATE, KV)
    for first in range(0, LAYERS, LAYERS_PER_SHARD):
        layers = range(first, first + LAYERS_PER_SHARD)
        parts.append(
            {f"model.layers.{i}.{k}": shape for i in layers for k, shape in in_layer.items()}
        )
    parts.append({"model.norm.weight": [HIDDEN], "lm_head.weight": [VOCABULARY, HIDDEN]})
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        header, position = {}, 0
        for key, shape in shapes.items():
            end = position + 2 * math.prod(shape)
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PATH / "models" / "base" / name, folder / name)


def write_recipes(work: Path) -> None:
    head = {
        "schema": "gptailor/recipe/1",
        "models": {"base": "./base", "a": "./a"},
        "base": "base",
        "dtype": "bfloat16",
    }
    passthrough = [{"take": ("base", "a")[i // 4 % 2], "layer": i} for i in range(LAYERS)]
    merged = [
        {"merge": "linear", "layer": 3, "weights": {"base": 0.4, "a": 0.6}},
        {"merge": "ties", "layer": 4, "weights": {"base": 0.4, "a": 0.6}, "density": 0.5},
    ]
    for name, layers in (("passthrough", passthrough), ("merged", merged)):
        (work / f"{name}.yaml").write_text(yaml.safe_dump(head | {"layers": layers}))


def peak_anonymous(command: list[str]) -> tuple[int, float]:
    """The largest `RssAnon` observed, in bytes, and the seconds that the process took."""
    peak, began = 0, time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = status.read_text().splitlines()
            found = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
            peak = max([peak, *(1024 * n for n in found)])
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return peak, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="a folder on the disk to use")
    parser.add_argument("--io", default="auto")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gptailor-bench-", dir=arguments.work))
    figures = {}
    try:
        for name in ("base", "a"):
            write_sparse_model(work / name)
        write_recipes(work)
        for name in ("passthrough", "merged"):
            words = ["stitch", str(work / f"{name}.yaml"), str(work / "out"), "--no-verify"]
            words += ["--no-sync", "--io", arguments.io]
            peak, seconds = peak_anonymous([sys.executable, "-m", "gptailor.cli", *words])
            files = list((work / "out").glob("*.safetensors"))
            figures[name] = {
                "peak_mb": round(peak / 1e6, 1),
                "seconds": round(seconds, 2),
                "files": len(files),
                "gb": round(sum(f.stat().st_size for f in files) / 1e9, 2),
                "allocated_gb": round(sum(512 * f.stat().st_blocks for f in files) / 1e9, 2),
            }
            shutil.rmtree(work / "out")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, row in figures.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
