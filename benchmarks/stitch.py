"""Times `gptailor stitch` against `cp` of as many bytes, alternating, as whole processes.

Makes a base and three variants of a 1.1B-parameter Llama shape in bfloat16 (2.2 GB each), then runs
`cp`, a passthrough recipe and recipes that merge every layer, one after the other, for several
rounds. Prints each figure's minimum, median and maximum, and the ratio to the same round's `cp`.

    python benchmarks/stitch.py [--work FOLDER] [--rounds 5] [--layers 22] [--cases CASE …]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

_WEIGHTS = {"weights": {"a": 0.5, "b": 0.3, "c": 0.4}}
MERGES: dict[str, dict[str, Any]] = {
    "linear": _WEIGHTS,
    "task_arithmetic": _WEIGHTS,
    "slerp": {"models": ["a", "b"], "t": 0.5},
    "ties": {**_WEIGHTS, "density": 0.5},
    "dare_ties": {**_WEIGHTS, "density": 0.5},
    "breadcrumbs": {**_WEIGHTS, "density": 0.9},
    "della": {**_WEIGHTS, "density": 0.5},
}

HIDDEN, INTERMEDIATE, VOCABULARY, KV = 2048, 5632, 32000, 256


def layer_shapes(hidden: int, intermediate: int, kv: int) -> dict[str, list[int]]:
    """The tensors of a Llama layer: name → shape; `kv` is the width of keys and values."""
    return {
        "input_layernorm.weight": [hidden],
        "mlp.down_proj.weight": [hidden, intermediate],
        "mlp.gate_proj.weight": [intermediate, hidden],
        "mlp.up_proj.weight": [intermediate, hidden],
        "post_attention_layernorm.weight": [hidden],
        "self_attn.k_proj.weight": [kv, hidden],
        "self_attn.o_proj.weight": [hidden, hidden],
        "self_attn.q_proj.weight": [hidden, hidden],
        "self_attn.v_proj.weight": [kv, hidden],
    }


def write_model(folder: Path, num_layers: int, seed: int) -> None:
    """Writes a model folder with plausible bfloat16 numbers and the demo's tokenizer."""
    from gptailor.demo import PATH

    folder.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN]}
    in_layer = layer_shapes(HIDDEN, INTERMEDIATE, KV)
    for layer in sorted(range(num_layers), key=str):
        shapes |= {f"model.layers.{layer}.{k}": v for k, v in in_layer.items()}
    shapes |= {"model.norm.weight": [HIDDEN], "lm_head.weight": [VOCABULARY, HIDDEN]}
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32) * 0.02
    if seed:  # a finetune: close to the base, and as coarse as bfloat16 makes it
        values += np.random.default_rng(seed).standard_normal(1 << 22).astype(np.float32) * 0.001
    block = values.view(np.uint32) >> 16
    block_bytes = block.astype(np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, position, len(block_bytes)):
            file.write(block_bytes[: position - begin])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": num_layers,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PATH / "models" / "base" / name, folder / name)


def write_recipes(work: Path, num_layers: int) -> None:
    import yaml

    head = {
        "schema": "gptailor/recipe/1",
        "models": {name: f"./{name}" for name in ("base", "a", "b", "c")},
        "base": "base",
        "dtype": "bfloat16",
    }
    names = ("base", "a", "b", "c")
    passthrough = [{"take": names[4 * i // num_layers], "layer": i} for i in range(num_layers)]
    recipes = {"passthrough": passthrough}
    for method, ingredients in MERGES.items():
        recipes[method] = [{"merge": method, "layer": i, **ingredients} for i in range(num_layers)]
    for name, layers in recipes.items():
        (work / f"{name}.yaml").write_text(yaml.safe_dump(head | {"layers": layers}))


def seconds(command: list[str], out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    os.sync()  # so that this command does not pay for the previous one's writes
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--cases", nargs="*", default=[], help="only these; default: all")
    arguments = parser.parse_args()
    own = arguments.work is None
    work = Path(tempfile.mkdtemp(prefix="gptailor-bench-")) if own else arguments.work
    try:
        for seed, name in enumerate(("base", "a", "b", "c")):
            if not (work / name).exists():
                write_model(work / name, arguments.layers, seed)
        write_recipes(work, arguments.layers)
        source = work / "base" / "model.safetensors"
        gptailor = [str(Path(sys.executable).with_name("gptailor"))]
        out = work / "out"

        def stitch(recipe: str, *flags: str) -> list[str]:
            return [*gptailor, "stitch", str(work / recipe), str(out), "--no-verify", *flags]

        sync = f"cp {source} {out} && sync {out}"
        commands = {
            "cp": ["cp", str(source), str(out)],
            "passthrough": stitch("passthrough.yaml", "--no-sync"),
            **{m: stitch(f"{m}.yaml", "--no-sync") for m in MERGES},
            "cp, sync": ["sh", "-c", sync],
            "passthrough, sync": stitch("passthrough.yaml"),
        }
        unknown = set(arguments.cases) - set(commands)
        if unknown:
            parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(commands)}")
        if arguments.cases:
            wanted = {"cp", "cp, sync", *arguments.cases}
            commands = {name: command for name, command in commands.items() if name in wanted}
        figures: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(arguments.rounds + 1):
            for name, command in commands.items():
                taken = seconds(command, out)
                if number:  # the first round only fills the page cache
                    figures[name].append(taken)
    finally:
        if own:
            shutil.rmtree(work, ignore_errors=True)
        else:
            shutil.rmtree(work / "out", ignore_errors=True)
    print(f"{source.name}: {arguments.layers} layers, bfloat16, {arguments.rounds} rounds")
    print(f"{'':20} {'seconds: min median max':>30} {'ratio to cp: min median max':>34}")
    for name, values in figures.items():
        reference = figures["cp, sync" if name.endswith("sync") else "cp"]
        ratios = [a / b for a, b in zip(values, reference, strict=True)]
        columns = [
            "  ".join(f"{f(v):8.2f}" for f in (min, statistics.median, max))
            for v in (values, ratios)
        ]
        print(f"{name:20} {columns[0]:>30} {columns[1]:>34}")


if __name__ == "__main__":
    main()
