"""Each dense control arm is the model that it names, whatever a finetune has changed.

They are compared with stock transformers, `gptailor eval` and lm_eval on the same documents.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from gptailor import verbs
from gptailor.config import Space
from gptailor.evaluation.family import open_family
from gptailor.evaluation.resident import ResidentModel
from gptailor.models.family import Family
from gptailor.recipe import NO_LAYER, Merge, Recipe, Take
from gptailor.run.archive import Archive
from gptailor.search.arms import control_arms
from gptailor.search.space import SearchSpace
from gptailor.stitching.write import write_model
from tests.conftest import WORDS, save_llama
from tests.evaluation.test_equals_lm_eval import lm_eval_results
from tests.models.real import SMALL, SMALL_GPT2, loaded, logits_of, save_real
from tests.search.simulated import similarity

TASKS = ("t_shared", "t_long", "t_differing")
NUM_TOKENS = len(WORDS) + 4


def resized(folder: Path, rows: int) -> Path:
    """The model with another number of padding rows, which no token uses but logits include."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    torch.manual_seed(rows)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["tied", "untied", "uneven"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Full finetunes, in which every tensor has changed."""
    root = tmp_path_factory.mktemp(request.param)
    tied = request.param == "tied"
    base = save_llama(root / "base", 0, tied=tied)
    red = save_llama(root / "red", 1, like=base, tied=tied)
    green = save_llama(root / "green", 2, like=base, tied=tied)
    if request.param == "uneven":
        resized(red, NUM_TOKENS)
        resized(green, 120)
    return {"base": str(base), "red": str(red), "green": str(green)}


def arms_of(family: Family) -> dict[str, Recipe]:
    space = SearchSpace(Space(), family.refs, "base", family.num_layers, ends=family.ends)
    measured = {name: similarity(family.num_layers, 0.0) for name in space.names}
    return dict(control_arms(space, ("uniform", "paper", "random"), (0.5,), measured, seed=0))


@pytest.mark.parametrize("kept", [None, 1 << 40])
def test_dense_arms_have_the_logits_of_their_models(
    models: dict[str, str], kept: int | None
) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    family = Family(models, "base")
    resident = ResidentModel(family, device="cpu", dtype="float32", candidate_bytes=kept)
    ids = torch.arange(4, 30)[None]
    arms = arms_of(family)
    with torch.inference_mode():
        for model in ("red", "base", "green", "red"):  # earlier models leave no trace
            expected = AutoModelForCausalLM.from_pretrained(models[model], dtype=torch.float32)
            found = resident.assemble(arms[f"dense:{model}"])
            assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)
            assert isinstance(found.config, PreTrainedConfig)
            assert found.config.vocab_size == expected.config.vocab_size


def test_merges_in_memory_equal_the_written_folder(models: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family = Family(models, "base")
    arms = arms_of(family)
    layers = (Take("red", 1), Take("green", 3))
    merge = Merge("task_arithmetic", NO_LAYER, (("red", 0.5), ("green", 0.5)))
    arms["mixed"] = Recipe(models, "base", layers, merge, "green")
    arms["crossed"] = Recipe(models, "base", layers, "green", "red")
    ids = torch.arange(4, 30)[None]
    for kept in (None, 1 << 40):
        resident = ResidentModel(family, device="cpu", dtype="float32", candidate_bytes=kept)
        for arm in ("uniform:0.5", "mixed", "paper:0.5", "crossed"):
            out = tmp_path / f"{arm}-{kept}"
            write_model(arms[arm], family, out, sync=False)
            stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            with torch.inference_mode():
                found = resident.assemble(arms[arm])(input_ids=ids).logits
                assert torch.equal(found, stock(input_ids=ids).logits), arm


@pytest.mark.parametrize(
    ("kind", "small"),
    [
        ("gpt2", {**SMALL_GPT2, "vocab_size": 140}),  # a table of positions, tied
        ("phi", {**SMALL, "vocab_size": 140}),  # the head and its bias have a row for each token
    ],
)
def test_other_architectures(kind: str, small: dict[str, int], tmp_path: Path) -> None:
    models = {}
    for seed, name in enumerate(("base", "red", "green")):
        models[name] = str(save_real(tmp_path / name, kind, seed=seed, small=small))
    resized(tmp_path / "red", 131)
    resized(tmp_path / "green", 160)
    family = open_family(models, "base")
    resident = ResidentModel(family, device="cpu", dtype="float32")
    for name in models:
        layers = tuple(Take(name, i) for i in range(4))
        recipe = Recipe(models, "base", layers, name, name, "float32")
        found = logits_of(resident.assemble(recipe))
        assert torch.equal(found, logits_of(loaded(tmp_path / name))), name
    merge = Merge("task_arithmetic", NO_LAYER, (("green", 0.5),))
    crossed = Recipe(models, "base", (Take("red", 1), Take("base", 2)), "green", merge, "float32")
    write_model(crossed, family, tmp_path / "out", sync=False)
    found = logits_of(resident.assemble(crossed))
    assert torch.equal(found, logits_of(loaded(tmp_path / "out")))


@pytest.mark.parametrize("models", ["tied", "uneven"], indirect=True)
def test_a_search_scores_dense_arms_as_eval_and_lm_eval_do(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    config = tmp_path / "search.yaml"
    data = {
        "models": models,
        "base": "base",
        "evaluation": {
            "tasks": list(TASKS), "include_path": str(tasks_dir),
            "dtype": "float32", "device": "cpu",
        },
        "search": {"evaluations": 3, "population": 4, "arms": ["dense"]},
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    config.write_text(yaml.safe_dump(data))
    with Archive(verbs.search(config), readonly=True) as archive:
        found = {arm: e for e in archive.evaluations("search") for arm in e.arms}
    evaluation = found["dense:red"]
    scores = {score.task: score.value for score in evaluation.outcome.scores}
    mine = verbs.evaluate(
        models["red"], TASKS, include_path=str(tasks_dir), dtype="float32", metric="acc"
    )
    theirs = lm_eval_results(Path(models["red"]), tasks_dir, TASKS, "float32", 4)["results"]
    assert scores == {score.task: score.value for score in mine}
    assert scores == {t: pytest.approx(theirs[t]["acc,none"]) for t in TASKS}
    for name, candidate in Family(models, "base").candidates.items():
        whole = sum(t.n_elements for t in candidate.tensors.values())
        assert found[f"dense:{name}"].parameters == whole
