"""All known evaluations, made durable: nothing counts before it is in the archive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptailor.evaluation.outcome import Documents, Evaluation, Outcome
from gptailor.execution.executor import EvaluationJob, Finished
from gptailor.execution.slurm.exit_code_file import note_gain
from gptailor.models.family import Family
from gptailor.recipe import Recipe
from gptailor.run.archive import Archive
from gptailor.search.peers import Peers
from gptailor.stitching.plan import count_parameters

if TYPE_CHECKING:
    from gptailor.search.progress import Progress


class Recorder:
    """All known evaluations of a search: the archive's, and those from other islands.

    Args:
        archive: of the run folder, open for writing.
        family: used to count parameters.
        peers: are told what was evaluated here, and asked what was evaluated there.
        progress: is told of evaluations that failed.

    Attributes:
        failures: (worker, recipe's point, reason) of each evaluation that failed.
        num_gained: what this process added to the archive: evaluations, on any documents, and
            measured candidates.
    """

    def __init__(self, archive: Archive, family: Family, peers: Peers, progress: Progress) -> None:
        self.archive = archive
        self.failures: list[tuple[int, str, str]] = []
        self.num_gained = 0
        self._family = family
        self._peers = peers
        self._progress = progress
        self._known = {(e.recipe.hash, e.documents): e for e in archive.evaluations()}

    def find(self, recipe: Recipe, documents: Documents = "search") -> Evaluation | None:
        """The evaluation of a recipe on these documents, from any island; None if there is none."""
        return self._known.get((recipe.hash, documents))

    def evaluations(self, documents: Documents) -> list[Evaluation]:
        """All known evaluations on these documents, in the order in which they ended."""
        found = [e for e in self._known.values() if e.documents == documents]
        return sorted(found, key=lambda e: e.finished_at)

    def refresh(self, *, at_once: bool) -> list[Evaluation]:
        """Other islands' evaluations that were not known here; see `Peers.refresh`."""
        new = []
        for evaluation in self._peers.refresh(at_once=at_once):
            key = evaluation.recipe.hash, evaluation.documents
            if key not in self._known:
                self._known[key] = evaluation
                new.append(evaluation)
        return new

    def record(self, finished: Sequence[Finished]) -> list[Evaluation]:
        """Makes finished evaluations durable, all at once, and tells the other islands."""
        rows, workers = [], []
        for f in finished:
            if isinstance(f.job, EvaluationJob) and isinstance(f.result, Outcome):
                parameters = count_parameters(f.job.recipe, self._family)
                rows.append((f.job.recipe, f.job.documents, parameters, f.result))
                workers.append(f.worker)
        evaluations = self.archive.record_all(rows)
        self.note_gain(len(evaluations))
        self._peers.publish(evaluations)
        for worker, evaluation in zip(workers, evaluations, strict=True):
            self._known.setdefault((evaluation.recipe.hash, evaluation.documents), evaluation)
            if evaluation.outcome.status == "failed":
                last = evaluation.outcome.reason.strip().splitlines()[-1]
                self.failures.append((worker, evaluation.recipe.point, last))
                self._progress.note(f"The evaluation of {evaluation.recipe.point} failed: {last}")
        return evaluations

    def note_gain(self, count: int) -> None:
        """Counts what has become durable, also for the supervisor that may restart this process."""
        self.num_gained += count
        note_gain(count)

    def check_scored(self, recipes: Sequence[Recipe]) -> None:
        """Raises the first recipe's error if all of these recipes ended without a score.

        Further ones would end the same way: to continue or restart would only cost time.
        """
        ended = [self.find(recipe) for recipe in recipes]
        outcomes = [None if e is None else e.outcome for e in ended]
        first = next((o for o in outcomes if o is not None), None)
        if first is not None and all(o is not None and o.accuracy is None for o in outcomes):
            raise first.as_error()
