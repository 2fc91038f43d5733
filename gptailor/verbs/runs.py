"""The verbs for a search: run it, report on it, the demo.

This module connects the parts: configuration, family, executor, archive, report.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from gptailor.evaluation.family import open_family
from gptailor.patience import Say, slowly
from gptailor.run.layout import CONFIG, ENVIRONMENT
from gptailor.verbs.checks import check_place, check_space

if TYPE_CHECKING:
    from gptailor.config import Config
    from gptailor.evaluation.outcome import Evaluation
    from gptailor.execution.executor import Executor, WorkloadInfo
    from gptailor.execution.job_monitor import JobMonitor
    from gptailor.execution.mpi.crew import Crew
    from gptailor.execution.mpi.launcher import Choice
    from gptailor.execution.stop import Stop
    from gptailor.models.family import Family
    from gptailor.search.progress import Progress

LOCK_WAIT_S = 120.0
"""How long a supervised search waits for a lock that a dead node may have left."""


def search(
    config: Config | str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    workers: int = 1,
    executor: Choice = "auto",
    log_json: bool = False,
    island: tuple[int, int] | None = None,
    io: str | None = None,
    stage: str | None = None,
) -> Path:
    """Searches, scores the front on the holdout, writes the report; returns the run folder.

    Args:
        config: a `search.yaml`, or a configuration that was read from one.
        overrides: `key.path=value`, if `config` is a file.
        resume: continue the run in the output folder (or begin it).
        workers: processes on this machine.
        executor: "local": this machine; "mpi": the other ranks of an MPI program; "auto": those,
            if srun or mpirun started this process as one of several.
        log_json: write the ranks' logs as JSON lines, too.
        island: (I, K) for number I of K searches that share the run folder; None for a search on
            its own.
        io: how weights are read: auto, mmap, pread or direct; None for the value of GPTAILOR_IO
            where they are read.
        stage: a folder on each node's own disk, to which the candidates are copied before they are
            opened; None for the value of GPTAILOR_STAGE on the node. In an MPI program rank 0's
            `io` and `stage` count for all.

    Raises:
        UsageError: the configuration is wrong, the output folder already holds a run, or the
            islands of the run search something else.
        ModelError: a model or tokenizer is unusable.
        ResourceError: memory or disk is exhausted; what was evaluated is kept.
        StoppedEarly: a worker died, or a signal asked to stop; `resume=True` continues.

    Side effect: installs a handler for SIGUSR2 that ends the search cleanly (`Requeue`); in an MPI
        program for SIGTERM and SIGINT, too. Only rank 0 of an MPI program returns.
    """
    from gptailor.execution.mpi.launcher import join
    from gptailor.execution.stop import Stop, job_ends_at

    stop = Stop(job_ends_at())
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        stop.install(signal.SIGUSR2)
    channel = join(executor)
    if channel is None:
        return _search(config, overrides, resume, workers, island, io, stage, stop)
    if channel.rank > 0:
        from gptailor.execution.mpi.worker import run_worker

        run_worker(channel)
    from gptailor.execution.mpi.crew import Crew

    if is_main:
        stop.install()
    with Crew(channel, stop, log_json=log_json) as crew:
        return _search(config, overrides, resume, workers, island, io, stage, stop, crew)


def _search(
    config: Config | str | Path,
    overrides: Sequence[str],
    resume: bool,
    workers: int,
    island: tuple[int, int] | None,
    io: str | None,
    stage: str | None,
    stop: Stop,
    crew: Crew | None = None,
) -> Path:
    """Searches in this process, or with the crew of an MPI program."""
    from gptailor.config import Config, read_config
    from gptailor.execution.job_monitor import JobMonitor
    from gptailor.execution.local import open_executor
    from gptailor.report import write_report
    from gptailor.run.archive import Archive
    from gptailor.run.resume import check_resumable
    from gptailor.search.island_peers import open_islands
    from gptailor.search.progress import Progress
    from gptailor.search.run import Run
    from gptailor.verbs.as_begun import as_begun
    from gptailor.verbs.watched_run import WatchedRun

    if not isinstance(config, Config):
        config = read_config(config, overrides)
    config = as_begun(config)
    output = Path(config.output)
    place = check_place(config, resume, island)
    log = (lambda text: None) if crew is None else crew.log.say
    config, family = _opened(config, place, io, _say if crew is None else crew.say)
    progress = Progress(config.search.evaluations, family.num_layers, log=log)
    number = None if island is None else island[0]
    with progress, JobMonitor(stop, config.search.evaluations, output, number) as monitor:
        _introduce(config, family, progress)
        if crew is None:
            executor = open_executor(config, workers, io=io, stage=stage)
        else:
            executor = _joined(crew, config, family, place, monitor, io, stage)
        try:
            progress.watch(lambda: monitor.loading(executor.words()))
            config, info = _begun(config, family, place, executor, progress, island is not None)
            with Archive(place) as archive, ExitStack() as stack:
                check_resumable(archive, config, family, info.digest)
                others = stack.enter_context(open_islands(output, island, archive, progress.note))
                monitor.begin()
                _note_run(config, info, place, progress)

                def tick(run: Run) -> None:
                    monitor.tick(WatchedRun(run))

                run = Run(config, family, archive, executor, progress, stop, tick, others)
                progress.watch(lambda: tick(run))
                run.search()
                run.repair_front(worth_a_holdout(run.evaluations("search")))
                scored = [*run.evaluations("search"), *run.evaluations("front")]
                chosen = [e.recipe for e in worth_a_holdout(scored)]
                plain = [recipe.with_repair(None) for recipe in chosen]
                run.holdout([*chosen, *plain])
        finally:
            executor.close()
        with progress.step("Writing the report"):
            write_report(output)
    return output


def _opened(config: Config, place: Path, io: str | None, say: Say) -> tuple[Config, Family]:
    """Opens the candidates, after making the refitted one if the search has one."""
    from gptailor.execution.slurm.exit_code_file import is_supervised
    from gptailor.run.archive import Archive
    from gptailor.verbs.preparation import prepared

    # now, not after the models are loaded; but the lock of a dead node may stay for a while
    wait_s = LOCK_WAIT_S if is_supervised() else 0.0
    Archive.check_not_in_use(place, wait_s=wait_s, note=say)
    config = prepared(config, io, say)
    with slowly(f"Opening {len(config.models)} candidates", say):
        family = open_family(config.models, config.base, io)
        check_space(config, family)
    return config, family


def _joined(
    crew: Crew,
    config: Config,
    family: Family,
    place: Path,
    monitor: JobMonitor,
    io: str | None,
    stage: str | None,
) -> Executor:
    """Makes the crew the workers of a search; the job's record starts with their list."""
    from gptailor.execution.logs import log_path
    from gptailor.execution.mpi.executor import MpiExecutor

    def begins() -> None:
        monitor.begin(log=log_path(0), workers=crew.workers)

    crew.join(config, family, place, begins, io=io, stage=stage)
    return MpiExecutor(crew)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _note_run(config: Config, info: WorkloadInfo, place: Path, progress: Progress) -> None:
    """Writes config.yaml and environment.json; notes documents and run folder."""
    from gptailor.config import config_yaml

    output = Path(config.output)
    _write_text(output / CONFIG, config_yaml(config))
    _write_text(output / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
    documents = ", ".join(f"{n} {name}" for name, n in info.num_documents.items())
    progress.note(f"Documents: {documents}. Run folder: {place}.")


def _introduce(config: Config, family: Family, progress: Progress) -> None:
    """Notes what is searched, and what the user should know about it."""
    from gptailor.evaluation.habits import habits
    from gptailor.models.ends import announcements

    what = f"Searching {family.num_layers} layers of {len(family.candidates)} models."
    told = (*config.notes, *family.notes, *habits(family), what)
    for text in (*told, *announcements(family.candidates.values())):
        progress.note(text)


def _begun(
    config: Config,
    family: Family,
    place: Path,
    executor: Executor,
    progress: Progress,
    is_island: bool,
) -> tuple[Config, WorkloadInfo]:
    """Has the workers load what they need; returns the configuration with the chosen dtype.

    This happens before the archive is made, so a wrong task leaves no run behind.
    """
    from gptailor.run.dtype import choose_dtype

    def doing() -> str:
        texts = list(dict.fromkeys(executor.words().values()))
        return "; ".join([*texts[:2], *(["…"] if len(texts) > 2 else [])])

    many = executor.num_workers > 1
    what = f"Starting {executor.num_workers} workers" if many else "Starting"
    with progress.step(what):
        abilities = executor.abilities()
    choice = choose_dtype(config, family, place, abilities, is_island=is_island)
    progress.note(choice.sentence)
    with progress.step(what, doing):
        executor.load(choice.dtype)
        return config.computed_in(choice.dtype), executor.workload()


def worth_a_holdout(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """All dense candidates, and for each size the best model, stitched model and control arm."""
    ok = [e for e in evaluations if e.outcome.accuracy is not None]
    arms, stitched = [e for e in ok if e.arms], [e for e in ok if not e.arms]
    # failed ones, too: "kept" on the holdout is relative to the best dense candidate there
    dense = [e for e in evaluations if any(arm.startswith("dense:") for arm in e.arms)]
    chosen = (*_front(ok), *_front(arms), *_front(stitched), *dense)
    return list({e.recipe.hash: e for e in chosen}.values())


def report(
    run: str | Path, out: str | Path | None = None, *, note: Say = lambda text: None
) -> Path:
    """Writes the report of a run (front, figures, page); returns the page's path.

    `note` takes a line if this takes long.
    """
    from gptailor.report import write_report

    with slowly("Writing the report", note):
        return write_report(Path(run), None if out is None else Path(out))


def demo(out: str | Path = "gptailor-demo", *, workers: int = 1) -> Path:
    """Runs the whole workflow on the family that ships with the package; returns the run folder.

    Searches, reports, and stitches the best model with at most 75 % of the layers.
    """
    from gptailor.config import read_config
    from gptailor.demo import PATH
    from gptailor.evaluation.outcome import SEARCH_DOCUMENTS
    from gptailor.run.folder import read_run
    from gptailor.run.pareto import most_small_layers

    out = Path(out)
    config = read_config(PATH / "search.yaml")
    config = config.model_copy(update={"output": str(out)})
    search(config, resume=True, workers=workers)
    evaluations = [e for e in read_run(out).evaluations if e.documents in SEARCH_DOCUMENTS]
    num_layers = max(e.recipe.num_layers for e in evaluations)
    limit = most_small_layers(num_layers)
    small = [
        e for e in evaluations if e.outcome.accuracy is not None and e.recipe.num_layers <= limit
    ]
    best = max(small, key=lambda e: (e.outcome.accuracy or 0.0, -e.parameters))
    place = out / "models" / best.recipe.point
    if not place.exists():
        from gptailor.verbs.models import stitch

        stitch(out, place, point=best.recipe.point, note=_say)
    return out


def environment() -> dict[str, object]:
    """The environment of a run: versions and machine."""
    import platform
    import socket
    from importlib import metadata

    names = ("gptailor", "torch", "transformers", "lm_eval", "pymoo", "numpy", "safetensors")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "?"
    return {
        "versions": versions,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "command": sys.argv,
    }


def _front(evaluations: Sequence[Evaluation]) -> tuple[Evaluation, ...]:
    from gptailor.run.pareto import pareto_front

    return pareto_front(
        evaluations, lambda e: (e.parameters, e.outcome.accuracy or 0.0, e.recipe.hash)
    )


def _write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    from gptailor.errors import ResourceError
    from gptailor.files import write_whole

    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise ResourceError(f"{path} can't be written: {error.strerror}.") from error
