"""A model on several devices: no operation mixes devices, and results stay the same.

These tests need no GPU. Tensors on the CPU get labels that stand for devices: a result has the
label of its inputs, `to` changes the label, and an operation on two labels fails as it would on
real devices.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptailor.config import EvaluationConfig
from gptailor.errors import ResourceError
from gptailor.evaluation.evaluator import Evaluator
from gptailor.evaluation.input_hooks import MovesInputs, move_inputs
from gptailor.evaluation.resident import ResidentModel
from gptailor.models.family import Family
from gptailor.recipe import Layer, Merge, Recipe, Take
from tests.evaluation.own_tasks import tasks_of
from tests.evaluation.test_device_weights import random_recipe

CPU = torch.device("cpu")
GPUS = [torch.device("cuda", 0), torch.device("cuda", 1)]

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 4},
    "olmo2": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64},
}


class MixedError(RuntimeError):
    """An operation got tensors of two devices."""


class Labels:
    """The device that each storage in CPU memory stands for; most have no label yet."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, torch.device]] = {}

    def set(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = (storage, device)  # kept alive: no address is reused
        return tensor

    def get(self, tensor: torch.Tensor) -> torch.device | None:
        found = self._known.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def set_all(self, module: nn.Module, device: torch.device) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            self.set(tensor, device)


class Refuses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations on tensors with different labels."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = labels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        found = (self.labels.get(x) for x in inputs if x.ndim)
        devices = {device for device in found if device is not None}
        if len(devices) > 1:
            raise MixedError(f"{func} got tensors of {devices}")
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result) if devices else ():
            if isinstance(x, torch.Tensor):
                self.labels.set(x, *devices)
        return result


class Moves(TorchFunctionMode):
    """Makes `to` a GPU a copy with that GPU's label."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.labels = labels
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and len(args) == 2 and args[1] in GPUS:
            if self.labels.get(args[0]) == args[1]:
                return args[0]
            self.count += 1
            return self.labels.set(_copy(args[0]), args[1])
        return func(*args, **(kwargs or {}))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy without a label."""
    with torch.utils._python_dispatch._disable_current_modes():
        return tensor.clone()


@pytest.mark.parametrize("kind", KINDS)
def test_no_operation_meets_tensors_of_two_devices(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind]})
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(14).view(2, 7)
    keep = torch.tensor([2, 5])
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 6)
    inside = {id(p) for p in stack.parameters()}
    outside = [n for n, p in model.named_parameters() if id(p) not in inside]
    labels = Labels()
    labels.set_all(model, GPUS[0])
    for layer in stack[3:]:
        labels.set_all(layer, GPUS[1])
    labels.set(ids, GPUS[0])
    labels.set(keep, GPUS[0])
    moves = Moves(labels)
    with torch.inference_mode(), moves, Refuses(labels):
        with pytest.raises(MixedError):
            model(input_ids=ids, use_cache=False)
        move_inputs(model, list(stack), outside, [GPUS[0], *[GPUS[0]] * 3, *[GPUS[1]] * 3])
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        assert labels.get(logits) == GPUS[0]
        assert moves.count >= 2  # there and back
        first = model(input_ids=ids, use_cache=True)  # as when text is generated
        again = model(input_ids=ids[:, :1], past_key_values=first.past_key_values, use_cache=True)
        assert labels.get(again.logits) == GPUS[0]
        kept = [labels.get(layer.keys) for layer in again.past_key_values.layers]
        assert kept == [GPUS[0]] * 3 + [GPUS[1]] * 3
    assert torch.equal(logits, expected)


# Pools on the CPU


def sizes(models: dict[str, str]) -> tuple[int, int]:
    """The bytes that a layer, and all candidates, take on a device."""
    resident = ResidentModel(Family(models, "base"), device="cpu", candidate_bytes=1 << 40)
    weights = resident.pools[0].weights
    one = max(weights.n_bytes(weights.key("base", src, ())) for src in range(6))
    return one, sum(
        weights.n_bytes(weights.key(model, src, ()))
        for model in models
        for src in ("embeddings", "head", *range(6))
    )


def spread(models: dict[str, str], **options: Any) -> ResidentModel:
    """Two pools, neither with room for a model and what a merge reads."""
    layer, _ = sizes(models)
    options = {"candidate_bytes": 4 * layer + 5 * layer, **options}
    return ResidentModel(Family(models, "base"), device="cpu", spread_over=[CPU, CPU], **options)


