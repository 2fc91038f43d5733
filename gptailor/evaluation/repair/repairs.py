"""Repairs of a family's recipes: documents, teachers and repaired layers, each computed once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from gptailor.errors import ResourceError, UsageError
from gptailor.evaluation.device_memory import device_memory
from gptailor.evaluation.devices import give_back_memory, is_out_of_memory
from gptailor.evaluation.lm import ResidentLM
from gptailor.evaluation.repair.layer_error import LayerError
from gptailor.evaluation.repair.reading import (
    BATCH_TOKENS,
    Reading,
    open_calibration_tasks,
    read_calibration,
)
from gptailor.evaluation.repair.repairer import Repairer
from gptailor.evaluation.repair.targets import Lesson, Teachers, dense
from gptailor.evaluation.resident import ResidentModel
from gptailor.evaluation.workload import Workload
from gptailor.patience import Say
from gptailor.recipe import Recipe
from gptailor.recipe.repair import BY_TASK, TEXT, CalibrationDocuments, Repair

_SHARE = 16
"""Repaired lower parts may take this part of the device's free memory."""


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    Attributes:
        repair: with named teachers and the documents' digest.
        changed: output layer → its new parameters, as its module names them.
        errors: of each layer that was fitted.
        num_tokens: tokens that were read.
    """

    repair: Repair
    changed: Mapping[int, Mapping[str, nn.Parameter]]
    errors: tuple[LayerError, ...]
    num_tokens: int


class Repairs:
    """Prepares and computes repairs.

    Args:
        resident: assembles recipes.
        lm: runs them.
        scored: the workloads that models are scored on, which no repair may read.
        workers: how many share the machine's memory.
        note: takes what the user should know.

    Attributes:
        batch_tokens: tokens of a batch; fewer after memory was exhausted.
    """

    def __init__(
        self,
        resident: ResidentModel,
        lm: ResidentLM,
        scored: Sequence[Workload] = (),
        workers: int = 1,
        note: Say = lambda text: print(text, file=sys.stderr),
    ) -> None:
        self._resident = resident
        self._lm = lm
        self._scored = tuple(scored)
        self._note = note
        self.batch_tokens = BATCH_TOKENS
        free_bytes = device_memory(resident.device).free_bytes
        self._cache_bytes = free_bytes // (_SHARE * workers)
        self._earlier_tokens = 0
        self._start_afresh()
        self._readings: dict[CalibrationDocuments, Reading] = {}
        self._best: dict[tuple[CalibrationDocuments, tuple[str, ...]], Mapping[str, str]] = {}

    def _start_afresh(self) -> None:
        """Forgets all states and repaired layers."""
        self._teachers = Teachers(self._resident, self._lm)
        self._repairer = Repairer(self._resident, self._lm, self._cache_bytes)

    @property
    def num_tokens(self) -> int:
        """Tokens that went through layers of students so far, in units of the whole model."""
        return self._earlier_tokens + self._repairer.num_tokens

    def reading(self, documents: CalibrationDocuments) -> Reading:
        """What a calibration reads, with or without its digest; raises like `read_calibration`."""
        if documents not in self._readings:
            found = read_calibration(
                documents, self._lm, self._resident.device, self._scored, self.batch_tokens
            )
            self._readings[documents] = found
            self._readings[replace(documents, digest=found.digest)] = found
        return self._readings[documents]

    def resolved(self, recipe: Recipe) -> Recipe:
        """The recipe with the best teacher named for each task, and its documents' digest.

        Where a repair leaves the teachers open, each candidate answers the calibration documents
        of each task, and the best one teaches it; the base teaches the text.

        Raises:
            UsageError: as for `read_calibration`.
        """
        repair = recipe.repair
        if repair is None:
            return recipe
        reading = self.reading(repair.calibration)
        documents = replace(repair.calibration, digest=reading.digest)
        teachers = repair.teachers
        if teachers == BY_TASK:
            key = repair.calibration, tuple(recipe.models)
            if key not in self._best:
                self._best[key] = self._best_by_task(recipe, repair.calibration)
            best = self._best[key]
            teachers = tuple((group, best[group]) for group in repair.calibration.groups)
        return recipe.with_repair(replace(repair, calibration=documents, teachers=teachers))

    def assemble(self, recipe: Recipe, says: Say = lambda text: None) -> Repaired:
        """Makes the resident model that of a recipe with a repair, resolved or not.

        Where memory is exhausted, this repair and all later ones run smaller batches.

        Args:
            recipe: the recipe.
            says: called with what is being done.

        Raises:
            UsageError, ModelError: as for `resolved`, `ResidentModel.assemble` and `Repairer`.
            ResourceError: the same, or memory is exhausted even if sequences run one by one.
            FloatingPointError: the repair's numbers are not finite.
        """
        says("choosing teachers")
        recipe = self.resolved(recipe)
        assert recipe.repair is not None
        documents = recipe.repair.calibration
        while True:
            try:
                says("running teachers")
                lessons = self.lessons(recipe)  # assembles the teachers
                says("fitting layers")
                self._resident.assemble(recipe)
                return self.apply(recipe, lessons)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                lessons = []
                fewer = self.reading(documents).smaller_batch(self.batch_tokens)
                if fewer is None:
                    raise ResourceError(
                        "Out of memory while a repair was computed, though it ran sequences one by "
                        "one: read fewer documents (space.repair.calibration.documents in a "
                        "search, repair.calibration.documents in a recipe), or use fewer workers."
                    ) from error
            self._use_batches(fewer)  # only now has the error let go of what was in memory

    def _use_batches(self, batch_tokens: int) -> None:
        """Batches have so many tokens from now on."""
        self._note(
            "Out of memory while a repair was computed: from now on, batches have "
            f"{batch_tokens:,} tokens instead of {self.batch_tokens:,}, which can change the last "
            "bits of results."
        )
        self.batch_tokens = batch_tokens
        self._earlier_tokens = self.num_tokens
        self._cache_bytes //= 2
        self._start_afresh()
        again = {id(kept): kept.in_batches(batch_tokens) for kept in self._readings.values()}
        self._readings = {key: again[id(kept)] for key, kept in self._readings.items()}
        give_back_memory()

    def check(self, whole: Recipe, reading: Reading) -> None:
        """Raises a `ModelError` if the architecture of a whole candidate can't be repaired."""
        self._repairer.look(whole, reading)

    def lessons(self, recipe: Recipe) -> list[Lesson]:
        """What teachers have to say about a resolved recipe; call it before assembling it."""
        assert recipe.repair is not None
        reading = self.reading(recipe.repair.calibration)
        lessons = self._teachers.lessons(recipe, reading)
        base = dense(recipe, recipe.base, self._resident.family.num_layers)
        self._repairer.look(base, reading)
        return lessons

    def apply(self, recipe: Recipe, lessons: Sequence[Lesson]) -> Repaired:
        """Repairs the assembled model of a resolved recipe in place; raises like `Repairer`."""
        repair = recipe.repair
        assert repair is not None
        reading = self.reading(repair.calibration)
        done = self._repairer.repair(recipe, lessons)
        return Repaired(repair, done.changed, done.errors, reading.num_tokens)

    def weights(self, recipe: Recipe, repaired: Repaired) -> dict[str, torch.Tensor]:
        """Name in the stitched model's files → repaired weight, as it runs."""
        return {
            self._resident.file_name(recipe.src_layers[out_layer], out_layer, name): weight.data
            for out_layer, changed in repaired.changed.items()
            for name, weight in changed.items()
        }

    def _best_by_task(self, recipe: Recipe, documents: CalibrationDocuments) -> Mapping[str, str]:
        """Group → the candidate that answers its calibration documents best."""
        best = {TEXT: recipe.base}
        if not documents.tasks:
            return best
        workload = open_calibration_tasks(documents, self._lm)
        workload.check_requests(self._lm)
        values: dict[str, dict[str, float]] = {}
        for model in recipe.models:
            if model not in self._resident.family.candidates:
                continue
            self._resident.assemble(dense(recipe, model, self._resident.family.num_layers))
            for score in workload.scores(workload.run(self._lm)):
                is_lower = workload.is_lower_better(score.task)
                values.setdefault(score.task, {})[model] = -score.value if is_lower else score.value
        if not values:
            raise UsageError("The repair has no model that could teach.")
        for task, of_model in values.items():
            best[task] = max(of_model, key=of_model.__getitem__)
        return best
