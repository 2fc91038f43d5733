"""The writers of each architecture's layers, by their names in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gptailor.evaluation.repair.replay import Arguments, run_layer, trace
from gptailor.evaluation.repair.writers import Writer, find_writers, inputs_of
from tests.evaluation.repair.tiny import HIDDEN, layers_of, lm_of, tiny

IDS = torch.arange(4, 4 + 5 * 9).view(5, 9)

# path, layout, gain, whether nothing else in the layer depends on it
_LLAMA = [("self_attn.o_proj", "out_in", 1.0, False), ("mlp.down_proj", "out_in", 1.0, True)]
_NORMS = [
    ("post_attention_layernorm", "channel", 1.0, False),
    ("post_feedforward_layernorm", "channel", 1.0, True),
]
WRITERS: dict[str, list[tuple[str, str, float, bool]]] = {
    "llama": _LLAMA,
    "gpt2": [("attn.c_proj", "in_out", 1.0, False), ("mlp.c_proj", "in_out", 1.0, True)],
    # both at once, or one after the other
    "gpt_neox": [
        ("attention.dense", "out_in", 1.0, True),
        ("mlp.dense_4h_to_h", "out_in", 1.0, True),
    ],
    "gpt_neox:sequential": [
        ("attention.dense", "out_in", 1.0, False),
        ("mlp.dense_4h_to_h", "out_in", 1.0, True),
    ],
    "phi": [("self_attn.dense", "out_in", 1.0, True), ("mlp.fc2", "out_in", 1.0, True)],
    "cohere": [(path, layout, gain, True) for path, layout, gain, _ in _LLAMA],
    # adds to the output of a projection in place
    "falcon": [
        ("self_attention.dense", "out_in", 1.0, True),
        ("mlp.dense_4h_to_h", "out_in", 1.0, True),
    ],
    # flattens the sequences of a batch; a norm after the addition
    "opt": [("self_attn.out_proj", "out_in", 1.0, False), ("fc2", "out_in", 1.0, True)],
    "opt:after": [("final_layer_norm", "channel", 1.0, True)],
    "bloom": [
        ("self_attention.dense", "out_in", 1.0, False),
        ("mlp.dense_4h_to_h", "out_in", 1.0, True),
    ],
    # norms behind the projections
    "gemma2": _NORMS,
    "olmo2": _NORMS,
    # a constant factor
    "granite": [(path, layout, 0.22, last) for path, layout, _, last in _LLAMA],
    # experts, and an expert that all tokens share, behind a gate
    "mixtral": _LLAMA[:1],
    "qwen2_moe": _LLAMA[:1],
    "granitemoe": [("self_attn.o_proj", "out_in", 0.5, False)],
    "starcoder2": [_LLAMA[0], ("mlp.c_proj", "out_in", 1.0, True)],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WRITERS)
def test_writers(tmp_path: Path, name: str, dtype: str) -> None:
    model = tiny(name, dtype=dtype)
    layers = layers_of(model)
    with torch.no_grad():
        seen = trace(lm_of(model, tmp_path), layers, IDS)
        for layer, state, given in zip(layers, seen.states, seen.arguments, strict=False):
            found = find_writers(layer, state, given)
            assert [(w.path, w.layout, w.is_last) for w in found] == [
                (path, layout, is_last) for path, layout, _, is_last in WRITERS[name]
            ]
            gains = [gain for *_, gain, _ in WRITERS[name]]
            assert [w.gain for w in found] == pytest.approx(gains, rel=1e-2)
            exact = [w.gain for w in found if w.gain == 1.0]
            assert len(exact) == gains.count(1.0)
            assert torch.equal(run_layer(layer, state, given), run_layer(layer, state, given))
            assert not any(part._forward_hooks for part in layer.modules())
            assert not any(part._forward_pre_hooks for part in layer.modules())


def test_a_writer_names_its_weight() -> None:
    assert Writer("mlp.down_proj", "out_in", 1.0, True).weight == "mlp.down_proj.weight"


class Mixed(nn.Module):
    """Parts that are easily mistaken for writers, around two that are some."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(HIDDEN, HIDDEN)  # runs twice, so has two inputs
        self.squared = nn.Linear(HIDDEN, HIDDEN)
        self.idle = nn.Linear(HIDDEN, HIDDEN)  # runs, but nobody looks
        self.unused = nn.Linear(HIDDEN, HIDDEN)
        self.narrow = nn.Linear(HIDDEN, HIDDEN // 2)
        self.halved = nn.Linear(HIDDEN, HIDDEN)
        self.minus = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.idle(x)
        y = x + self.twice(x) + self.twice(x.tanh()) + self.squared(x).square()
        y = y + torch.cat([self.narrow(y), self.narrow(y.tanh())], -1)
        return y + 0.5 * self.halved(y) - self.minus(x), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_parts_whose_output_is_added_are_writers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, state = Mixed().to(dtype), torch.randn(3, 7, HIDDEN).to(dtype)
    with torch.no_grad():
        found = find_writers(layer, state, Arguments((), {}))
    assert [(w.path, w.layout, w.is_last) for w in found] == [
        ("halved", "out_in", True), ("minus", "out_in", True),
    ]  # fmt: skip
    assert [w.gain for w in found] == pytest.approx([0.5, -1.0], rel=1e-2)


def test_a_layer_of_unknown_parts_has_no_writers() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(HIDDEN, HIDDEN))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x @ self.matrix

    with torch.no_grad():
        assert find_writers(Own(), torch.randn(2, 5, HIDDEN), Arguments((), {})) == ()


def test_inputs_are_those_of_the_last_run() -> None:
    torch.manual_seed(0)
    layer, state = Mixed(), torch.randn(2, 5, HIDDEN)
    with torch.no_grad(), inputs_of(layer, ["minus", "halved"]) as kept:
        run_layer(layer, state, Arguments((), {}))
        once = dict(kept)
        output = run_layer(layer, 2.0 * state, Arguments((), {}))
    assert torch.equal(kept["minus"], 2.0 * state)
    assert torch.equal(once["minus"], state)
    assert kept["halved"].shape == output.shape
    with torch.no_grad():
        run_layer(layer, 3.0 * state, Arguments((), {}))
    assert torch.equal(kept["minus"], 2.0 * state)  # nobody looks any more
