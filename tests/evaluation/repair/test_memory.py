"""Memory that is exhausted during a repair: smaller batches, then an error, never a wrong model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptailor.errors import ResourceError
from gptailor.evaluation.evaluator import Evaluator
from gptailor.evaluation.repair import repairer, repairs, replay
from gptailor.evaluation.repair.reading import BATCH_TOKENS, Reading
from gptailor.evaluation.repair.solve import RidgeRegression
from gptailor.recipe import CalibrationDocuments, CalibrationTask, Repair
from gptailor.recipe.repair import UNCUT
from tests.evaluation.repair.test_repairer import (
    MIXED,
    assembled,
    assert_equal,
    evaluator_of,
    recipe,
)

ROOM = 300
"""Tokens of the largest batch that the tests' layers can run."""


@pytest.fixture
def documents(tasks_dir: Path) -> CalibrationDocuments:
    tasks = CalibrationTask("t_differing"), CalibrationTask("t_rolling")
    return CalibrationDocuments(tasks, str(tasks_dir), documents=24)


def noted(evaluator: Evaluator) -> list[str]:
    """A list of what the evaluator's repairs note from now on."""
    notes: list[str] = []
    evaluator.repairs._note = notes.append
    return notes


def batches(found: Reading) -> list[tuple[str, Any, Any]]:
    return [(b.group, b.input_BT.tolist(), b.counts_BT.tolist()) for b in found.batches]


@pytest.mark.parametrize("batch_tokens", [512, 64, 1])
def test_smaller_batches_are_those_of_smaller_batches_from_the_start(
    models: dict[str, str],
    tasks_dir: Path,
    documents: CalibrationDocuments,
    batch_tokens: int,
) -> None:
    evaluator = evaluator_of(models, tasks_dir)
    whole = evaluator.repairs.reading(documents)
    evaluator.repairs.batch_tokens = batch_tokens
    evaluator.repairs._readings.clear()
    small = evaluator.repairs.reading(documents)
    assert batches(whole.in_batches(batch_tokens)) == batches(small)
    assert whole.in_batches(batch_tokens).num_run == small.num_run
    assert batches(small.in_batches(BATCH_TOKENS)) == batches(whole)
    assert (small.digest, small.num_tokens) == (whole.digest, whole.num_tokens)


def test_the_next_smaller_batch_splits_one(
    models: dict[str, str], tasks_dir: Path, documents: CalibrationDocuments
) -> None:
    found = evaluator_of(models, tasks_dir).repairs.reading(documents)
    sizes = [BATCH_TOKENS]
    while (size := found.smaller_batch(sizes[-1])) is not None:
        found = found.in_batches(size)
        several = [b.input_BT.numel() for b in found.batches if len(b.input_BT) > 1]
        assert all(count <= size for count in several)
        sizes.append(size)
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(BATCH_TOKENS % size == 0 for size in sizes)
    assert all(len(batch.input_BT) == 1 for batch in found.batches)


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory.")


def other_machine() -> Exception:
    return RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


def limit(
    monkeypatch: pytest.MonkeyPatch, room: int, error: Callable[[], Exception] = out_of_memory
) -> None:
    """Layers of students have no room for batches with more tokens."""
    run_layer = replay.run_layer

    def limited(layer: Any, hidden_BTH: torch.Tensor, given: Any) -> torch.Tensor:
        if hidden_BTH.shape[0] > 1 and hidden_BTH[..., 0].numel() > room:
            raise error()
        return run_layer(layer, hidden_BTH, given)

    monkeypatch.setattr(repairer, "run_layer", limited)


@pytest.mark.parametrize(
    ("error", "teachers"), [(out_of_memory, "red"), (other_machine, UNCUT), (MemoryError, "red")]
)
def test_smaller_batches_are_tried(
    models: dict[str, str],
    tasks_dir: Path,
    documents: CalibrationDocuments,
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[], Exception],
    teachers: str,
) -> None:
    """The result is that of the smaller batches; later repairs use these from the start."""
    repair = Repair(documents, "all", teachers)
    mended = [recipe(models, *layers, repair=repair) for layers in (MIXED, MIXED[1:])]
    plain = evaluator_of(models, tasks_dir)
    before = assembled(plain, mended[0])  # with room for all
    notes = noted(plain)
    limit(monkeypatch, ROOM, error)
    found = assembled(plain, mended[1])
    assert plain.repairs.batch_tokens == 256
    assert len(notes) == 2
    assert "batches have 256 tokens instead of 512" in notes[-1]
    found_again = assembled(plain, mended[0])
    assert len(notes) == 2
    assert plain.repairs.num_tokens > 0
    monkeypatch.undo()
    monkeypatch.setattr(repairs, "BATCH_TOKENS", 256)
    small = evaluator_of(models, tasks_dir)
    assert small.repairs.batch_tokens == 256
    assert_equal(assembled(small, mended[1]), found)
    assert_equal(assembled(small, mended[0]), found_again)
    for one, other in zip(before.errors, found_again.errors, strict=True):
        assert (one.before, one.after) == pytest.approx((other.before, other.after), rel=1e-4)


def test_memory_that_is_too_small_for_a_system_is_an_error(
    models: dict[str, str],
    tasks_dir: Path,
    documents: CalibrationDocuments,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the next recipes are right, as if nothing had happened."""
    mended = recipe(models, *MIXED, repair=Repair(documents, "gaps", "red"))
    evaluator = evaluator_of(models, tasks_dir)
    notes = noted(evaluator)
    solve = RidgeRegression.solve

    def full(system: RidgeRegression) -> torch.Tensor:
        raise out_of_memory()

    monkeypatch.setattr(RidgeRegression, "solve", full)
    with pytest.raises(ResourceError, match=r"space\.repair\.calibration\.documents"):
        evaluator.evaluate(mended)
    smallest = evaluator.repairs.batch_tokens
    assert f"batches have {smallest} tokens" in notes[-1]
    assert all(len(b.input_BT) == 1 for b in evaluator.repairs.reading(documents).batches)
    monkeypatch.setattr(RidgeRegression, "solve", solve)
    plain = recipe(models, *MIXED)
    evaluator.assemble(plain)
    evaluator.resident.check_pointers(plain)
    monkeypatch.setattr(repairs, "BATCH_TOKENS", smallest)
    assert_equal(assembled(evaluator, mended), assembled(evaluator_of(models, tasks_dir), mended))


def test_other_errors_are_not_tried_again(
    models: dict[str, str],
    tasks_dir: Path,
    documents: CalibrationDocuments,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluator = evaluator_of(models, tasks_dir)
    notes = noted(evaluator)
    limit(monkeypatch, ROOM, lambda: RuntimeError("expected scalar type"))
    outcome = evaluator.evaluate(recipe(models, *MIXED, repair=Repair(documents, "all", "red")))
    assert outcome.status == "failed"
    assert "expected scalar type" in outcome.reason
    assert notes == []
    assert evaluator.repairs.batch_tokens == BATCH_TOKENS
