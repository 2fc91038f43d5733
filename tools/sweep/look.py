"""Looks at a model: logits, log-likelihoods by lm-eval, generated tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

TOLERANCE = {"float32": 2e-4, "bfloat16": 0.02, "float16": 0.01}
"""Tolerances of logits, relative to the largest one."""
NUM_NEW = 6
"""How many tokens are generated, to check the key-value cache."""


def load(folder: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    """A folder's model as stock transformers loads it, and its report on loading."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True
    )
    return model.eval().requires_grad_(False), info


@torch.inference_mode()
def look(model: Any, tokens: torch.Tensor, lm: Any) -> dict[str, Any]:
    """Logits, generated tokens and, with a language model, log-likelihoods of requests."""
    found: dict[str, Any] = {"logits": model(input_ids=tokens, use_cache=False).logits.float()}
    try:
        found["generated"] = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NUM_NEW,
            min_new_tokens=NUM_NEW,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )[:, tokens.shape[1] :].tolist()
    except Exception as error:
        found["generated"] = f"{type(error).__name__}: {error}"[:120]
    if lm is not None:
        found["sums"] = loglikelihoods(lm)
    return found


def language_model(model: Any, folder: str, stock: bool = False) -> Any:
    """lm-eval's view of a model: gptailor's, or the stock one."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from gptailor.evaluation.lm import ResidentLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if stock:
        return HFLM(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=1, max_length=64
        )
    return ResidentLM(model, tokenizer, 4)


_REQUESTS = [
    (None, [7, 20, 31, 8, 50, 61, 12, 9], [33]),
    (None, [7, 20, 31], [8, 50, 61]),
    (None, [70, 9, 4, 99, 23, 45, 67, 89, 101, 11, 15, 60], [5, 6]),
]


def loglikelihoods(lm: Any) -> list[tuple[float, bool]]:
    """The log-likelihoods of a few requests of different lengths."""
    return list(lm._loglikelihood_tokens(list(_REQUESTS), disable_tqdm=True))


def differences(
    what: str, one: Mapping[str, Any], other: Mapping[str, Any], dtype: str
) -> list[str]:
    """The differences between two results of `look`."""
    faults = []
    worst = distance(one["logits"], other["logits"])
    if not worst <= TOLERANCE[dtype]:
        faults.append(f"{what}: logits differ by {worst:.1e}")
    if one["generated"] != other["generated"]:
        faults.append(f"{what}: generated {one['generated']} and {other['generated']}")
    sums = [[value for value, _ in x.get("sums", ())] for x in (one, other)]
    if all(sums):
        off = max(abs(a - b) for a, b in zip(*sums, strict=True))
        if not off <= 5 * TOLERANCE[dtype] * max(1.0, *map(abs, sums[1])):
            faults.append(f"{what}: log-likelihoods differ by {off:.2e}")
    return faults


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))


class Contexts:
    """Replaces the search's documents where only their tokens are needed."""

    tokens = ((7, 20, 31, 8, 50, 61, 12), (70, 9, 4, 99, 23, 45, 67))

    def contexts(self, lm: Any, number: int) -> list[list[int]]:
        """The tokens of each context."""
        del lm, number
        return [list(tokens) for tokens in self.tokens]
