"""The memory policy: the resident model uses what `gptailor plan` says a worker will use.

These tests need no GPU: the policy for GPUs runs with the CPU in their place.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from gptailor.config import EvaluationConfig
from gptailor.errors import ResourceError
from gptailor.evaluation import memory_policy
from gptailor.evaluation.device_memory import DeviceMemory
from gptailor.evaluation.device_pool import DevicePool
from gptailor.evaluation.device_weights import Group
from gptailor.evaluation.footprint import Blocks, find_blocks, padded
from gptailor.evaluation.memory_policy import check_dense, plan_memory, room_beside
from gptailor.evaluation.repair.footprint import RepairFootprint
from gptailor.evaluation.resident import ResidentModel
from gptailor.evaluation.slots import Parameters
from gptailor.models.family import Family
from gptailor.recipe import Recipe, Take
from gptailor.verbs.worker_memory import WorkerMemory, find_worker_memory
from tests.evaluation.own_tasks import tasks_of
from tests.evaluation.test_device_weights import CountedBackend, random_recipe

CPU = torch.device("cpu")
GIB = 1 << 30


class Used:
    """What a resident model uses while it assembles recipes.

    Attributes:
        copies: peak bytes of copies in another type, for each pool.
        merged: peak bytes of merged tensors, for each pool.
        evicted: how many groups were evicted.
        places: the places of which each pool held groups.
    """

    def __init__(self, resident: ResidentModel, models: dict[str, str]) -> None:
        self.evicted = 0
        real = resident._skeleton.forget

        def forget(parameters: Parameters) -> None:
            self.evicted += 1
            real(parameters)

        self.copies = [0] * len(resident.pools)
        self.merged = [0] * len(resident.pools)
        self.places: list[set[object]] = [set() for _ in resident.pools]
        rng = random.Random(5)
        with mock.patch.object(resident._skeleton, "forget", forget):
            for _ in range(60):
                resident.assemble(replace(random_recipe(models, rng), dtype="bfloat16", _cache={}))
                for number, pool in enumerate(resident.pools):
                    copies = sum(map(_copied, pool.weights._groups.values()))
                    self.copies[number] = max(self.copies[number], copies)
                    self.merged[number] = max(self.merged[number], _merged(pool))
                    self.places[number] |= {key.place for key in pool.weights._groups}


def _copied(group: Group) -> int:
    """The bytes of copies: the families' files are bfloat16, so float32 tensors are copies."""
    return sum(
        padded(t.numel() * t.element_size())
        for t in group.tensors.values()
        if t.dtype is torch.float32
    )


