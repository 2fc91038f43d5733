"""The figures of `gptailor plan` are those of a real search."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from gptailor import cli, verbs
from gptailor.config import parse_config
from gptailor.errors import ModelError, ResourceError, UsageError
from gptailor.evaluation.device_memory import DeviceMemory
from gptailor.evaluation.evaluator import Evaluator
from gptailor.evaluation.footprint import Blocks, find_footprint
from gptailor.evaluation.memory_policy import MemoryPlan, check_dense, plan_memory
from gptailor.models.ends import Ends
from gptailor.models.family import Family
from gptailor.recipe import Merge
from gptailor.search.probe import probe_recipes
from gptailor.search.space import LEVELS, METHOD, SOURCE
from tests.search.helpers import make_space

GIB = 1 << 30
LLAMA_70B = Blocks(
    num_candidates=4,
    base=141_107_412_992,
    layers=(1_711_308_800,) * 80,
    outside=4_202_708_992,
    read_layers=(4 * 1_711_308_800,) * 80,
    read_outside=4 * 4_202_708_992,
)


def plan_gpus(gpu_bytes: int, num_gpus: int) -> MemoryPlan:
    gpu = DeviceMemory(gpu_bytes, gpu_bytes)
    found = plan_memory(LLAMA_70B, "cuda", [gpu] * num_gpus, DeviceMemory(GIB, GIB))
    check_dense(LLAMA_70B, found, "cuda")
    return found


def config_file(folder: Path, models: dict[str, str], tasks: Path, **evaluation: object) -> Path:
    data = {
        "models": models,
        "base": "base",
        "space": {"layers": {"min": 3}},
        "evaluation": {
            "tasks": ["t_shared", "t_long"],
            "holdout": {"tasks": ["t_differing"]},
            "include_path": str(tasks),
            "device": "cpu",
            **evaluation,
        },
        "search": {"evaluations": 40},
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_figures_are_those_of_real_evaluations(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    config = config_file(tmp_path, models, tasks_dir, dtype="bfloat16")  # the type of the files
    plan = verbs.plan(config, workers=3)
    family = Family(models, "base")
    assert [p.name for p in plan.probes] == ["dense", "half merged", "smallest"]
    assert [p.layers for p in plan.probes] == [6, 6, 3]
    assert {p.tokens for p in plan.probes} == {plan.sizes["search"].tokens}
    assert plan.sizes["search"].documents == 48
    assert plan.sizes["holdout"].documents == 24
    assert plan.node_bytes == sum(
        path.stat().st_size for folder in models.values() for path in Path(folder).glob("*.safe*")
    )
    assert plan.footprint.model == sum(t.n_bytes for t in family.base.tensors.values())
    assert plan.footprint.resident == 4 * plan.footprint.model
    assert plan.evaluation_s == pytest.approx(sum(p.seconds for p in plan.probes) / 3)
    assert plan.evaluation_s is not None and plan.evaluations_per_hour is not None
    assert plan.evaluations_per_hour == pytest.approx(3 * 3600 / plan.evaluation_s)
    assert plan.hours == pytest.approx(40 / plan.evaluations_per_hour)


def test_probes_that_would_not_fit_are_refused(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptailor.evaluation.device_memory.available_bytes", lambda: 100_000)
    path = config_file(tmp_path, models, tasks_dir)
    with pytest.raises(ResourceError, match="skip the probes with --no-probe"):
        verbs.plan(path)
    assert not verbs.plan(path, probe=False).probes


@pytest.mark.parametrize("kind", ["t_rolling", "t_generate", "t_lambada"])
def test_tokens_of_every_kind_of_request(
    kind: str, models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    from gptailor.evaluation.dry_run import DryRun

    task = {"task": kind, **({"metric": "acc"} if kind == "t_lambada" else {})}
    evaluation = {"tasks": [task], "include_path": str(tasks_dir), "device": "cpu"}
    config = parse_config({"models": models, "base": "base", "evaluation": evaluation}, "test")
    family = Family(models, "base")
    if kind == "t_rolling":  # lower is better, so a search refuses it
        with pytest.raises(ValueError, match="better when it is lower"):
            DryRun(config, family)
        return
    (size,) = DryRun(config, family).sizes().values()
    evaluator = Evaluator(family, config.evaluation)
    recipe = probe_recipes(make_space(6, 3, models=models))["dense"]
    assert evaluator.evaluate(recipe).status == "ok"
    seen = evaluator.lm.num_tokens
    assert size.digest == evaluator.workloads["search"].digest
    if kind == "t_lambada":
        assert size.tokens == seen
    else:  # an estimate: text may end early, and prompts are padded
        assert 0.5 * seen <= size.tokens <= 2 * seen


# Repairs


@pytest.fixture
def repaired(models: dict[str, str], tasks_dir: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """The arguments of a plan with repairs."""
    path = config_file(tmp_path, models, tasks_dir, dtype="bfloat16", rungs=[12], holdout=None)
    return path, ["evaluation.tasks=[t_long]", f"output={tmp_path / 'run'}"]


def test_repairs_count_in_documents_memory_and_time(
    repaired: tuple[Path, list[str]], tmp_path: Path
) -> None:
    path, overrides = repaired
    plan, plain = (
        verbs.plan(path, [*overrides, f"space.repair={repair}"]) for repair in ("auto", "false")
    )
    assert plan.repair is not None
    assert plan.repair_room is not None
    assert (plain.repair, plain.repair_room) == (None, None)
    assert plan.sizes == plain.sizes
    assert plan.sizes["search"].documents == 12
    assert plan.repair.documents == 6
    assert plan.front_repair is not None
    assert plan.front_repair.documents == 12  # all that are left
    assert plan.front_repair.tokens > plan.repair.tokens + 3000
    assert plan.repair.width == 80
    assert not plan.repair_room.why_not
    dense, half, smallest = plan.probes
    assert [p.layers for p in plan.probes] == [6, 5, 3]
    assert [p.layers for p in plain.probes] == [6, 6, 3]
    assert dense.tokens == plan.sizes["search"].tokens < min(half.tokens, smallest.tokens)
    assert not (tmp_path / "run").exists()


def test_the_candidate_that_a_search_makes_counts_before_it_exists(
    repaired: tuple[Path, list[str]], models: dict[str, str], tmp_path: Path
) -> None:
    path, overrides = repaired
    before = verbs.plan(path, overrides, probe=False)
    assert before.footprint.candidates["refit"] == before.footprint.candidates["base"]
    assert set(before.footprint.candidates) == {*models, "refit"}
    without = verbs.plan(path, [*overrides, "space.repair={refit: false}"], probe=False)
    assert set(without.footprint.candidates) == set(models)
    assert without.repair == before.repair
    assert without.recipes_log10 < before.recipes_log10
    assert before.node_bytes / without.node_bytes == pytest.approx(1.25, rel=0.01)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "refit").symlink_to(models["red"])
    after = verbs.plan(path, overrides)
    assert after.footprint == before.footprint
    assert len(after.probes) == 3


def test_a_candidate_of_the_user_may_have_that_name(
    repaired: tuple[Path, list[str]], models: dict[str, str]
) -> None:
    path, overrides = repaired
    own = [*overrides, f"models.refit={models['red']}"]
    for more in (["space.repair={refit: false}"], ["space.repair=false"], ["evaluation.rungs=[]"]):
        plan = verbs.plan(path, [*own, *more], probe=False)
        assert set(plan.footprint.candidates) == {*models, "refit"}
    with pytest.raises(UsageError, match="the name refit is taken"):
        verbs.plan(path, own, probe=False)


def test_repairs_that_are_automatic_are_left_out_if_they_are_not_possible(
    repaired: tuple[Path, list[str]], models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, overrides = repaired
    all_scored = [*overrides, "evaluation.rungs=[24]"]
    notes: list[str] = []
    plan = verbs.plan(path, all_scored, note=notes.append)
    assert any(n.startswith("Nothing is repaired: ") and "t_long has no" in n for n in notes)
    assert plan.repair is None
    assert set(plan.footprint.candidates) == set(models)
    assert [p.layers for p in plan.probes] == [6, 6, 3]
    with pytest.raises(UsageError, match="t_long has no documents left"):
        verbs.plan(path, [*all_scored, "space.repair={layers: gaps}"])

    def refused(*_: object) -> None:
        raise ModelError("The layers depend on more than their input.")

    monkeypatch.setattr("gptailor.evaluation.repair.repairer.check_replay", refused)
    plan = verbs.plan(path, overrides, note=notes.append)
    assert "Nothing is repaired: The layers depend on more than their input." in notes
    assert plan.repair is None
    assert set(plan.footprint.candidates) == set(models)
    assert len(plan.probes) == 3
    with pytest.raises(ModelError, match="depend on more"):
        verbs.plan(path, [*overrides, "space.repair={layers: gaps}"])


def test_a_repair_that_does_not_fit_is_announced(
    repaired: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, overrides = repaired
    words = ["plan", str(path), *overrides, "--no-probe"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "repair      6 documents, " in said
    assert " for the front\n            teachers' states take " in said
    assert "in memory\n            each worker needs " in said
    assert cli.main([*words, "--gpu-gib", "0.001"]) == 0
    said = capsys.readouterr().out
    assert "a repair takes " in said
    assert "(space.repair.calibration.documents)" in said
    assert cli.main([*words, "--gpu-gib", "0.0001"]) == 0  # no evaluation fits, either
    said = capsys.readouterr().out
    assert "repair      6 documents, " in said
    assert "a repair takes " not in said
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repair"]["documents"] == 6


def test_output_for_people_and_for_scripts(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(config_file(tmp_path, models, tasks_dir, dtype="float32"))
    gpu = ["--gpu-gib", "0.0005", "--gpus-per-worker", "2"]
    assert cli.main(["plan", path, "--no-probe"]) == 0
    words = capsys.readouterr().out
    assert "computed in float32, as set by evaluation.dtype." in words
    assert " dense in float32, " in words and "copies of the candidates in float32" in words
    assert "time        not measured" in words
    assert cli.main(["plan", path, "--no-probe", *gpu]) == 0
    words = capsys.readouterr().out
    assert "the model is spread over 2 GPUs:" in words
    assert "GPU 0: layers 0 to 2, embeddings, final norm, head" in words
    assert "GPU 1: layers 3 to 5" in words
    assert cli.main(["plan", path, "--no-probe", "--json", *gpu]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [part["first_layer"] for part in found["gpus"]["parts"]] == [0, 3]
    assert cli.main(["plan", path, "--no-probe", "--gpu-gib", "0.0005"]) == 0
    assert "give each worker more GPUs" in capsys.readouterr().out


def test_the_effect_of_candidates_gib_is_explained(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for gib, words in (
        (1.0, "all candidates stay there"),
        (0.0003, "the most used layers stay there"),
        (0.0001, "raise evaluation.candidates_gib"),
    ):
        path = config_file(tmp_path, models, tasks_dir, dtype="bfloat16", candidates_gib=gib)
        assert cli.main(["plan", str(path), "--no-probe"]) == 0
        said = capsys.readouterr().out
        assert words in said
        assert ("evaluation.candidates_gib says, each reads candidates into" in said) == (
            gib > 0.0001
        )
        assert "mapped" not in said


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp", "karcher", "sce"])
@pytest.mark.parametrize("stand_ins", [("base", "base"), ("base", "green"), ("red", "green")])
def test_the_size_of_the_space_equals_a_count_of_recipes(
    method: str, stand_ins: tuple[str, str]
) -> None:
    models = {name: f"/m/{name}" for name in ("base", "red", "green")}
    of_each = dict(zip(models, ("base", *stand_ins), strict=True))
    ends = Ends(dict.fromkeys(models, "base"), of_each)
    space = make_space(4, 2, protect=(1,), methods=(method,), models=models, ends=ends)
    levels = range(len(space.weights) + 1)
    entries, heads = set(), set()
    for source, m, *row in itertools.product(range(3), range(2), levels, levels, levels):
        genome = space.blank()
        genome[:, SOURCE], genome[:, METHOD], genome[:, LEVELS:] = source, m, row
        recipe = space.decode(genome)
        entries.add(recipe.layers[0])
        heads.add(recipe.head)
    subsets = [s for n in range(2, 5) for s in itertools.combinations(range(4), n) if 1 in s]
    count = sum(len(entries) ** len(s) for s in subsets) * len(heads)
    assert space.log10_size() == pytest.approx(math.log10(count))


def test_probes_keep_protected_layers_and_merge_half() -> None:
    space = make_space(8, 3, protect=(2, 5))
    recipes = probe_recipes(space)
    assert recipes["dense"].num_layers == 8
    assert sum(isinstance(layer, Merge) for layer in recipes["half merged"].layers) == 4
    assert {2, 5} <= set(recipes["smallest"].src_layers)
    assert recipes["smallest"].num_layers == 3
    assert np.all(np.diff(recipes["smallest"].src_layers) > 0)


# GPUs


def test_one_gpu_is_enough_as_long_as_a_model_fits() -> None:
    plan = plan_gpus(192 * GIB, 4)
    assert [(d.first_layer, d.end_layer) for d in plan.devices] == [(0, 80)]
    assert not plan.all_stay
    assert plan_gpus(1000 * GIB, 1).all_stay


def test_a_70b_family_on_gpus_of_80_gib() -> None:
    with pytest.raises(ResourceError, match="give each worker more GPUs"):
        plan_gpus(80 * GIB, 2)
    four = plan_gpus(80 * GIB, 4)
    assert [(d.first_layer, d.end_layer) for d in four.devices] == [
        (0, 18), (18, 39), (39, 60), (60, 80),
    ]  # fmt: skip
    assert not four.all_stay
    eight = plan_gpus(192 * GIB, 8)
    assert len(eight.devices) == 1
    with pytest.raises(ResourceError, match="One merge reads"):
        plan_gpus(6 * GIB, 8)


def test_the_footprint_includes_casts_and_every_tensor(models: dict[str, str]) -> None:
    family = Family(models, "base")
    own = find_footprint(family, "bfloat16", recipes="bfloat16", batch_tokens=100, logits=10)
    cast = find_footprint(family, "float32", recipes="bfloat16", batch_tokens=100, logits=10)
    rounded = find_footprint(family, "bfloat16", recipes="float16", batch_tokens=100, logits=10)
    assert (own.is_cast, cast.is_cast, rounded.is_cast) == (False, True, True)
    assert own.model == own.candidates["base"]
    assert cast.model == 2 * own.model
    assert own.logits == 3 * 10 * 96 * 2
    assert own.activations == 100 * (6 * 32 + 3 * 80) * 2
