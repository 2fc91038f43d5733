"""The queue of recipes: which is next, what other islands are evaluating, how many may begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gptailor.evaluation.outcome import Documents, Evaluation
from gptailor.execution.executor import EvaluationJob, Executor, Finished, Job
from gptailor.recipe import Recipe
from gptailor.search.budget import Budget
from gptailor.search.peers import Peers
from gptailor.search.recorder import Recorder

if TYPE_CHECKING:
    from gptailor.search.scheduler import Ask, Scheduler, Tell


class EvaluationQueue:
    """Evaluates recipes here, or waits for an island that is already evaluating them.

    Args:
        executor: evaluates.
        scheduler: gives jobs to its workers.
        recorder: holds all known evaluations.
        budget: limits evaluations on the search's documents.
        peers: the other islands.

    Attributes:
        num_elsewhere: evaluations that other islands are running and this one waits for, as of the
            last time that jobs were asked for.
        arrived: other islands' evaluations on the search's documents that nobody has taken yet.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        recorder: Recorder,
        budget: Budget,
        peers: Peers,
    ) -> None:
        self.num_workers = executor.num_workers
        self.recorder = recorder
        self.budget = budget
        self.peers = peers
        self.num_elsewhere = 0
        self.arrived: list[Evaluation] = []
        self._scheduler = scheduler
        self._has_begun = False

    def look(self, *, at_once: bool = False) -> None:
        """Takes in what other islands have evaluated.

        Args:
            at_once: read the journals even if they were read a moment ago: when all islands go for
                the same recipes.
        """
        is_end = self.budget.left <= 2 * (self.num_workers + self.num_elsewhere)
        for evaluation in self.recorder.refresh(at_once=at_once or is_end):
            if evaluation.documents == "search":
                self.budget.count(evaluation, is_elsewhere=self._has_begun)
                self.arrived.append(evaluation)

    def begin(self) -> None:
        """Counts other islands' evaluations so far as old; later ones count as made meanwhile."""
        self.look()
        self._has_begun = True

    def take_arrived(self) -> list[Evaluation]:
        """What arrived since the last call."""
        arrived, self.arrived = self.arrived, []
        return arrived

    def take_known(self) -> list[Evaluation]:
        """Counts and returns what was evaluated before this search began or was resumed."""
        self.arrived = []
        known = self.recorder.evaluations("search")
        for evaluation in known:
            self.budget.count(evaluation)
        return known

    def ask_elsewhere(self) -> None:
        """Finds out how many evaluations on the search's documents the others are running."""
        self.num_elsewhere = self.peers.num_under_way("search")

    @property
    def num_allowed(self) -> int:
        """How many evaluations may begin now for all islands together to keep to the budget."""
        running = len(self._scheduler.running)
        return max(self.budget.left - running - self.num_elsewhere, 0)

    def is_elsewhere(self, recipe: Recipe, documents: Documents) -> bool:
        """Whether another island is evaluating the recipe."""
        return self.peers.is_under_way((recipe.hash, documents))

    def take(self, waiting: list[Recipe], documents: Documents, n: int) -> list[Job]:
        """Takes at most n recipes out of a list, those expected to take longest first.

        With one worker the order doesn't affect the finishing time, and stays. Recipes that another
        island is evaluating stay in the list.
        """
        if self.num_workers > 1:
            most_first = self._scheduler.more_is_longer(documents)
            waiting.sort(key=lambda r: r.num_layers, reverse=most_first)
        if self.peers.is_alone:
            taken, waiting[:] = waiting[: max(n, 0)], waiting[max(n, 0) :]
            return [EvaluationJob(recipe, documents) for recipe in taken]
        mine = [r for r in self.peers.rotated(waiting) if not self.is_elsewhere(r, documents)]
        chosen = {recipe.hash: recipe for recipe in mine[: max(n, 0)]}
        waiting[:] = [recipe for recipe in waiting if recipe.hash not in chosen]
        self.num_elsewhere = max(self.num_elsewhere, len(waiting) - len(mine) + len(chosen))
        self.peers.begin((digest, documents) for digest in chosen)
        return [EvaluationJob(recipe, documents) for recipe in chosen.values()]

    def run(self, ask: Ask, tell: Tell, is_done: Callable[[], bool]) -> None:
        """Runs the scheduler until what other islands have begun has arrived, too, or is lost.

        Args:
            ask, tell: as for `Scheduler.run`.
            is_done: True when there is nothing left to wait for.
        """
        self._scheduler.run(ask, tell)
        while self.num_elsewhere and not is_done():
            self.peers.wait()
            self._scheduler.run(ask, tell)

    def evaluate(self, recipes: Sequence[Recipe], documents: Documents) -> None:
        """Makes sure that these recipes have scores, as far as the budget goes.

        The budget applies to the search's documents only; on others everything is evaluated.
        """
        is_search = documents == "search"
        waiting, is_begun = list(recipes), False

        def count(evaluation: Evaluation, *, is_new: bool) -> None:
            if is_search:
                self.budget.count(evaluation, is_new=is_new)

        def ask(n: int) -> list[Job]:
            nonlocal is_begun
            self.look(at_once=True)
            if not (is_begun and self.peers.is_alone):  # else only `tell` brings evaluations
                known = [self.recorder.find(recipe, documents) for recipe in waiting]
                waiting[:] = [r for r, found in zip(waiting, known, strict=True) if found is None]
                for found in known:
                    if found is not None:
                        count(found, is_new=False)
            is_begun = True
            self.num_elsewhere = 0
            if is_search:
                self.ask_elsewhere()
                n = min(n, self.num_allowed)
            return self.take(waiting, documents, n)

        def tell(finished: Sequence[Finished]) -> None:
            for evaluation in self.recorder.record(finished):
                count(evaluation, is_new=True)

        def is_done() -> bool:
            return not waiting or (is_search and self.budget.left <= 0)

        self.run(ask, tell, is_done)
