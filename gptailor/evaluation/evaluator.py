"""The evaluator turns a recipe into an outcome. Each worker has one for its whole life."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal

from gptailor.config import EvaluationConfig
from gptailor.errors import GptailorError, ModelError, ResourceError, TaskError
from gptailor.evaluation.devices import is_out_of_memory
from gptailor.evaluation.lm import ResidentLM
from gptailor.evaluation.loading import load_tokenizer
from gptailor.evaluation.outcome import Cost, Documents, Outcome, Score
from gptailor.evaluation.repair.repairs import Repaired, Repairs
from gptailor.evaluation.resident import ResidentModel
from gptailor.evaluation.similarity import Similarity, measure
from gptailor.evaluation.workload import Workload, open_workloads
from gptailor.models.family import Family
from gptailor.recipe import Recipe


class Evaluator:
    """Scores recipes of one family on the tasks of one configuration.

    Args:
        family: the candidates.
        config: tasks, dtype, device.
        seed: for the choice of documents.
        comparable: refuse metrics that can't be part of an accuracy.
        workers: how many evaluators share the device.
        says: called with what is being loaded.
        note: takes what the user should know.

    Raises:
        UsageError, ModelError, ResourceError: the family or the tasks can't be used.
    """

    def __init__(
        self,
        family: Family,
        config: EvaluationConfig,
        *,
        seed: int = 0,
        comparable: bool = True,
        workers: int = 1,
        says: Callable[[str], None] = lambda text: None,
        note: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ) -> None:
        self.family = family
        says("loading the base")
        gib = config.candidates_gib
        self.resident = ResidentModel(
            family,
            dtype=config.dtype,
            device=config.device,
            candidate_bytes=None if gib is None else int(gib * 2**30),
            workers=workers,
        )
        says("loading tokenizer and tasks")
        tokenizer = load_tokenizer(family.base.folder)
        self.lm = ResidentLM(self.resident.model, tokenizer, config.batch_size)
        self.workloads = open_workloads(config, self.lm, seed=seed, comparable=comparable)
        scored = tuple(self.workloads.values())
        self.repairs = Repairs(self.resident, self.lm, scored, workers, note)
        self._results: Mapping[str, Mapping[str, Any]] = {}  # of the last evaluation

    @property
    def num_tokens(self) -> int:
        """Tokens that went through the model so far, those of repairs included."""
        return self.lm.num_tokens + self.repairs.num_tokens

    def assemble(self, recipe: Recipe) -> Repaired | None:
        """Makes the resident model that of a recipe, with its repair, which is returned.

        Raises:
            UsageError, ModelError, ResourceError: as for `ResidentModel.assemble` and `Repairs`.
            FloatingPointError: the repair's numbers are not finite.
        """
        if recipe.repair is not None:
            return self.repairs.assemble(recipe)
        self.resident.assemble(recipe)
        return None

    def evaluate(self, recipe: Recipe, documents: Documents = "search") -> Outcome:
        """Assembles and scores one recipe; never raises for what the recipe itself causes.

        Returns:
            `ok`, `infeasible` with the reason (it can't be built, or its results are not finite),
            or `failed` with the traceback.

        Raises:
            ResourceError: memory or disk is exhausted, which is not the recipe's fault.
            ModelError: a candidate's file changed, so nothing read since then is valid.
        """
        began, forward_s, num_tokens = time.perf_counter(), self.lm.forward_s, self.num_tokens
        workload = self._workload(documents)
        assembled = began
        scores: tuple[Score, ...] = ()
        self._results = {}
        status: Literal["ok", "infeasible", "failed"] = "ok"
        reason = ""
        try:
            self.assemble(recipe)
            assembled = time.perf_counter()
            self._results = workload.run(self.lm)
            scores = workload.scores(self._results)
        except ResourceError:
            raise
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise ResourceError(
                    f"Out of memory while scoring {recipe.point}: nothing is recorded for it; "
                    "resume with a smaller evaluation.batch_size or fewer workers."
                ) from error
            status, reason = "failed", traceback.format_exc()
        except TaskError:
            status, reason = "failed", traceback.format_exc()
        except (GptailorError, FloatingPointError) as error:
            status, reason = "infeasible", str(error)
        except Exception:
            status, reason = "failed", traceback.format_exc()
        self.resident.family.check_intact()  # a changed file is not what the recipe names
        cost = Cost(
            seconds=time.perf_counter() - began,
            assemble_s=assembled - began,
            forward_s=self.lm.forward_s - forward_s,
            num_documents=workload.num_documents if status == "ok" else 0,
            num_tokens=self.num_tokens - num_tokens,
        )
        accuracy = weighted_mean(scores) if status == "ok" else None
        return Outcome(status, accuracy, scores, reason, cost)

    def all_scores(self, documents: Documents = "search") -> tuple[Score, ...]:
        """Every metric of the last evaluation; see `Workload.all_scores`."""
        return self._workload(documents).all_scores(self._results)

    def _workload(self, documents: Documents) -> Workload:
        return self.workloads["search" if documents == "front" else documents]

    def similarity(
        self, model: str, dtype: str, far: Callable[[int, int], None] = lambda done, of: None
    ) -> Similarity:
        """Measures the layers of one dense candidate on contexts of the search documents.

        `far` is called with the number of contexts done and the total.

        Raises:
            ResourceError: memory is exhausted.
            ModelError: its layers give numbers that are not finite.
        """
        try:
            found = measure(self.resident, self.lm, self.workloads["search"], model, dtype, far)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise ResourceError(
                    "Out of memory while measuring the control arms: use a smaller "
                    "evaluation.batch_size."
                ) from error
            raise
        if not found.is_finite:
            raise ModelError(
                f"{self.family.candidates[model].folder}: the layers of {model} give numbers that "
                "are not finite: leave it out, or set another evaluation.dtype."
            )
        return found


def weighted_mean(scores: tuple[Score, ...]) -> float:
    """The accuracy objective: the weighted mean of the tasks' scores that count."""
    counted = [s for s in scores if s.counts]  # the others may be infinite
    return sum(s.value * s.weight for s in counted) / sum(s.weight for s in counted)
