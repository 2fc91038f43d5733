"""docs/cluster.md is correct: its figures follow from each other, its shapes are a real model's."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cluster.md"


def test_the_arithmetic_is_right() -> None:
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, verbose=False)
    assert tried > 30
    assert failed == 0


def test_the_parameter_count_is_the_models() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    assert f"'{count:,}'" in PAGE.read_text()


def test_figures_in_the_text_match_the_code_blocks() -> None:
    text = PAGE.read_text()
    prose = re.sub(r"^```python\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks = "".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert "each node reads 564 GB once" in prose and "564.4 GB for four" in blocks
    assert "two workers, 128 in all" in prose and "\n128\n" in blocks
    assert "loading from storage of 100 GB/s takes 6 of 16 minutes" in prose
    assert "100 GB/s:   6.0 min" in blocks and "500 of them in 10 minutes" in blocks
    assert f"is {4 * 2 * 855_654_400 / 1e9:.1f} GB" in prose
