"""Candidates on the device: the same model as from mapped files, within the stated budget."""

from __future__ import annotations

import gc
import os
import random
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptailor import _C
from gptailor.errors import ModelError, ResourceError
from gptailor.evaluation.device_weights import DeviceWeights, GroupKey, LoadingBackend
from gptailor.evaluation.resident import ResidentModel
from gptailor.models.checkpoint import TensorInfo
from gptailor.models.family import Family
from gptailor.recipe import NO_LAYER, End, Layer, Merge, Recipe, Take
from tests.conftest import save_llama

CPU = torch.device("cpu")
TA = (("lambda", 1.0), ("normalize", 0.0))
TIES = (("density", 0.5), ("lambda", 1.0), ("normalize", 1.0))
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(_C.cuda_device_count() == 0, reason="no CUDA device"),
        ],
    ),
]


class CountedBackend(LoadingBackend):
    """Counts what is loaded, and the bytes in use at each load."""

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__(device, threads=2, buffer_bytes=4096)
        self.loads: list[tuple[str, str]] = []
        self.most = 0
        self._alive: dict[int, int] = {}

    def load(self, family: Family, model: str, infos: Sequence[TensorInfo]) -> list[torch.Tensor]:
        self.loads.append((model, infos[0].name))
        tensors = super().load(family, model, infos)
        storage = tensors[0].untyped_storage()
        number = len(self.loads)
        self._alive[number] = storage.nbytes()
        weakref.finalize(storage, self._alive.pop, number)
        gc.collect(0)
        self.most = max(self.most, sum(self._alive.values()))
        return tensors


def recipe(models: dict[str, str], *layers: Layer, dtype: str = "bfloat16") -> Recipe:
    return Recipe(models, "base", layers, "base", "base", dtype)


def random_recipe(models: dict[str, str], rng: random.Random) -> Recipe:
    names = list(models)
    layers: list[Layer] = []
    for src in sorted(rng.sample(range(6), rng.randint(2, 6))):
        if rng.random() < 0.6:
            layers.append(Take(rng.choice(names), src, scale=rng.choice([1.0, 1.0, 0.9])))
        else:
            weights = tuple((n, rng.choice([0.3, 0.5, 1.0])) for n in names if n != "base")
            method, values = rng.choice([("task_arithmetic", TA), ("ties", TIES)])
            layers.append(Merge(method, src, weights, values))
    if rng.random() < 0.2:
        layers.append(layers[0])  # one source layer twice
    ends: list[End] = [rng.choice(names), rng.choice(names)]
    for end in range(2):
        if rng.random() < 0.4:
            weights = tuple((n, rng.choice([0.3, 1.0])) for n in names if n != "base")
            ends[end] = Merge("task_arithmetic", NO_LAYER, weights, TA)
    return Recipe(
        models, "base", tuple(layers), ends[0], ends[1], rng.choice(["bfloat16", "float32"])
    )


def state(resident: ResidentModel) -> dict[str, torch.Tensor]:
    return {name: t.cpu() for name, t in resident.model.state_dict().items()}


