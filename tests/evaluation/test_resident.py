"""The resident model refers to layers without copying them; earlier recipes leave no trace."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptailor.config import EvaluationConfig
from gptailor.errors import ModelError, ResourceError, UsageError
from gptailor.evaluation.devices import pick_device
from gptailor.evaluation.evaluator import Evaluator
from gptailor.evaluation.merger import Groups
from gptailor.evaluation.resident import ResidentModel
from gptailor.models.family import Family
from gptailor.recipe import NO_LAYER, Layer, Merge, Recipe, Take
from gptailor.stitching.plan import OutTensor
from gptailor.stitching.write import write_model
from tests.conftest import save_llama
from tests.evaluation.own_tasks import tasks_of

TA = (("lambda", 1.0), ("normalize", 0.0))
_T = (("t", 0.01),)


def recipe(models: dict[str, str], *layers: Layer, dtype: str = "bfloat16") -> Recipe:
    return Recipe(models, "base", layers, "base", "base", dtype)


def computed_by(resident: ResidentModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are merged from here on."""
    computed: list[str] = []
    real = resident._merger._compute

    def compute(tensor: OutTensor, loaded: Groups) -> torch.Tensor:
        computed.append(tensor.name)
        return real(tensor, loaded)

    monkeypatch.setattr(resident._merger, "_compute", compute)
    return computed


@pytest.fixture(scope="module")
def resident(models: dict[str, str]) -> ResidentModel:
    return ResidentModel(Family(models, "base"), device="cpu")


def test_a_taken_layer_is_the_mapped_file(resident: ResidentModel, models: dict[str, str]) -> None:
    chosen = recipe(models, Take("red", 0), Take("blue", 3), Take("base", 5))
    resident.assemble(chosen)
    resident.check_pointers(chosen)
    mapped = resident.family.candidates["blue"].checkpoint.tensor(
        "model.layers.3.mlp.up_proj.weight"
    )
    weight = resident.layers()[1].get_parameter("mlp.up_proj.weight")
    assert weight.data_ptr() == torch.utils.dlpack.from_dlpack(mapped).data_ptr()


