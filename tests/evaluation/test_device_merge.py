"""Plans merged on the GPU and by the CPU engine. Also run by test_emulated_cuda.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gptailor import _C
from gptailor.errors import ModelError
from gptailor.evaluation.device_merge import can_merge, merge_on_gpu
from gptailor.merging.registry import METHODS
from gptailor.models.family import Family
from gptailor.recipe import Merge, Recipe, Take
from gptailor.stitching.compute import ComputedTensor
from gptailor.stitching.plan import OutTensor, Source, plan_layer

EMULATED = _C.build_info()["cuda_version"] == "emulated"
DEVICE = torch.device("cpu" if EMULATED else "cuda")
needs_gpu = pytest.mark.skipif(_C.cuda_device_count() == 0, reason="no CUDA device")
GIVEN = {"t": 0.3, "density": 0.5}
ON_GPU = {name for name, method in METHODS.items() if method.engine and method.engine.on_gpu}


def entry(method: str) -> Merge:
    known = METHODS[method]
    names = ["red", "green", "blue"][: known.max_sources]
    weights = tuple((name, 0.3 + 0.2 * i) for i, name in enumerate(names))
    values = {
        p.name: GIVEN.get(p.name, p.default) for p in known.parameters if p.name != "task_vectors"
    }
    checked = {name: value for name, value in values.items() if value is not None}
    return Merge(method, 1, weights, tuple(checked.items()))


def opened(family: Family, source: Source) -> torch.Tensor:
    checkpoint = family.candidates[source.model].checkpoint
    return torch.utils.dlpack.from_dlpack(checkpoint.tensor(source.info.name))


def on_cpu(family: Family, tensor: OutTensor) -> torch.Tensor:
    buffer = _C.Buffer(tensor.n_bytes)
    ComputedTensor(tensor, family, 1).run(0, tensor.sources[0].info.n_elements, buffer)
    return torch.utils.dlpack.from_dlpack(buffer.tensor(0, tensor.shape, tensor.dtype)).clone()


def plans(family: Family, models: dict[str, str]) -> Iterator[tuple[str, list[OutTensor]]]:
    for method in sorted(ON_GPU):
        layers = (Take("base", 0), entry(method))
        recipe = Recipe(models, "base", layers, "base", "base", "float32")
        yield method, plan_layer(layers[1], 1, recipe, family, 0.75)


@pytest.mark.gpu
@needs_gpu
def test_plans_are_merged_as_on_the_cpu(models: dict[str, str]) -> None:
    family = Family(models, "base")
    seen = set()
    for method, tensors in plans(family, models):
        assert all(can_merge(t) for t in tensors), method
        assert len({t.factor for t in tensors}) == 2  # two launches, not in the plan's order
        got, found = merge_on_gpu(
            tensors,
            lambda source: _C.DeviceTensor.from_dlpack(opened(family, source).to(DEVICE)),
            DEVICE,
        )
        assert not found.any()
        for tensor, result in zip(tensors, got, strict=True):
            expected = on_cpu(family, tensor)
            assert result.shape == expected.shape
            torch.testing.assert_close(
                result.cpu(), expected, rtol=0 if EMULATED else 1e-6, atol=0 if EMULATED else 1e-6
            )
        seen.add(method)
    assert seen == ON_GPU


@pytest.mark.gpu
@needs_gpu
def test_the_flag_is_that_of_the_tensor_with_the_nan(models: dict[str, str]) -> None:
    family = Family(models, "base")
    method, tensors = next(plans(family, models))
    bad = next(i for i, t in enumerate(tensors) if "down_proj" in t.name)

    def handle(source: Source) -> _C.DeviceTensor:
        data = opened(family, source).to(DEVICE).clone()
        if source.model == "red" and source.info.name == tensors[bad].sources[0].info.name:
            data.flatten()[3] = float("nan")
        return _C.DeviceTensor.from_dlpack(data)

    _, found = merge_on_gpu(tensors, handle, DEVICE)
    assert found.tolist() == [[int(i == bad), 0] for i in range(len(tensors))], method


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_the_resident_model_says_where_the_nan_is(models: dict[str, str], tmp_path: object) -> None:
    import shutil
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    from gptailor.evaluation.resident import ResidentModel

    assert isinstance(tmp_path, Path)
    shutil.copytree(models["red"], tmp_path / "red")
    path = tmp_path / "red" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    mine = models | {"red": str(tmp_path / "red")}
    resident = ResidentModel(Family(mine, "base"), device="cuda")
    chosen = Recipe(mine, "base", (entry("task_arithmetic"),), "base", "base", "bfloat16")
    for _ in range(2):  # the layer is not cached
        with pytest.raises(ModelError, match=r"mlp\.up_proj\.weight"):
            resident.assemble(chosen)


def test_methods_without_a_gpu_path_go_to_the_cpu_engine(models: dict[str, str]) -> None:
    family = Family(models, "base")
    for method, declared in METHODS.items():
        if method in ON_GPU or declared.engine is None or declared.is_calibrated:
            continue
        layer = entry(method)
        recipe = Recipe(models, "base", (layer,), "base", "base", "float32")
        try:
            tensors = plan_layer(layer, 0, recipe, family)
        except Exception as error:
            pytest.fail(f"{method}: {error}")
        assert not any(can_merge(t) for t in tensors if t.merge is not None), method
