"""Compares mergekit and gptailor on random configurations: do they agree to one rounding?

    python tools/mergekit_random.py [NUMBER [SEED]]

Needs both installed, and runs in the root of the repository. Settings are drawn at every level, as
numbers, gradients and filters, in the `models:` and `slices:` forms. A configuration that both
refuse counts as agreement, and so do differences below a float32 rounding of the tensor's largest
element. Configurations on which they differ are printed, and make the exit code 1.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gptailor import verbs
from gptailor.errors import GptailorError
from gptailor.mergekit.config import MERGEKIT_METHODS, mergekit_parameters
from gptailor.merging.registry import METHODS
from tests.mergekit.family import NUM_LAYERS, save_family

FILTERS = ("self_attn", "mlp", "q_proj", "norm", "embed", "lm_head", "layers.1", "layers.3", "*")
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
RANGES = {
    "weight": (0.1, 1.5), "density": (0.3, 1), "gamma": (0.13, 0.25), "lambda": (0.3, 1.5),
    "t": (0, 1), "scale": (0.5, 2), "epsilon": (0.01, 0.1), "select_topk": (0.3, 1),
    "eps": (1e-9, 1e-7), "tol": (1e-7, 1e-5),
}  # fmt: skip


class Drawer:
    """Draws configurations from one random generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def config(self) -> dict[str, Any]:
        """A configuration; most are valid."""
        one = self.random
        method = one.choice([m for m in MERGEKIT_METHODS if m not in RANDOM])
        prefix = one.choice(["", "untied/"])
        data: dict[str, Any] = {"merge_method": method}
        needs_base = method != "passthrough" and (
            METHODS[method].uses_base or METHODS[method].starts_at_base
        )
        has_base = needs_base or one.random() < 0.4
        if has_base:
            data["base_model"] = f"{prefix}base"
        names = self._models(method, has_base)
        if method == "passthrough" or one.random() < 0.5:
            data["slices"] = [self._slice(method, names, prefix) for _ in range(one.randint(1, 3))]
        else:
            data["models"] = [self._source(method, prefix + name) for name in names]
        if one.random() < 0.8 or "models" in data:
            data["parameters"] = self._parameters(method, of_all=True, share=0.9)
        return data | {"dtype": "float32", "out_dtype": "bfloat16"}

    def _models(self, method: str, has_base: bool) -> list[str]:
        one = self.random
        if method == "passthrough":
            return ["red", "green", "base"]
        names = ["red", "green"]
        if METHODS[method].max_sources == 1 or (METHODS[method].starts_at_base and has_base):
            names = [one.choice(names)]
        if one.random() < 0.5 or METHODS[method].max_sources > 2:
            names.append("base")
        one.shuffle(names)
        return names

    def _slice(self, method: str, names: list[str], prefix: str) -> dict[str, Any]:
        one = self.random
        first = one.randrange(NUM_LAYERS)
        layers = [first, one.randint(first + 1, NUM_LAYERS)]
        if method == "passthrough":
            names = [one.choice(names)]
        sources = [self._source(method, prefix + name) | {"layer_range": layers} for name in names]
        part: dict[str, Any] = {"sources": one.sample(sources, len(sources))}
        if one.random() < 0.4:
            part["parameters"] = self._parameters(method, of_all=True, share=0.5)
        return part

    def _source(self, method: str, model: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"model": model}
        parameters = self._parameters(method, of_all=False, share=0.6)
        return entry | {"parameters": parameters} if parameters else entry

    def _parameters(self, method: str, *, of_all: bool, share: float) -> dict[str, Any]:
        whole, each = mergekit_parameters(method)
        names = (*whole, *each) if of_all else each
        return {name: self._setting(name) for name in names if self.random.random() < share}

    def _setting(self, name: str) -> Any:
        kind = self.random.random()
        if kind < 0.6:
            return self._values(name)
        if kind < 0.65:
            return {"filter": self.random.choice(FILTERS), "value": self._values(name)}
        cases = [
            {"filter": self.random.choice(FILTERS), "value": self._values(name)}
            for _ in range(self.random.randint(1, 2))
        ]
        return [*cases, {"value": self._values(name)}] if kind < 0.9 else cases

    def _values(self, name: str) -> Any:
        if name == "max_iter":
            return self.random.randint(1, 12)
        if name not in RANGES:
            flags = [self.random.random() < 0.5 for _ in range(3)]
            return flags[0] if self.random.random() < 0.8 else flags
        low, high = RANGES[name]
        numbers = [round(self.random.uniform(low, high), 12) for _ in range(4)]
        return numbers[0] if self.random.random() < 0.6 else numbers[: self.random.randint(1, 4)]