def test_a_model_is_spread_only_where_it_does_not_fit(models: dict[str, str]) -> None:
    family = Family(models, "base")
    layer, total = sizes(models)
    for room, pools in ((total, 1), (6 * layer + 20_000 + 4 * layer, 1), (9 * layer, 2)):
        resident = ResidentModel(family, device="cpu", candidate_bytes=room, spread_over=[CPU, CPU])
        assert len(resident.pools) == pools, room
    assert resident._pool_of == (0, 0, 0, 1, 1, 1)
    assert len(ResidentModel(family, device="cpu", spread_over=[CPU, CPU]).pools) == 1  # mapped
    with pytest.raises(ResourceError, match=r"the worker's 2 GPUs have .* give each worker more"):
        ResidentModel(family, device="cpu", candidate_bytes=6 * layer, spread_over=[CPU, CPU])


def test_a_spread_model_is_the_same_model(models: dict[str, str]) -> None:
    plain = ResidentModel(Family(models, "base"), device="cpu")
    resident = spread(models, cache_bytes=60_000)
    ids = torch.arange(4, 30)[None]
    rng = random.Random(3)
    for number in range(25):
        chosen = replace(random_recipe(models, rng), dtype="bfloat16")
        with torch.inference_mode():
            expected = plain.assemble(chosen)(input_ids=ids).logits
            found = resident.assemble(chosen)(input_ids=ids).logits
        assert torch.equal(expected, found), number
    for pool in resident.pools:
        groups = list(pool.weights.cache)
        assert groups
        for group in groups:
            assert resident._pool(group.place) is pool
        assert pool.weights.cache.n_bytes <= pool.weights.budget_bytes
        assert 0 < pool.merged.n_bytes <= 60_000


def test_an_assembled_model_moves_activations_between_devices(models: dict[str, str]) -> None:
    """Also where one source layer is used three times, so its module was copied."""
    resident = spread(models)
    weights = (("red", 0.5), ("blue", 0.5))
    layers: list[Layer] = [Take("red", 1), Take("red", 4), Take("blue", 4)]
    layers += [Merge("linear", 4, weights), Take("green", 0), Take("base", 5)]
    model = resident.assemble(Recipe(models, "base", tuple(layers), "base", "base"))
    ids = torch.arange(4, 30)[None]
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
    labels = Labels()
    labels.set_all(model, GPUS[0])
    for module, layer in zip(resident.layers(), layers, strict=True):
        labels.set_all(module, GPUS[layer.src_layer // 3])
    hooks = {m: list(m._forward_pre_hooks.values()) for m in model.modules()}
    for module, found in hooks.items():
        number = 0
        if module in resident.layers():
            number = layers[resident.layers().index(module)].src_layer // 3
        for hook in found:
            if isinstance(hook, MovesInputs):
                hook.device = GPUS[number]
    labels.set(ids, GPUS[0])
    moves = Moves(labels)
    with torch.inference_mode(), moves, Refuses(labels):
        logits = model(input_ids=ids).logits
    assert labels.get(logits) == GPUS[0]
    assert torch.equal(logits, expected)
    assert moves.count >= 4  # 0 → 1 → 0 → 1 → 0


def test_evaluations_of_a_spread_model_are_the_same(
    models: dict[str, str], tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluationConfig(
        tasks=tasks_of("t_long", "t_generate"), include_path=str(tasks_dir), device="cpu"
    )
    family = Family(models, "base")
    plain = Evaluator(family, config)
    recipe = Recipe(models, "base", tuple(Take("red", i) for i in (0, 2, 4)), "base", "base")
    expected, similar = plain.evaluate(recipe), plain.similarity("red", "bfloat16")
    real = ResidentModel.__init__
    layer, _ = sizes(models)

    def spread_init(self: ResidentModel, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **{**kwargs, "spread_over": [CPU, CPU], "candidate_bytes": 9 * layer})

    monkeypatch.setattr(ResidentModel, "__init__", spread_init)
    evaluator = Evaluator(family, config)
    assert len(evaluator.resident.pools) == 2
    assert evaluator.evaluate(recipe).scores == expected.scores
    assert evaluator.similarity("red", "bfloat16") == similar
