"""The two search loops: batch by batch, or recipe by recipe.

Neither depends on the algorithm that chooses the recipes. A batch ends with its slowest evaluation,
and its content depends on seed and scores alone. In the asynchronous loop no worker ever waits for
another, and the order in which evaluations end influences what is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gptailor.execution.executor import Finished, Job
from gptailor.recipe import Recipe
from gptailor.search.migration import Migration
from gptailor.search.objectives import Objectives
from gptailor.search.queue import EvaluationQueue
from gptailor.search.searcher import Scored, Searcher


class Loop:
    """What both loops have in common.

    Args:
        queue: evaluates.
        objectives: computes objectives from evaluations.
        note: takes a sentence for the user.
    """

    def __init__(
        self, queue: EvaluationQueue, objectives: Objectives, note: Callable[[str], None]
    ) -> None:
        self._queue = queue
        self._objectives = objectives
        self._note = note
        self._migration = Migration()

    def _scored(self, recipe: Recipe) -> Scored:
        return Scored(recipe, self._objectives.of(self._queue.recorder.find(recipe)))

    def _migrants(self) -> list[Scored]:
        """What arrived from other islands; with objectives if it may enter the population."""
        return self._migration.chosen([self._scored(e.recipe) for e in self._queue.take_arrived()])

    def _note_complete(self) -> None:
        self._note("The space has no more recipes: the search is complete.")


class GenerationalLoop(Loop):
    """Evaluates batch by batch."""

    def run(self, arms: Sequence[Recipe], make: Callable[[Sequence[Recipe]], Searcher]) -> None:
        """Evaluates the control arms, then batches until the budget is used.

        Args:
            arms: the control arms.
            make: makes the searcher from the arms that have scores.

        Raises:
            GptailorError: see `Recorder.check_scored`.
        """
        queue, budget = self._queue, self._queue.budget
        if not queue.peers.is_alone:  # their timing can't be replayed, so the search can't either
            queue.arrived = queue.take_known()
        queue.evaluate(arms, "search")
        queue.recorder.check_scored(arms)
        searcher = make([arm for arm in arms if self._scored(arm).objectives is not None])
        has_scores = False
        while budget.left > 0:
            searcher.tell(self._migrants())
            asked = [proposal.recipe for proposal in searcher.ask()]
            if not asked:
                self._note_complete()
                break
            new = [recipe for recipe in asked if recipe not in budget]
            queue.evaluate(new[: budget.left], "search")
            scored = [self._scored(recipe) for recipe in asked]
            has_scores |= any(one.objectives is not None for one in scored)
            if not has_scores:
                queue.recorder.check_scored([r for r in asked if queue.recorder.find(r)])
            searcher.tell(scored)


class AsynchronousLoop(Loop):
    """Evaluates recipe by recipe."""

    def run(self, arms: Sequence[Recipe], make: Callable[[Sequence[Recipe]], Searcher]) -> None:
        """Evaluates the control arms and what the searcher asks for until the budget is used.

        Args:
            arms: the control arms.
            make: makes the searcher from the control arms, scored or not.

        Raises:
            GptailorError: see `Recorder.check_scored`.
        """
        queue, budget = self._queue, self._queue.budget
        searcher = make(arms)
        searcher.tell([Scored(arm, None) for arm in arms])  # they come first, and only once
        searcher.tell([self._scored(e.recipe) for e in queue.take_known()])
        waiting, shared = list(arms), {recipe.hash for recipe in arms}

        def ask(n: int) -> list[Job]:
            queue.look(at_once=any(recipe.hash in shared for recipe in waiting))
            searcher.tell(self._migrants())
            waiting[:] = [recipe for recipe in waiting if recipe not in budget]
            queue.ask_elsewhere()
            allowed = queue.num_allowed
            mine = sum(not queue.is_elsewhere(recipe, "search") for recipe in waiting)
            is_end = allowed - mine <= queue.num_workers  # ask for all: the longest goes first
            wanted = allowed - mine if is_end else min(n, allowed) - mine
            waiting.extend(proposal.recipe for proposal in searcher.ask(wanted))
            return queue.take(waiting, "search", min(n, allowed))

        def tell(finished: Sequence[Finished]) -> None:
            ended = queue.recorder.record(finished)
            new = [evaluation for evaluation in ended if evaluation.recipe not in budget]
            for evaluation in new:
                budget.count(evaluation, is_new=True)
            searcher.tell([self._scored(e.recipe) for e in new])
            queue.recorder.check_scored(arms)

        if budget.left > 0:
            queue.run(ask, tell, lambda: budget.left <= 0)
            evaluated = queue.recorder.evaluations("search")
            queue.recorder.check_scored([e.recipe for e in evaluated])
            if budget.left > 0:
                self._note_complete()
