"""Which repair a configuration asks for."""

from __future__ import annotations

from typing import Any

import pytest

from gptailor.config import Config
from gptailor.evaluation.repair.settings import front_repair, planned_repair


def configured(repair: Any, rungs: tuple[int, ...] = (60,)) -> Config:
    return Config.model_validate({
        "models": {"base": "b", "math": "m"},
        "base": "base",
        "space": {"repair": repair},
        "evaluation": {"tasks": ["piqa", "arc_easy"], "rungs": rungs},
        "output": "run",
    })  # fmt: skip


def test_a_search_reads_little_and_its_front_more() -> None:
    config = configured("auto")
    planned, front = planned_repair(config), front_repair(config)
    assert planned is not None
    assert front is not None
    assert (planned.layers, front.layers) == ("alternate", "after")
    assert (planned.calibration.documents, front.calibration.documents) == (30, 256)
    assert (planned.calibration.tokens, front.calibration.tokens) == (512, 4096)
    assert planned.calibration.skip == front.calibration.skip == 60  # those that are scored
    assert [one.task for one in planned.calibration.tasks] == ["piqa", "arc_easy"]


@pytest.mark.parametrize("layers", ["gaps", "alternate", "after", "all"])
def test_layers_that_are_named_are_those_of_all_repairs(layers: str) -> None:
    config = configured({"layers": layers})
    planned, front = planned_repair(config), front_repair(config)
    assert planned is not None
    assert front is not None
    assert planned.layers == front.layers == layers


def test_without_better_repairs_of_the_front_all_are_good_ones() -> None:
    config = configured({"calibration": {"front": False}})
    planned = planned_repair(config)
    assert planned is not None
    assert planned.layers == "after"
    assert front_repair(config) is None


def test_the_front_reads_no_less_than_the_search() -> None:
    config = configured({
        "calibration": {"documents": 500, "tokens": 9000, "front": {"documents": 100}},
    })  # fmt: skip
    planned, front = planned_repair(config), front_repair(config)
    assert planned is not None
    assert front is not None
    assert planned.calibration == front.calibration  # but it fits more layers
    assert front.layers == "after"
    same = configured({"layers": "after", "calibration": {"front": {"documents": 30, "tokens": 1}}})
    assert front_repair(same) is None


@pytest.mark.parametrize(("repair", "rungs"), [(False, (60,)), ("auto", ())])
def test_nothing_is_repaired(repair: Any, rungs: tuple[int, ...]) -> None:
    config = configured(repair, rungs)
    assert planned_repair(config) is None
    assert front_repair(config) is None