def test_a_group_is_what_the_file_holds(models: dict[str, str]) -> None:
    family = Family(models, "base")
    weights = DeviceWeights(family, LoadingBackend(CPU))
    for src in ("embeddings", "head", 0, 5):
        key = weights.key("red", src, (torch.bfloat16, torch.bfloat16))
        assert key == GroupKey("red", src)
        group = weights.get([key])[key]
        file = load_file(Path(models["red"]) / "model.safetensors")
        for name, tensor in group.tensors.items():
            assert tensor.data_ptr() % 64 == 0
            assert torch.equal(tensor, file[name])
        assert weights.get([key])[key] is group
        cast = weights.key("red", src, (torch.float16, torch.float32))
        assert cast.casts == (torch.float16, torch.float32)
        assert weights.n_bytes(cast) >= 1.9 * weights.n_bytes(key) - 256
        for name, tensor in weights.get([cast])[cast].tensors.items():
            assert torch.equal(tensor, file[name].to(torch.float16).to(torch.float32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("share", [None, 0.55])
def test_recipes_are_the_same_as_from_mapped_files(
    models: dict[str, str], device: str, dtype: str, share: float | None
) -> None:
    family = Family(models, "base")
    total = sum(t.n_bytes for c in family.candidates.values() for t in c.tensors.values())
    mapped = ResidentModel(family, device="cpu", dtype=dtype, cache_bytes=0)
    budget = 1 << 30 if share is None else int(total * (2 if dtype == "float32" else 1) * share)
    loaded = ResidentModel(
        family, device=device, dtype=dtype, cache_bytes=100_000, candidate_bytes=budget
    )
    rng = random.Random(0)
    for number in range(30):
        chosen = random_recipe(models, rng)
        mapped.assemble(chosen)
        try:
            loaded.assemble(chosen)
        except ResourceError:
            assert share is not None and dtype == "auto" and chosen.dtype == "float32"
            continue
        expected, found = state(mapped), state(loaded)
        assert list(found) == list(expected), number
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), (number, name)
        loaded.check_pointers(chosen)


def test_the_budget_holds_and_layers_in_use_stay(models: dict[str, str]) -> None:
    family = Family(models, "base")
    everything = DeviceWeights(family, CountedBackend())
    layer = everything.n_bytes(GroupKey("base", 0))
    outside = everything.n_bytes(GroupKey("base", "embeddings"))
    n_models = len(models)
    budget = outside + (6 + n_models) * layer  # room for six layers and the inputs of one merge
    backend = CountedBackend()
    evicted: list[int] = []
    weights = DeviceWeights(
        family, backend, budget, n_models * layer, on_evict=lambda group: evicted.append(id(group))
    )
    rng = random.Random(0)
    for _ in range(40):
        often = [GroupKey("red", src) for src in range(4)]
        rarely = GroupKey(rng.choice(list(models)), rng.randrange(4, 6))
        weights.hold([*often, rarely, GroupKey("base", "embeddings")])
        weights.get([*often, rarely, GroupKey("base", "embeddings")])
        src = rng.randrange(6)
        borrowed = weights.get([GroupKey(name, src) for name in models])
        assert len(borrowed) == n_models
        del borrowed
    assert evicted
    assert backend.most <= budget
    assert (
        sum(load == ("red", "model.layers.2.input_layernorm.weight") for load in backend.loads) <= 1
    )
    assert len(backend.loads) > 40


def test_copies_of_mapped_files_have_a_limit(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 candidates computed in float32, with just enough memory for one recipe."""
    family = Family(models, "base")
    plenty = ResidentModel(family, device="cpu", dtype="float32", cache_bytes=0)
    monkeypatch.setattr("gptailor.evaluation.device_memory.available_bytes", lambda: 0)
    scarce = ResidentModel(family, device="cpu", dtype="float32", cache_bytes=0)
    weights = scarce.pools[0].weights
    one_model = sum(4 * t.n_elements for t in family.base.tensors.values())
    assert weights.budget_bytes < 1.7 * one_model
    rng = random.Random(0)
    for number in range(30):
        chosen = replace(random_recipe(models, rng), dtype="bfloat16")
        plenty.assemble(chosen)
        scarce.assemble(chosen)
        expected, found = state(plenty), state(scarce)
        assert list(found) == list(expected), number
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), (number, name)
        scarce.check_pointers(chosen)
        copies = [g for key, g in weights._groups.items() if key.casts]
        size = sum(t.numel() * t.element_size() for g in copies for t in g.tensors.values())
        assert 0 < size <= weights.budget_bytes
    every = sum(
        t.numel() * t.element_size()
        for key, group in plenty.pools[0].weights._groups.items()
        for t in group.tensors.values()
        if key.casts
    )
    assert every > 2 * weights.budget_bytes  # so most of them were cast repeatedly


def test_too_small_a_budget_is_an_error(models: dict[str, str]) -> None:
    family = Family(models, "base")
    weights = DeviceWeights(family, LoadingBackend(CPU), 100_000)
    keys = [GroupKey("red", src) for src in range(6)]
    weights.hold(keys)
    with pytest.raises(ResourceError, match="fewer workers"):
        weights.get(keys)
    weights.hold([])
    small = DeviceWeights(family, LoadingBackend(CPU), 1000)
    with pytest.raises(ResourceError, match="fewer workers"):
        small.get([GroupKey("red", "embeddings")])


def test_a_failed_load_leaves_nothing_behind(tmp_path: Path) -> None:
    save_llama(tmp_path / "base", 0)
    save_llama(tmp_path / "red", 1, like=tmp_path / "base")
    models = {name: str(tmp_path / name) for name in ("base", "red")}
    family = Family(models, "base")
    weights = DeviceWeights(family, LoadingBackend(CPU))
    path = tmp_path / "red" / "model.safetensors"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[: len(content) // 2])
    keys = [GroupKey("red", src) for src in ("embeddings", "head", *range(6))]
    with pytest.raises(ModelError, match=r"red/model\.safetensors"):
        weights.get(keys)
    assert not any(key in weights for key in keys[2:])
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(weights.get(keys)) == 8
    assert all(key in weights for key in keys)
    weights = DeviceWeights(family, LoadingBackend(CPU))
    path.rename(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"red/model\.safetensors"):
        weights.get(keys)


def test_the_base_is_not_in_memory_twice(models: dict[str, str]) -> None:
    resident = ResidentModel(Family(models, "base"), device="cpu")
    assert sum(p.numel() for p in resident.model.parameters()) == 0
    resident.assemble(recipe(models, Take("red", 3)))
    assert sum(p.numel() for p in resident.model.parameters()) > 0