def steps_apart(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """How many steps between bfloat16 numbers the two are apart."""
    numbers = [tensor.view(torch.int16).to(torch.int64) for tensor in (ours, theirs)]
    ordered = [torch.where(n < 0, -32768 - n, n) for n in numbers]
    return (ordered[0] - ordered[1]).abs()


def compare(data: dict[str, Any], folder: Path) -> tuple[str, str]:
    """The outcome in a word or two, and what to print about it."""
    text = yaml.safe_dump(data, sort_keys=False)
    (folder / "merge.yml").write_text(text)
    theirs = ours = ""
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    try:
        run_merge(MergeConfiguration.model_validate(data), str(folder / "theirs"), options)
    except Exception as error:  # mergekit refuses with all kinds of exceptions
        theirs = f"{type(error).__name__}: {error}"
    try:
        verbs.stitch(folder / "merge.yml", folder / "ours", verify=False, sync=False)
    except GptailorError as error:
        ours = str(error)
    if ours and theirs:
        return "both refuse", ""
    if ours or theirs:
        return f"only {'gptailor' if ours else 'mergekit'} refuses", f"{ours or theirs}\n{text}"
    made = [load_file(folder / name / "model.safetensors") for name in ("ours", "theirs")]
    if made[0].keys() != made[1].keys():
        return "DIFFERENT", f"other tensors\n{text}"
    steps = {key: steps_apart(*(tensors[key] for tensors in made)) for key in made[0]}
    for key, step in steps.items():
        ours_f32, theirs_f32 = (tensors[key].float() for tensors in made)
        # where terms almost cancel, both results are float32 rounding errors
        noise = (ours_f32 - theirs_f32).abs() < 2**-22 * theirs_f32.abs().max()
        step[noise] = step[noise].clamp(max=1)
    worst = max(steps, key=lambda key: int(steps[key].max()))
    if int(steps[worst].max()) > 1:
        return "DIFFERENT", f"{worst}: {int(steps[worst].max())} roundings apart\n{text}"
    same = all(int(s.max()) == 0 for s in steps.values())
    return "equal" if same else "one rounding apart", ""


def main(number: int, seed: int) -> int:
    """Compares the two programs; returns the exit code."""
    logging.disable(logging.WARNING)
    os.environ["HF_HUB_OFFLINE"] = "1"
    drawer = Drawer(seed)
    outcomes: Counter[str] = Counter()
    shown: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as family:
        save_family(Path(family))
        os.chdir(family)
        for i in range(number):
            folder = Path(family) / f"run{i}"
            folder.mkdir()
            data = drawer.config()
            outcome, message = compare(data, folder)
            outcomes[f"{data['merge_method']:18} {outcome}"] += 1
            if message:
                first = message.splitlines()[0]
                shown[f"{outcome}: {data['merge_method']}: {first}"] += 1
                if outcome == "DIFFERENT":
                    print(f"== {i}: {outcome}: {message}")
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6}  {outcome}")
    for message, count in shown.most_common(40):
        print(f"{count:6}  {message[:200]}")
    return int(any("DIFFERENT" in outcome for outcome in outcomes))


if __name__ == "__main__":
    words = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*(words + [300, 0][len(words) :])))