def _merged(pool: DevicePool) -> int:
    tensors = [p for kept in pool.merged.values() for p in kept.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def planned(family: Family, dtype: str, **options: Any) -> WorkerMemory:
    """The plan that `gptailor plan` makes, for recipes in bfloat16."""
    options = {"workers": 1, "gpus_per_worker": 1, "gpu_gib": None, **options}
    candidates = options.pop("candidates", None)
    gib = None if candidates is None else candidates / GIB
    evaluation = EvaluationConfig(tasks=tasks_of("t"), device="cpu", candidates_gib=gib)
    return find_worker_memory(find_blocks(family, dtype, "bfloat16"), evaluation, **options)


def set_memory(monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
    monkeypatch.setattr("gptailor.evaluation.device_memory.available_bytes", lambda: free)
    monkeypatch.setattr("gptailor.evaluation.device_memory.total_bytes", lambda: total)


@pytest.fixture
def family(models: dict[str, str]) -> Family:
    return Family(models, "base")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_copies_on_the_cpu(
    family: Family,
    models: dict[str, str],
    workers: int,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From just enough memory for one recipe to enough for all candidates in float32."""
    every = find_blocks(family, "float32").copies
    free = int(share * (every + 4096) * workers / memory_policy.ROOM) + workers
    set_memory(monkeypatch, free, 1 << 40)
    plan = planned(family, "float32", workers=workers)
    resident = ResidentModel(family, dtype="float32", device="cpu", workers=workers)
    used = Used(resident, models)
    assert plan.cpu_candidates is None and not plan.why_not
    assert plan.cpu_stay == (used.evicted == 0) == (share == 1.0)
    if plan.cpu_stay:
        assert used.copies == [plan.cpu_copies] == [every]
    else:
        assert 0.7 * plan.cpu_copies < used.copies[0] <= plan.cpu_copies < every
    assert 0 < used.merged[0] <= plan.cpu_cache


def test_files_in_the_type_of_the_forward_pass_need_no_copies(
    family: Family, models: dict[str, str]
) -> None:
    plan = planned(family, "bfloat16")
    used = Used(ResidentModel(family, dtype="bfloat16", device="cpu"), models)
    assert plan.cpu_copies == used.copies[0] == used.evicted == 0
    assert plan.cpu_stay


def test_recipes_in_another_type_than_the_files_need_copies(
    family: Family, models: dict[str, str]
) -> None:
    """A bfloat16 model whose weights are rounded to float16 and computed in bfloat16."""
    resident = ResidentModel(family, dtype="bfloat16", device="cpu")
    rng = random.Random(1)
    for _ in range(60):
        resident.assemble(replace(random_recipe(models, rng), dtype="float16", _cache={}))
    blocks = find_blocks(family, "bfloat16", "float16")
    assert resident.pools[0].weights.cache.n_bytes == blocks.copies > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("share", [0.5, 1.0, 1.5, 3.0])
def test_candidates_that_are_read_into_memory(
    family: Family, models: dict[str, str], dtype: str, share: float
) -> None:
    """As `candidates_gib` asks for on the CPU."""
    blocks = find_blocks(family, dtype)
    n_bytes = int(share * blocks.files)
    plan = planned(family, dtype, candidates=n_bytes)
    backend = CountedBackend()
    resident = ResidentModel(
        family, dtype=dtype, device="cpu", candidate_bytes=n_bytes, backend=backend
    )
    layers = tuple(Take("red", src) for src in range(family.num_layers))
    dense = Recipe(models, "base", layers, "red", "red", "bfloat16")
    if plan.why_not:
        assert (dtype, share) == ("float32", 0.5)
        with pytest.raises(ResourceError, match="One recipe's layers need more than") as error:
            resident.assemble(dense)
        assert plan.why_not == str(error.value)
        return
    resident.assemble(dense)
    used = Used(resident, models)
    kept = resident.pools[0].weights.cache.n_bytes
    again = max(Counter(backend.loads).values())
    assert plan.cpu_candidates == n_bytes
    if dtype == "bfloat16":
        assert 0.8 * min(n_bytes, blocks.files) < backend.most <= n_bytes
        assert plan.cpu_stay == (again == 1) == (share >= 1.0)
    assert plan.cpu_stay == (used.evicted == 0 and kept == blocks.files + blocks.copies)
    assert 0.6 * min(n_bytes, blocks.files + blocks.copies) < kept <= n_bytes


@pytest.mark.parametrize("workers", [1, 4])
def test_a_small_cache(
    family: Family, models: dict[str, str], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_memory(monkeypatch, 1 << 30, 4_000_000)
    plan = planned(family, "bfloat16", workers=workers)
    assert plan.cpu_cache == 500_000 // workers
    used = Used(ResidentModel(family, device="cpu", workers=workers), models)
    assert 0.8 * plan.cpu_cache < used.merged[0] <= plan.cpu_cache


# GPUs


@pytest.fixture
def as_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[DeviceMemory]]:
    """Lets the CPU stand in for GPUs; tests append the memory of each GPU to the list."""
    memories: list[DeviceMemory] = []

    def planned_for_gpus(blocks: Blocks, kind: str, memory: Any, *args: Any, **kwargs: Any) -> Any:
        return plan_memory(blocks, "cuda", memories, *args, **kwargs)

    monkeypatch.setattr("gptailor.evaluation.resident.plan_memory", planned_for_gpus)
    yield memories


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("share", [0.7, 1.1])
def test_one_gpu(
    family: Family,
    models: dict[str, str],
    workers: int,
    share: float,
    as_gpus: list[DeviceMemory],
) -> None:
    """Workers that share a GPU stay within its memory together."""
    blocks = find_blocks(family, "bfloat16")
    total = int(share * blocks.files / (1 - 1 / 4 - 1 / 8)) * workers  # less headroom and merges
    as_gpus.append(DeviceMemory(total, total))
    backend = CountedBackend()
    resident = ResidentModel(
        family, dtype="bfloat16", device="cpu", workers=workers, backend=backend
    )
    used = Used(resident, models)
    (device,) = resident.plan.devices
    assert resident.plan.all_stay == (used.evicted == 0) == (share > 1.0)
    assert 0.8 * min(device.candidate_bytes, blocks.files) < backend.most <= device.candidate_bytes
    assert 0 < used.merged[0] <= resident.plan.cache_bytes
    assert (device.candidate_bytes + resident.plan.cache_bytes) * workers <= 0.75 * total + workers
    if workers == 1:
        gpus = planned(family, "bfloat16", gpu_gib=total / GIB).gpus
        assert gpus is not None
        assert (gpus.budget, gpus.cache) == (device.candidate_bytes, resident.plan.cache_bytes)
        assert gpus.all_stay == resident.plan.all_stay


def test_two_gpus(
    family: Family,
    models: dict[str, str],
    as_gpus: list[DeviceMemory],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backends: list[CountedBackend] = []

    def counted(device: torch.device, pin_bytes: int) -> CountedBackend:
        backends.append(CountedBackend(device))
        return backends[-1]

    monkeypatch.setattr("gptailor.evaluation.device_pool.LoadingBackend", counted)
    blocks = find_blocks(family, "bfloat16")
    total = int((0.7 * blocks.model + blocks.largest_merge) / (1 - 1 / 4 - 1 / 8))
    as_gpus += [DeviceMemory(total, total)] * 2
    plan = planned(family, "bfloat16", gpu_gib=total / GIB, gpus_per_worker=2).gpus
    resident = ResidentModel(family, dtype="bfloat16", device="cpu", spread_over=[CPU, CPU])
    used = Used(resident, models)
    assert plan is not None and len(plan.parts) == len(resident.pools) == 2
    for part, places, backend, merged in zip(
        plan.parts, used.places, backends, used.merged, strict=True
    ):
        layers = set(range(part.first_layer, part.end_layer))
        assert places == (layers | {"embeddings", "head"} if part.gpu == 0 else layers)
        assert part.n_bytes < backend.most <= plan.budget
        assert 0 < merged <= plan.cache
    assert plan.all_stay == (used.evicted == 0) == False  # noqa: E712
    alone = planned(family, "bfloat16", gpu_gib=total / GIB)
    assert alone.gpus is None and "give each worker more GPUs" in alone.why_not


def test_further_gpus_are_queried_only_if_they_are_needed(family: Family) -> None:
    def memories(n_bytes: int) -> Iterator[DeviceMemory]:
        yield DeviceMemory(n_bytes, n_bytes)
        raise AssertionError

    blocks, host = find_blocks(family, "bfloat16"), DeviceMemory(GIB, GIB)
    assert len(plan_memory(blocks, "cuda", memories(GIB), host).devices) == 1
    with pytest.raises(AssertionError):
        plan_memory(blocks, "cuda", memories(blocks.model), host)


def test_the_ends_alone_may_fill_the_first_gpu() -> None:
    blocks = Blocks(2, 100, (10,) * 4, 100, (20,) * 4, 200)
    host, gpus = DeviceMemory(GIB, GIB), [DeviceMemory(10_000, 10_000)] * 2
    plan = plan_memory(blocks, "cuda", gpus, host, candidate_bytes=121, cache_bytes=0)
    assert [(d.first_layer, d.end_layer, d.model_bytes) for d in plan.devices] == [
        (0, 0, 100), (0, 4, 40),
    ]  # fmt: skip
    assert plan.device_of == (1, 1, 1, 1)


def test_one_candidate_in_a_wider_type_is_spread(family: Family) -> None:
    """The file would fit on one GPU, but the model in the wider type does not."""
    blocks = find_blocks(Family({"base": family.refs["base"]}, "base"), "float32")
    host, gpu = DeviceMemory(GIB, GIB), DeviceMemory(GIB, GIB)
    budget = int(0.8 * blocks.model)
    assert blocks.files < budget
    plan = plan_memory(blocks, "cuda", [gpu] * 2, host, candidate_bytes=budget)
    assert len(plan.devices) == 2
    alone = plan_memory(blocks, "cuda", [gpu], host, candidate_bytes=budget)
    with pytest.raises(ResourceError, match="give each worker more GPUs"):
        check_dense(blocks, alone, "cuda")


# What is left beside candidates and merged layers


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("share", [0.6, 8.0, 40.0])
def test_room_on_a_gpu(family: Family, dtype: str, share: float) -> None:
    """All memory is for weights, merged layers, or left."""
    blocks = find_blocks(family, dtype)
    gpu = DeviceMemory(*[int(share * blocks.files)] * 2)
    plan = plan_memory(blocks, "cuda", [gpu], DeviceMemory(GIB, GIB))
    room = room_beside(blocks, plan, [gpu])
    budget = plan.devices[0].candidate_bytes
    if share > 1:
        assert plan.all_stay
        needed = blocks.files + (4 * blocks.model if blocks.copies else 0)
        assert room == gpu.free_bytes - plan.cache_bytes - needed
    else:
        assert not plan.all_stay
        assert room == gpu.free_bytes - plan.cache_bytes - budget == gpu.free_bytes // 4


def test_the_fullest_gpu_has_the_least_room(family: Family) -> None:
    blocks = find_blocks(family, "float32")
    gpus = [DeviceMemory(n, n) for n in (int(blocks.model), int(0.8 * blocks.model))]
    plan = plan_memory(blocks, "cuda", gpus, DeviceMemory(GIB, GIB), candidate_bytes=1 << 18)
    plan = replace(plan, cache_bytes=0)
    rooms = [gpu.free_bytes - (1 << 18) for gpu in gpus]
    assert len(plan.devices) == 2
    assert room_beside(blocks, plan, gpus) == max(0, min(rooms))


def test_room_on_the_cpu(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = RepairFootprint(4, 100, 120, 50, system=300, states=700, teachers=4000)
    found = {}
    for free in (1 << 20, 8 << 20):
        for workers in (1, 4):
            set_memory(monkeypatch, free, free)
            plan = planned(family, "float32", workers=workers, repair=needs)
            assert plan.repair is not None
            taken = plan.cpu_copies + plan.cpu_cache
            assert plan.repair.room == max(0, free // workers - taken)
            assert not plan.repair.in_file
            assert bool(plan.repair.why_not) == (plan.repair.room < 5000)
            found[free, workers] = plan.repair.room
    assert found[8 << 20, 1] > found[8 << 20, 4] > found[1 << 20, 4]
    many = replace(needs, teachers=free)
    plan = planned(family, "float32", workers=4, repair=many)
    assert plan.repair is not None
    assert plan.repair.in_file
    assert not plan.repair.why_not
    wide = replace(needs, system=free)
    plan = planned(family, "float32", workers=4, repair=wide)
    assert plan.repair is not None
    assert "use fewer workers per device" in plan.repair.why_not
    assert planned(family, "float32").repair is None
