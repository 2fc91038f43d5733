"""Layers that are run one at a time compute what their model computes, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gptailor.errors import ModelError
from gptailor.evaluation.repair.replay import (
    Arguments,
    check_replay,
    entering,
    hidden_state,
    run_layer,
    split,
    trace,
)
from tests.evaluation.repair.tiny import ARCHITECTURES, HIDDEN, layers_of, lm_of, tiny

IDS = torch.arange(4, 4 + 5 * 9).view(5, 9)
DEPENDS = "depend on more than their input and the tokens' positions"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_replay_equals_the_models_own_pass(tmp_path: Path, name: str) -> None:
    """Also with the arguments of a model with other weights, as in a repair."""
    model, other = tiny(name, 3), tiny(name, 3, seed=1)
    layers, lm = layers_of(model), lm_of(model, tmp_path / "model")
    with torch.no_grad():
        seen = trace(lm, layers, IDS)
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
        others = trace(lm_of(other, tmp_path / "other"), layers_of(other), IDS)
        hidden = model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
        assert torch.equal(entering(lm, layers[0], IDS), hidden[0])
        for arguments in (seen.arguments, others.arguments):
            state = entering(lm, layers[0], IDS)
            for depth, given in enumerate(arguments):
                assert torch.equal(state, seen.states[depth])
                assert torch.equal(state, hidden[depth])
                state = run_layer(layers[depth], state, given)
            assert torch.equal(state, seen.states[-1])
            check_replay(lm, layers, arguments, IDS)


def test_nothing_runs_behind_the_first_layers_input(tmp_path: Path) -> None:
    model = tiny("llama", 3)
    ran: list[nn.Module] = []
    for module in [*layers_of(model), model.lm_head]:
        module.register_forward_hook(lambda module, args, output: ran.append(module))
    with torch.no_grad():
        state = entering(lm_of(model, tmp_path), layers_of(model)[0], IDS)
    assert torch.equal(state, model.model.embed_tokens(IDS))
    assert ran == []


class Drifting(nn.Module):
    """A layer that adds something else each time."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.times = 0

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.times += 1
        return hidden_state(self.layer(*args, **kwargs)) + 0.1 * self.times


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_layer_that_depends_on_something_else_is_refused(tmp_path: Path, place: int) -> None:
    model = tiny("llama", 3)
    model.model.layers[place] = Drifting(model.model.layers[place])
    layers, lm = list(model.model.layers), lm_of(model, tmp_path)
    with torch.no_grad():
        given = trace(lm, layers, IDS).arguments
        with pytest.raises(ModelError, match=DEPENDS):
            check_replay(lm, layers, given, IDS)


def test_the_arguments_of_another_kind_of_layer_are_noticed(tmp_path: Path) -> None:
    """Layers 0 and 2 of this one see four tokens, layer 1 sees all."""
    model = tiny("gemma2:windows", 3)
    layers, lm = layers_of(model), lm_of(model, tmp_path)
    with torch.no_grad():
        first, second, third = trace(lm, layers, IDS).arguments
        check_replay(lm, layers, [third, second, first], IDS)
        for given in ([second, second, third], [first, first, third], [first, second, second]):
            with pytest.raises(ModelError, match=DEPENDS):
                check_replay(lm, layers, given, IDS)


def test_states_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    layers, lm = layers_of(model), lm_of(model, tmp_path)
    with torch.no_grad():
        layers[1].get_parameter("mlp.down_proj.weight")[3, 3] = float("nan")
        with pytest.raises(ModelError, match=DEPENDS):
            check_replay(lm, layers, trace(lm, layers, IDS).arguments, IDS)


def test_layers_that_pass_on_several_states_are_refused(tmp_path: Path) -> None:
    """Gemma 3n keeps four versions of each token's state."""
    model = tiny("gemma3n_text")
    with (
        torch.no_grad(),
        pytest.raises(ModelError, match="don't pass on one state for each token"),
    ):
        trace(lm_of(model, tmp_path), layers_of(model), IDS)


def test_layers_that_are_left_out_are_refused(tmp_path: Path) -> None:
    model = tiny("llama", 3)
    model.model.config.num_hidden_layers = 2
    with (
        torch.no_grad(),
        pytest.raises(ModelError, match="don't pass on one state for each token"),
    ):
        trace(lm_of(model, tmp_path), list(model.model.layers), IDS)


def test_the_state_among_a_layers_arguments() -> None:
    state, mask, place = torch.randn(2, 3, HIDDEN), torch.ones(2, 3), torch.arange(3)
    found = split((state, mask), {"position_ids": place})
    assert found[0] is state
    assert found[1] == Arguments((mask,), {"position_ids": place})
    given = {"attention_mask": mask, "hidden_states": state}
    assert split((), given) == (state, Arguments((), {"attention_mask": mask}))
    assert "hidden_states" in given
    assert split((), {"x": state, "mask": mask}) == (state, Arguments((), {"mask": mask}))
    assert hidden_state([(state, mask), None]) is state
