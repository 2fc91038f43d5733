"""Architectures whose layers are easily cut wrongly: what `tools.sweep` says of a few of them.

Each family is tiny, random and real. A recipe's folder, the model in memory and a cut by hand have
to agree (`right`), or a sentence says why it can't be had (`refused`; `refused by search` where
only a folder can be written). All architectures take minutes: see the slow test.
"""

from __future__ import annotations

from typing import Any

import pytest

RIGHT, REFUSED, FOLDER = "right", "refused", "refused by search"

FAMILIES: dict[str, dict[str, str]] = {
    # constants that follow from a layer's index
    "gpt2:inverse": {"mixed": RIGHT},
    # a count of dense layers at the beginning
    "lfm2_moe": {"no first": FOLDER, "swapped": REFUSED},
    # a pattern that is repeated; one as letters; a period; a cut that leaves no attention
    "recurrent_gemma:three": {"no first": RIGHT, "no third": REFUSED},
    "nemotron_h:hub": {"no first": FOLDER, "odd": REFUSED},
    "jamba": {"no last": FOLDER, "no first": REFUSED},
    # a base whose config is older than the finetune's
    "gemma2:old base": {"swapped": RIGHT},
    # a table by layer, embeddings for each layer
    "gemma4_text:no per-layer": {"odd": RIGHT},
    # layers that share weights
    "zamba2": {"third other": REFUSED},
    # a model that writes into its own weights; one that replaces its modules
    "rwkv": {"no last": FOLDER, "no first": REFUSED},
    "big_bird:sparse": {"no third": FOLDER},
    # a model whose row of the padding token is set to zero on load
    "youtu": {"all": FOLDER},
    # layers that return lists, and norms behind the residual stream
    "openai-gpt": {"arms": RIGHT, "scaled": REFUSED},
    # a tied head with a bias that is tied, too
    "bert": {"mixed": RIGHT},
    # float32 beside bfloat16
    "llama:wide norms, float32": {"merged": RIGHT},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_are_easily_cut_wrongly(name: str) -> None:
    from tools.sweep.cases import all_cases
    from tools.sweep.isolate import sweep_case

    case = next(case for case in all_cases() if case.name == name)
    rows = {row.recipe: row for row in sweep_case(case, list(FAMILIES[name]))}
    verdicts = {recipe: row.verdict for recipe, row in rows.items()}
    assert verdicts == FAMILIES[name], rows


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_architecture_is_wrong_in_silence(capfd: Any) -> None:
    from tools.sweep.__main__ import main

    code = main([])
    assert code == 0, capfd.readouterr().out