def test_embeddings_and_head_stay_tied(resident: ResidentModel, models: dict[str, str]) -> None:
    resident.assemble(recipe(models, Take("red", 0)))
    embeddings = resident.model.get_input_embeddings().weight
    head = resident.model.get_output_embeddings().weight
    assert embeddings.data_ptr() == head.data_ptr()
    name = "model.embed_tokens.weight"
    mapped = resident.family.base.checkpoint.tensor(name)
    assert embeddings.data_ptr() == torch.utils.dlpack.from_dlpack(mapped).data_ptr()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_written_folder(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    save_llama(tmp_path / "base", 0, tied=tied)
    save_llama(tmp_path / "red", 1, like=tmp_path / "base", tied=tied)
    models = {name: str(tmp_path / name) for name in ("base", "red")}
    family = Family(models, "base")
    resident = ResidentModel(family, device="cpu")
    ids = torch.arange(4, 30)[None]
    weights = (("red", 0.7),)
    average = Merge("average", NO_LAYER, (("red", 1.0), ("base", 1.0)))
    parts = (("q_proj", Take("base", 2)), ("self_attn", Merge("nearswap", 2, weights, _T)))
    sparse = Merge("dare_ties", 3, weights, (("density", 0.5),))
    for number, chosen in enumerate(
        [
            recipe(models, *(Take("base", i) for i in range(6))),
            recipe(models, Take("red", 1), Merge("task_arithmetic", 4, weights, TA)),
            recipe(models, Take("red", 2), Take("base", 2), Take("red", 2)),  # a layer repeated
            Recipe(models, "base", (Take("red", 5), Take("base", 0)), "red", "red"),
            Recipe(models, "base", (Take("red", 2, modules=parts), sparse), average, "red"),
        ]
    ):
        with torch.inference_mode():
            mine = resident.assemble(chosen)(input_ids=ids).logits
            write_model(chosen, family, tmp_path / f"out{number}")
            folder = tmp_path / f"out{number}"
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(input_ids=ids)
        assert torch.equal(mine, theirs.logits), number
        assert resident.model.config.num_hidden_layers == chosen.num_layers


def test_a_merged_layer_is_computed_once(
    resident: ResidentModel, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = computed_by(resident, monkeypatch)
    layer = Merge("task_arithmetic", 1, (("red", 0.33), ("blue", 0.21)), TA)
    resident.assemble(recipe(models, layer, Take("red", 2)))
    assert len(computed) == 9
    resident.assemble(recipe(models, Take("blue", 0), layer))
    assert len(computed) == 9


def test_the_cache_tells_merged_layers_apart(
    resident: ResidentModel, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that differ in a module, a seed or one source's density are different ones."""
    computed = computed_by(resident, monkeypatch)
    merge = Merge("dare_ties", 1, (("blue", 0.41), ("red", 0.37)), (("density", 0.5),))
    values = dict(merge.parameters)
    averages = [
        Merge("linear", NO_LAYER, (("blue", weight), ("red", 1.0))) for weight in (1.0, 2.0)
    ]
    different = [
        recipe(models, merge),
        recipe(models, replace(merge, parameters=tuple((values | {"seed": 1.0}).items()))),
        recipe(models, replace(merge, parameters=(("density", (0.5, 0.6)),))),
        recipe(models, replace(merge, modules=(("mlp", Take("red", 1)),))),
        recipe(models, Take("red", 1, modules=(("mlp", merge),))),
        *(replace(recipe(models, Take("red", 0)), embeddings=end, _cache={}) for end in averages),
    ]
    counts, weights = [], []
    for chosen in (*different, *different):
        before = len(computed)
        weights.append(_digest(resident.assemble(chosen)))
        counts.append(len(computed) - before)
    assert counts == [9, 9, 9, 6, 3, 1, 1] + [0] * len(different)
    assert len(set(weights[: len(different)])) == len(different)
    assert weights[len(different) :] == weights[: len(different)]


def _digest(model: torch.nn.Module) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return digest.digest()


def test_the_cache_of_merged_layers_is_bounded(models: dict[str, str]) -> None:
    resident = ResidentModel(Family(models, "base"), device="cpu", cache_bytes=50_000)
    for i in range(12):
        weights = (("red", 0.1 + i / 20), ("blue", 0.5))
        resident.assemble(recipe(models, Merge("task_arithmetic", 1, weights, TA)))
    assert resident.pools[0].merged.n_bytes <= 50_000
    assert len(resident.pools[0].merged) >= 2


def test_nan_in_a_merged_tensor_is_infeasible_and_reported(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(models["red"], tmp_path / "red")
    path = tmp_path / "red" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    mine = models | {"red": str(tmp_path / "red")}
    config = EvaluationConfig(tasks=tasks_of("t_shared"), include_path=str(tasks_dir), device="cpu")
    evaluator = Evaluator(Family(mine, "base"), config)
    merge = Merge("task_arithmetic", 2, (("red", 0.5), ("blue", 0.5)), TA)
    merged = evaluator.evaluate(recipe(mine, Take("red", 0), merge))
    assert merged.status == "infeasible"
    assert merged.accuracy is None
    assert "mlp.up_proj.weight" in merged.reason
    taken = evaluator.evaluate(recipe(mine, Take("red", 2)))
    assert taken.status == "infeasible"
    assert "not numbers" in taken.reason
    assert evaluator.evaluate(recipe(mine, Take("red", 0))).status == "ok"


def test_a_model_that_transformers_does_not_know_is_refused(
    models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(models["base"], tmp_path / "odd")
    config = (tmp_path / "odd" / "config.json").read_text()
    (tmp_path / "odd" / "config.json").write_text(config.replace('"llama"', '"lama"'))
    with pytest.raises(ModelError, match="transformers can't load"):
        ResidentModel(Family({"odd": str(tmp_path / "odd")}, "odd"), device="cpu")


def test_a_device_that_is_not_there_is_refused() -> None:
    for device in ("cuda:99", "gpu"):
        with pytest.raises(UsageError, match=r"evaluation.device"):
            pick_device(device)


def test_running_out_of_memory_gives_no_score(
    models: dict[str, str], tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluationConfig(tasks=tasks_of("t_shared"), include_path=str(tasks_dir), device="cpu")
    evaluator = Evaluator(Family(models, "base"), config)
    errors = [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ]
    for error in errors:
        monkeypatch.setattr(evaluator.lm, "_answers", _raising(error))
        with pytest.raises(ResourceError, match="batch_size"):
            evaluator.evaluate(recipe(models, Take("red", 0)))
    monkeypatch.setattr(evaluator.lm, "_answers", _raising(RuntimeError("something else")))
    assert evaluator.evaluate(recipe(models, Take("red", 0))).status == "failed"


def _raising(error: Exception) -> Callable[[object], None]:
    def answers(batch: object) -> None:
        raise error

    return answers


def test_nan_while_generating_gives_no_score(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(models["red"], tmp_path / "red")
    path = tmp_path / "red" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][:] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    mine = models | {"red": str(tmp_path / "red")}
    config = EvaluationConfig(
        tasks=tasks_of("t_generate"), include_path=str(tasks_dir), device="cpu"
    )
    outcome = Evaluator(Family(mine, "base"), config).evaluate(recipe(mine, Take("red", 2)))
    assert outcome.status == "infeasible"
    assert outcome.accuracy is None
    assert "not numbers" in outcome.reason
