"""Measures layer similarities of every candidate, for the control arms that need them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from gptailor.evaluation.similarity import Similarity
from gptailor.execution.executor import Finished, Job, SimilarityJob
from gptailor.run.journal_entry import Measured
from gptailor.search.progress import Progress
from gptailor.search.queue import EvaluationQueue

_KEY = "similarity"


def measure_similarities(
    models: Sequence[str],
    queue: EvaluationQueue,
    progress: Progress,
    doing: Callable[[], str],
) -> dict[str, Similarity]:
    """Returns each candidate's layer similarities, measured once per run and kept in the archive.

    Args:
        models: the candidates' names.
        queue: its workers measure; other islands measure, too.
        progress: is told what is being measured.
        doing: returns what workers are doing now.
    """
    archive, peers = queue.recorder.archive, queue.peers
    kept = json.loads(archive.get_meta(_KEY) or "{}")
    missing, begun = list(models), set[str]()

    def ask(n: int) -> list[Job]:
        queue.look(at_once=True)
        for model, similarity in peers.similarities.items():
            kept.setdefault(model, similarity.to_dict())
        missing[:] = [model for model in missing if model not in kept and model not in begun]
        free = [m for m in missing if not peers.is_under_way((m, "similarity"))]
        queue.num_elsewhere = len(missing) - len(free)
        chosen = peers.rotated(free)[:n]
        begun.update(chosen)
        peers.begin((model, "similarity") for model in chosen)
        return [SimilarityJob(model) for model in chosen]

    def tell(finished: Sequence[Finished]) -> None:
        measured = [
            Measured(one.job.model, one.result)
            for one in finished
            if isinstance(one.job, SimilarityJob) and isinstance(one.result, Similarity)
        ]
        kept.update((one.model, one.similarity.to_dict()) for one in measured)
        archive.set_meta(_KEY, json.dumps(kept))
        queue.recorder.note_gain(len(measured))
        peers.publish_similarities(measured)

    def what() -> str:
        done = sum(model in kept for model in models)
        return f"Measuring what layers do, {done} of {len(models)} candidates done"

    new = [model for model in models if model not in kept]
    if new:
        progress.note(f"Measuring what the layers of {', '.join(new)} do, for the control arms.")
    with progress.step(what, doing):
        queue.run(ask, tell, lambda: all(model in kept for model in models))
    archive.set_meta(_KEY, json.dumps(kept))
    return {model: Similarity.from_dict(kept[model]) for model in models}
