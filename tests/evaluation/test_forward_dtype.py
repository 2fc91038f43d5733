"""The type of the forward pass: which types a processor is slow at, and which one is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptailor import verbs
from gptailor.errors import UsageError
from gptailor.evaluation import forward_dtype
from gptailor.evaluation.forward_dtype import Ability, choose, cpu_flags, find_ability, slow_dtypes
from gptailor.recipe import Merge, Recipe, Take

GB = 10**9
ZEN3 = frozenset({"sse2", "avx2", "fma"})
SKYLAKE = ZEN3 | {"avx512f", "avx512bw"}
ZEN4 = SKYLAKE | {"avx512_bf16"}
SAPPHIRE = ZEN4 | {"amx_bf16", "amx_tile"}
GRAVITON2 = frozenset({"fp", "asimd", "asimdhp"})
GRAVITON3 = GRAVITON2 | {"bf16", "svebf16"}


@pytest.mark.parametrize(
    ("flags", "isa", "slow"),
    [
        (ZEN3, None, True),
        (SKYLAKE, None, True),
        (ZEN4, None, False),
        (SAPPHIRE, None, False),
        (GRAVITON2, None, True),
        (GRAVITON3, None, False),
        (frozenset(), None, True),
        # instructions that torch's matrix library is told not to use do not count
        (ZEN4, "AVX512_CORE", True),
        (ZEN4, "avx2", True),
        (SAPPHIRE, "AVX512_CORE_BF16", False),
        (SAPPHIRE, "AVX512_CORE_AMX", False),
        (SAPPHIRE, "ALL", False),
        (SKYLAKE, "ALL", True),
    ],
)
def test_what_a_processor_is_slow_at(
    flags: frozenset[str], isa: str | None, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_dtype, "cpu_flags", lambda: flags)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    if isa is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert slow_dtypes() == (("bfloat16", "float16") if slow else ("float16",))
    ability = find_ability("cpu")
    assert (ability.device, ability.slow) == ("cpu", slow_dtypes())
    assert ability.free_bytes > 0
    assert find_ability("cuda").slow == ()


def test_cpu_flags_are_those_that_torch_sees() -> None:
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("torch before 2.10")
    seen = torch.cpu.get_capabilities()
    names = {"avx512_bf16": "avx512_bf16", "amx_bf16": "amx_bf16", "avx2": "avx2", "bf16": "bf16"}
    for flag, theirs in names.items():
        assert (flag in cpu_flags()) == bool(seen.get(theirs, False)), flag


def cpu(node: str = "n1", *, fast: bool = False, free: int = 100 * GB) -> Ability:
    return Ability(node, "cpu", ("float16",) if fast else ("bfloat16", "float16"), free)


GPU = Ability("g1", "cuda", (), GB)
FAST = cpu("n2", fast=True)


@pytest.mark.parametrize(
    ("wanted", "recipes", "abilities", "kept", "dtype", "words"),
    [
        ("auto", "bfloat16", [FAST], None, "bfloat16", "bfloat16, the recipes' type."),
        ("auto", "bfloat16", [GPU, GPU], None, "bfloat16", "bfloat16, the recipes' type."),
        ("auto", "float32", [cpu()], None, "float32", "float32, the recipes' type."),
        ("auto", "bfloat16", [cpu()], None, "float32", "as the CPU of n1 has no instructions for"),
        # one type for all workers: one that the slowest of them computes well
        ("auto", "bfloat16", [FAST, cpu()], None, "float32", "as the CPU of n1 has no"),
        ("auto", "bfloat16", [GPU, cpu()], None, "float32", "as the CPU of n1 has no"),
        ("auto", "float16", [FAST], None, "float32", "slow at float16, as every CPU is"),
        ("auto", "float16", [GPU], None, "float16", "the recipes' type"),
        # the type that the run started with
        ("auto", "bfloat16", [FAST], "float32", "float32", "float32, as when the run started."),
        (
            "auto",
            "bfloat16",
            [cpu()],
            "bfloat16",
            "bfloat16",
            "as when the run started; the CPU of n1",
        ),
        # the type that the configuration asks for
        ("bfloat16", "bfloat16", [FAST], None, "bfloat16", "as set by evaluation.dtype."),
        (
            "bfloat16",
            "bfloat16",
            [cpu()],
            None,
            "bfloat16",
            "float32, which evaluation.dtype: auto",
        ),
        ("bfloat16", "float32", [cpu()], None, "bfloat16", "float32, which evaluation.dtype: auto"),
        ("bfloat16", "bfloat16", [cpu(free=GB)], None, "bfloat16", "as long as in float32."),
        ("float16", "bfloat16", [FAST], None, "float16", "several times as long as in float32."),
        ("float32", "bfloat16", [cpu()], "bfloat16", "float32", "as set by evaluation.dtype."),
        # four workers of 20 GB each do not fit on a node with 100 GB
        ("auto", "bfloat16", [cpu()] * 3, None, "float32", "n1 has no instructions"),
        ("auto", "bfloat16", [cpu()] * 4, None, "bfloat16", "needs 20.0 GB for each worker, which"),
        ("auto", "bfloat16", [cpu(), cpu("n3", free=20 * GB)], None, "bfloat16", "which n3 does"),
    ],
)
def test_the_choice(
    wanted: str, recipes: str, abilities: list[Ability], kept: str | None, dtype: str, words: str
) -> None:
    sizes = {"float32": 20 * GB, "bfloat16": 10 * GB}
    choice = choose(wanted, recipes, abilities, sizes.__getitem__, kept)
    assert choice.dtype == dtype
    assert words in choice.sentence
    assert choice.is_slow == any(dtype in ability.slow for ability in abilities)
    assert choice.is_slow == ("as long as in float32" in choice.sentence)


def test_many_nodes_are_summarised_in_one_sentence() -> None:
    abilities = [cpu(f"n{number}") for number in range(40) for _ in range(2)]
    choice = choose("bfloat16", "bfloat16", abilities, lambda dtype: 0)
    assert "the CPU of n0, n1, n2 and 37 more has no instructions" in choice.sentence


def test_eval_scores_a_recipe_as_its_folder_in_the_chosen_type(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are rounded to the recipe's type, even where the model computes in float32."""
    weights = (("blue", 0.5), ("red", 0.3))
    merge = Merge("task_arithmetic", 2, weights, (("lambda", 1.0), ("normalize", 0.0)))
    layers = (Take("red", 0), merge, Take("green", 4, scale=0.9), Take("base", 5))
    recipe = Recipe(models, "base", layers, "base", "base", "bfloat16")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    verbs.stitch(tmp_path / "recipe.yaml", tmp_path / "model", verify=False)
    tasks = ["t_shared", "t_long", "t_lambada"]

    def scored(source: Path, dtype: str | None = None) -> tuple[list[float], str]:
        said: list[str] = []
        found = verbs.evaluate(
            source,
            tasks,
            include_path=str(tasks_dir),
            device="cpu",
            dtype=dtype,
            note=said.append,
        )
        (sentence,) = [text for text in said if "computed in" in text]
        return [score.value for score in found], sentence

    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(forward_dtype, "cpu_flags", lambda: SKYLAKE)
    precise, said = scored(tmp_path / "recipe.yaml")
    assert "computed in float32, as the CPU of" in said
    monkeypatch.setattr(forward_dtype, "cpu_flags", lambda: ZEN4)
    values, said = scored(tmp_path / "model", dtype="float32")
    assert said == "Evaluations are computed in float32, as set by evaluation.dtype."
    assert values == precise
    rounded, said = scored(tmp_path / "model")
    assert said == "Evaluations are computed in bfloat16, the model's type."
    assert scored(tmp_path / "recipe.yaml") == (rounded, said.replace("model", "recipe"))
    assert rounded != precise  # perplexities show every rounding
    with pytest.raises(UsageError, match="did you mean 'bfloat16'"):
        scored(tmp_path / "model", dtype="bfloat61")
