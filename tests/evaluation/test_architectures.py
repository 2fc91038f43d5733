"""Architectures whose layers are easy to cut wrongly: what `tools.sweep` finds for a few of them.

Each family is a tiny random model of a real architecture. The folder written for a recipe, the
model in memory and a cut by hand must agree (`right`), or an error says why the recipe can't be
built (`refused`; `refused by search` where only a folder can be written). Trying all architectures
takes minutes; the slow test does that.
"""

from __future__ import annotations

from typing import Any

import pytest

RIGHT, REFUSED, FOLDER = "right", "refused", "refused by search"

FAMILIES: dict[str, dict[str, str]] = {
    # constants that follow from a layer's index
    "gpt2:inverse": {"mixed": RIGHT},
    # a count of leading dense layers
    "lfm2_moe": {"no first": FOLDER, "swapped": REFUSED},
    # a repeated pattern; one written as letters; a period; a cut that leaves no attention
    "recurrent_gemma:three": {"no first": RIGHT, "no third": REFUSED},
    "nemotron_h:hub": {"no first": FOLDER, "odd": REFUSED},
    "jamba": {"no last": FOLDER, "no first": REFUSED},
    # a base whose config is older than the finetune's
    "gemma2:old base": {"swapped": RIGHT},
    # a table indexed by layer, embeddings for each layer
    "gemma4_text:no per-layer": {"odd": RIGHT},
    # layers that share weights
    "zamba2": {"third other": REFUSED},
    # a model that writes into its own weights; one that replaces its modules
    "rwkv": {"no last": FOLDER, "no first": REFUSED},
    "big_bird:sparse": {"no third": FOLDER},
    # a model whose embedding of the padding token is set to zero on load
    "youtu": {"all": FOLDER},
    # layers that return lists, and norms after the residual addition
    "openai-gpt": {"arms": RIGHT, "scaled": REFUSED},
    # a tied head whose bias is also tied
    "bert": {"mixed": RIGHT},
    # float32 beside bfloat16
    "llama:wide norms, float32": {"merged": RIGHT},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_are_easy_to_cut_wrongly(name: str) -> None:
    from tools.sweep.cases import all_cases
    from tools.sweep.isolate import sweep_case

    case = next(case for case in all_cases() if case.name == name)
    rows = {row.recipe: row for row in sweep_case(case, list(FAMILIES[name]))}
    verdicts = {recipe: row.verdict for recipe, row in rows.items()}
    assert verdicts == FAMILIES[name], rows


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_architecture_is_silently_wrong(capfd: Any) -> None:
    from tools.sweep.__main__ import main

    code = main([])
    assert code == 0, capfd.readouterr().out
