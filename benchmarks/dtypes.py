"""Measures what bfloat16 and float16 cost on a CPU, with and without instructions for them.

    python benchmarks/dtypes.py [--documents 100] [--rounds 3]

Evaluates a random Llama of 29M parameters on documents of the demo's tasks, as a search does.
Figures are processor seconds of one thread, the minimum of several rounds, so that other programs
hardly matter. In each row's process, oneDNN (which multiplies torch's matrices) and torch's own
kernels are kept from using some of this CPU's instructions: AVX512_CORE stands for Xeons before
Cooper Lake, AVX2 for older CPUs, AMD before Zen 4, and most laptops.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS = {
    "all that this CPU has": {},
    "AVX-512 without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
DTYPES = ("float32", "bfloat16", "float16")


def save_model(folder: Path) -> None:
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gptailor.demo import PATH

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=130, hidden_size=512, intermediate_size=1408, num_hidden_layers=9,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PATH / "models" / "base" / name, folder / name)


def measure(folder: str, dtype: str, documents: int, rounds: int) -> None:
    """Prints the minimum processor seconds of an evaluation, its tokens, and the accuracy."""
    import time

    import torch

    from gptailor.config import EvaluationConfig, TaskSpec
    from gptailor.demo import PATH
    from gptailor.evaluation.evaluator import Evaluator
    from gptailor.models.family import Family
    from gptailor.recipe import Recipe, Take

    family = Family({"base": folder}, "base")
    config = EvaluationConfig(
        tasks=tuple(TaskSpec(task=f"demo_{name}") for name in ("translate", "sort", "clock")),
        include_path=str(PATH / "tasks"),
        rungs=(documents,),
        dtype=dtype,
        device="cpu",
    )
    evaluator = Evaluator(family, config)
    layers = tuple(Take("base", layer) for layer in range(family.num_layers))
    recipe = Recipe(family.refs, "base", layers, "base", "base", "bfloat16")
    torch.set_num_threads(1)
    seconds = []
    for _ in range(rounds + 1):  # the first one tokenizes
        began = time.process_time()
        outcome = evaluator.evaluate(recipe)
        seconds.append(time.process_time() - began)
        assert outcome.status == "ok", outcome.reason
    print(json.dumps([min(seconds), outcome.cost.num_tokens, outcome.accuracy]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, dtype = arguments.measure
        measure(folder, dtype, arguments.documents, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        numbers = ["--documents", str(arguments.documents), "--rounds", str(arguments.rounds)]
        print(f"| | {' | '.join(DTYPES)} | bfloat16 / float32 | float16 / float32 |")
        print("|---|--:|--:|--:|--:|--:|")
        for name, environment in ROWS.items():
            seconds = []
            for dtype in DTYPES:
                done = subprocess.run(
                    [sys.executable, __file__, *numbers, "--measure", folder, dtype],
                    env={**os.environ, **environment}, check=True, capture_output=True, text=True,
                )  # fmt: skip
                found = json.loads(done.stdout.splitlines()[-1])
                seconds.append(found[0])
            cells = " | ".join(f"{s:.2f}" for s in seconds)
            ratios = " | ".join(f"{s / seconds[0]:.2f}" for s in seconds[1:])
            print(f"| {name} | {cells} | {ratios} |", flush=True)
        print(f"\n{found[1]} tokens in each evaluation")


if __name__ == "__main__":
    main()
