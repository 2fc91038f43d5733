"""The verbs that prepare a search on a cluster: fetch what it needs, estimate what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gptailor.errors import GptailorError, ModelError, ResourceError, UsageError, sizes
from gptailor.evaluation.family import open_family
from gptailor.models.family import Family
from gptailor.models.untrusted import home_expanded, is_folder
from gptailor.patience import Say, slowly

if TYPE_CHECKING:
    from gptailor.config import Config
    from gptailor.evaluation.dry_run import DryRun, WorkloadSize
    from gptailor.evaluation.footprint import Footprint
    from gptailor.evaluation.lm import ResidentLM
    from gptailor.evaluation.repair.footprint import RepairFootprint
    from gptailor.evaluation.repair.reading import Reading
    from gptailor.recipe import Repair
    from gptailor.search.probe import Probe
    from gptailor.verbs.worker_memory import GpuPlan, RepairRoom

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""Keeps the libraries in a job from using the network."""

_NO_NETWORK = "http://127.0.0.1:9"
"""A proxy that does not exist: code that still tries the network is refused at once."""


@dataclass(frozen=True)
class ModelFiles:
    """Where a candidate is stored.

    Attributes:
        ref: the configuration's reference.
        folder: its files, as a job will find them.
        n_bytes: of its weights.
        from_hub: it is in the hub's cache.
    """

    ref: str
    folder: str
    n_bytes: int
    from_hub: bool


@dataclass(frozen=True)
class Prefetched:
    """What a job without a network will find.

    Attributes:
        models: name → files.
        documents: "search" and, if there is one, "holdout" → documents of one evaluation.
        variables: environment variables that jobs need.
        hf_home: the folder with what came from the hub; nodes must see it.
        only_checked: nothing could be downloaded, because HF_HUB_OFFLINE was set.
    """

    models: dict[str, ModelFiles]
    documents: dict[str, int]
    variables: dict[str, str]
    hf_home: str
    only_checked: bool


def prefetch(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    note: Say = lambda text: None,
) -> Prefetched:
    """Downloads what a search needs, then loads it without a network, as a job will.

    Models come from the hub unless they are local folders; tasks are loaded once, so that lm-eval
    fetches their datasets. `note` takes what the user should know about the models.

    Raises:
        UsageError: the configuration is wrong, or a task can't be fetched.
        ModelError: a model or tokenizer can't be fetched, or is unusable.
        ResourceError: the disk is full.
    """
    from gptailor.config import read_config
    from gptailor.evaluation.dry_run import DryRun

    parsed = read_config(config, overrides)
    with slowly(f"Fetching {len(parsed.models)} models", note):
        family = open_family(parsed.models, parsed.base)  # downloads
    for text in family.notes:
        note(text)
    with slowly("Fetching the tasks' documents", note):
        sizes = DryRun(parsed, family).sizes()  # downloads
    with slowly("Loading everything again without a network", note):
        found = _offline(parsed.model_dump_json())
    for name, work in sizes.items():
        if found[name]["digest"] != work.digest:
            raise UsageError(
                f"The {name} documents differ without a network: name fixed revisions of the "
                "datasets in the tasks."
            )
    models = {
        name: ModelFiles(
            ref=ref,
            folder=str(family.candidates[name].folder),
            n_bytes=sum(t.n_bytes for t in family.candidates[name].tensors.values()),
            from_hub=not is_folder(home_expanded(ref)),
        )
        for name, ref in parsed.models.items()
    }
    places = _places()
    return Prefetched(
        models=models,
        documents={name: size.documents for name, size in sizes.items()},
        variables={**OFFLINE, **places},
        hf_home=places["HF_HOME"],
        only_checked=_is_set("HF_HUB_OFFLINE"),
    )


@dataclass(frozen=True)
class Plan:
    """What a search will cost.

    Attributes:
        recipes_log10: logarithm of the number of recipes, at most.
        evaluations: number of evaluations that the search makes.
        sizes: "search" and, if there is one, "holdout" → the work of one evaluation.
        dtype: in which evaluations are computed.
        why_dtype: a sentence with the reason for `dtype`.
        footprint: memory, see `Footprint`.
        node_bytes: what a node reads from the candidates' disk, once for all its workers.
        gpus: how a worker's GPUs are used; None: it evaluates on the CPU.
        why_not: a sentence that says why a worker can't evaluate, or empty.
        cpu_cache: memory that merged layers may take in a worker on the CPU, in bytes.
        cpu_copies: memory that copies of mapped candidates in another dtype may take, in bytes; 0
            if files, recipes and evaluations have the same dtype.
        cpu_candidates: memory that candidates may take if `evaluation.candidates_gib` is set, so
            that they are read, in bytes; None if they are mapped.
        cpu_stay: all candidates, or all copies, stay in memory.
        repair: what repairs read and take; None if recipes are not repaired.
        front_repair: the same for repairs of the front; None if they read no more.
        repair_room: how the largest ones fit into a worker's memory; None without, or if it can't
            evaluate.
        device: where the probes were measured.
        probes: the measured evaluations; empty without.
        workers: number of workers that the following figures are for.
        evaluation_s: mean of the probes, in seconds; None without.
        evaluations_per_hour: of all workers together; None without.
        hours: until all evaluations are done, without the holdout; None without probes.
    """

    recipes_log10: float
    evaluations: int
    sizes: dict[str, WorkloadSize]
    dtype: str
    why_dtype: str
    footprint: Footprint
    node_bytes: int
    gpus: GpuPlan | None
    why_not: str
    cpu_cache: int
    cpu_copies: int
    cpu_candidates: int | None
    cpu_stay: bool
    repair: RepairFootprint | None
    front_repair: RepairFootprint | None
    repair_room: RepairRoom | None
    device: str
    probes: list[Probe]
    workers: int
    evaluation_s: float | None
    evaluations_per_hour: float | None
    hours: float | None


def plan(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    workers: int = 1,
    gpus_per_worker: int = 1,
    gpu_gib: float | None = None,
    probe: bool = True,
    note: Say = lambda text: None,
) -> Plan:
    """Estimates what a search costs, from headers, tasks and three evaluations on this machine.

    The candidate that a search makes itself counts like the base until it exists.

    Args:
        config: a `search.yaml`.
        overrides: `key.path=value`.
        workers: how many the search will have.
        gpus_per_worker: how many GPUs each of them will have.
        gpu_gib: memory of a GPU; default: this machine's GPU; without one the plan is for the CPU.
        probe: measure three evaluations; else the plan has no times.
        note: takes what the user should know, and progress lines.

    Raises:
        UsageError: the configuration is wrong, or a task can't be fetched.
        ModelError: a model or tokenizer is unusable.
        ResourceError: this machine has too little memory for the probes.
    """
    with TemporaryDirectory() as scratch:
        return _plan(
            config,
            overrides,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            gpu_gib=gpu_gib,
            probe=probe,
            note=note,
            scratch=Path(scratch),
        )


def _plan(
    config: str | Path,
    overrides: Sequence[str],
    *,
    workers: int,
    gpus_per_worker: int,
    gpu_gib: float | None,
    probe: bool,
    note: Say,
    scratch: Path,
) -> Plan:
    """`plan`, with a folder for what will not stay."""
    from gptailor.config import read_config
    from gptailor.evaluation.dry_run import DryRun
    from gptailor.evaluation.family import find_calibration
    from gptailor.evaluation.footprint import find_footprint, held_bytes
    from gptailor.evaluation.forward_dtype import Ability, choose, find_ability
    from gptailor.evaluation.repair.footprint import find_repair_footprints
    from gptailor.evaluation.repair.settings import is_automatic
    from gptailor.models.ends import announcements
    from gptailor.search.space import SearchSpace
    from gptailor.verbs.as_begun import as_begun
    from gptailor.verbs.worker_memory import find_worker_memory

    parsed = as_begun(read_config(config, overrides))
    family = _open(parsed)
    for text in (*parsed.notes, *family.notes, *announcements(family.candidates.values())):
        note(text)
    with slowly("Loading the tasks", note):
        dry_run = DryRun(parsed, family)
        sizes = dry_run.sizes()
    repairs = _repairs(parsed, dry_run, scratch, note)
    if not repairs and parsed.has_refit:
        parsed = parsed.without_repair()
        family = _open(parsed)
    calibration = find_calibration(parsed, family)
    space = SearchSpace(
        parsed.space, parsed.models, parsed.base, family.num_layers, calibration, family.ends
    )
    there = Ability("a GPU's node", "cuda", (), 0)  # planned for, possibly not this machine
    ability = find_ability(parsed.evaluation.device) if gpu_gib is None else there
    choice = choose(
        parsed.evaluation.dtype, parsed.space.dtype, [ability] * workers, held_bytes(family)
    )
    footprint = find_footprint(
        family,
        choice.dtype,
        recipes=parsed.space.dtype,
        batch_tokens=max(size.batch_tokens for size in sizes.values()),
        logits=max(size.logits for size in sizes.values()),
    )
    sizes_of_repairs = find_repair_footprints(
        family, dry_run.lm.model, dry_run.stack, repairs, choice.dtype
    )
    needs = sizes_of_repairs[0] if sizes_of_repairs else None
    more = sizes_of_repairs[1] if len(sizes_of_repairs) > 1 else None
    memory = find_worker_memory(
        footprint.blocks,
        parsed.evaluation,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        gpu_gib=gpu_gib,
        repair=more or needs,
    )
    device = ""
    probes: list[Probe] = []
    if probe:
        extra = 0 if needs is None else needs.on_device
        _check_room(footprint.model + extra, parsed.evaluation.device)
        work = 2e-12 * family.parameters() * sizes["search"].tokens
        note(f"Measuring three evaluations of up to {work:,.3g} Tflop (--no-probe skips them).")
        try:
            device, probes = _probes(
                parsed.computed_in(choice.dtype), repairs[0][0] if repairs else None, note
            )
        except (UsageError, ModelError) as error:
            if not repairs or not is_automatic(parsed):
                raise
            note(f"Nothing is repaired: {error}")
            return plan(
                config, [*overrides, "space.repair=false"], workers=workers,
                gpus_per_worker=gpus_per_worker, gpu_gib=gpu_gib, note=note,
            )  # fmt: skip
    seconds = sum(p.seconds for p in probes) / len(probes) if probes else None
    per_hour = None if seconds is None else workers * 3600.0 / seconds
    return Plan(
        recipes_log10=space.log10_size(),
        evaluations=parsed.search.evaluations,
        sizes=sizes,
        dtype=choice.dtype,
        why_dtype=choice.sentence,
        footprint=footprint,
        node_bytes=sum(p.stat().st_size for p in family_files(family)),
        gpus=memory.gpus,
        why_not=memory.why_not,
        cpu_cache=memory.cpu_cache,
        cpu_copies=memory.cpu_copies,
        cpu_candidates=memory.cpu_candidates,
        cpu_stay=memory.cpu_stay,
        repair=needs,
        front_repair=more,
        repair_room=memory.repair,
        device=device,
        probes=probes,
        workers=workers,
        evaluation_s=seconds,
        evaluations_per_hour=per_hour,
        hours=None if per_hour is None else parsed.search.evaluations / per_hour,
    )


def _open(config: Config) -> Family:
    """The family; the candidate that a search makes is represented by the base until it exists."""
    from gptailor.config import REFIT
    from gptailor.models.family import resolve

    folders = {}
    if config.has_refit and not is_folder(Path(config.models[REFIT])):
        folders[REFIT] = resolve(config.models[config.base])
    return open_family(config.models, config.base, folders=folders)


def _repairs(
    config: Config, dry_run: DryRun, scratch: Path, note: Say
) -> list[tuple[Repair, Reading]]:
    """How all recipes are repaired, and the front if that reads more, with what they read.

    Until the base has written its text, random tokens stand in for it.

    Raises:
        UsageError: there is nothing to read, though the configuration asks for repairs.
    """
    from gptailor.evaluation.repair.settings import front_repair, is_automatic, planned_repair

    found = []
    try:
        for planned in (planned_repair(config), front_repair(config)):
            if planned is None:
                continue
            repair = _with_some_text(planned, config.own_texts[0], dry_run.lm, scratch)
            with slowly("Loading what repairs read", note):
                found.append((repair, dry_run.reading(repair.calibration)))
    except UsageError as error:
        if not is_automatic(config):
            raise
        note(f"Nothing is repaired: {error}")
        return []
    return found


def _with_some_text(planned: Repair, own: str, lm: ResidentLM, scratch: Path) -> Repair:
    """A repair whose text exists; `own` is where the base will write."""
    import random

    from gptailor.evaluation.own_text import LENGTH

    calibration = planned.calibration
    if calibration.text != own or Path(own).exists():
        return planned
    stand_in = scratch / "text.txt"
    generator = random.Random(0)
    vocabulary = range(lm.tokenizer.vocab_size)
    rows = []
    for _ in range(0, calibration.tokens, LENGTH):
        tokens = generator.choices(vocabulary, k=LENGTH)
        text = lm.tokenizer.decode(tokens, skip_special_tokens=True)
        rows.append(" ".join(text.split()))
    stand_in.write_text("\n".join(rows), encoding="utf-8")
    return replace(planned, calibration=replace(calibration, text=str(stand_in)))


def family_files(family: Family) -> list[Path]:
    """The weight files of all candidates."""
    return [path for c in family.candidates.values() for path in c.checkpoint.files]


def _check_room(needed: int, device: str) -> None:
    """Raises a `ResourceError` if the probes would swamp the machine, for example a login node."""
    from gptailor.evaluation.device_memory import available_bytes
    from gptailor.evaluation.forward_dtype import is_cpu

    room = available_bytes()
    if is_cpu(device) and needed > 0.8 * room:
        taken, there = sizes(needed, room)
        raise ResourceError(
            f"An evaluation takes {taken}, but only {there} of memory are "
            "free here: skip the probes with --no-probe, or plan on a compute node."
        )


def _probes(config: Config, repair: Repair | None, note: Say) -> tuple[str, list[Probe]]:
    """The device, and the probes measured on it.

    Args:
        config: the search, with a dtype.
        repair: of all recipes; None for none.
        note: see `plan`.
    """
    from gptailor.evaluation.evaluator import Evaluator
    from gptailor.evaluation.family import find_calibration
    from gptailor.execution.node.files import open_candidates
    from gptailor.search.probe import measure_probes
    from gptailor.search.space import SearchSpace

    is_made = config.has_refit and is_folder(Path(config.refit_place))
    own = config.models if is_made else config.own_models
    config = config.model_copy(update={"models": own})
    evaluation = config.evaluation.model_copy(update={"holdout": None})
    said = [""]
    with slowly("Starting a worker", note, lambda: said[-1]):
        family = open_candidates(config, note=note, says=said.append)
        evaluator = Evaluator(
            family, evaluation, seed=config.search.seed, says=said.append, note=note
        )
    space = SearchSpace(
        config.space, own, config.base, family.num_layers, find_calibration(config, family),
        family.ends,
    )  # fmt: skip
    if repair is not None:
        # a search chooses the teachers by scores; which model it is does not change the time
        space.repair = replace(repair, teachers=config.base)
    with slowly("Measuring", note, lambda: f"{evaluator.num_tokens:,} tokens so far"):
        return str(evaluator.resident.device), measure_probes(evaluator, space)


def _offline(config_json: str) -> dict[str, dict[str, object]]:
    """What a process without a network finds."""
    proxies = {
        key: _NO_NETWORK
        for name in ("http_proxy", "https_proxy", "all_proxy")
        for key in (name, name.upper())
    }
    environment = {**os.environ, **OFFLINE, **proxies, "no_proxy": "", "NO_PROXY": ""}
    done = subprocess.run(
        [sys.executable, "-m", "gptailor.evaluation.dry_run"],
        input=config_json,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"the check without a network ended with: {last}") from None
    if "error" in answer:
        kinds: tuple[type[GptailorError], ...] = (ModelError, ResourceError)
        by_code = {kind.exit_code: kind for kind in kinds}
        kind = by_code.get(answer["exit_code"], UsageError)
        raise kind(f"Loading worked, but not without a network: {answer['error']}")
    found: dict[str, dict[str, object]] = answer["sizes"]
    return found


def _places() -> dict[str, str]:
    """HF_HOME, and the folders of the hub's files that are not in their usual place in it."""
    import datasets
    from huggingface_hub import constants

    home = Path(constants.HF_HOME).absolute()
    places = {"HF_HOME": str(home)}
    for name, folder, usual in (
        ("HF_HUB_CACHE", constants.HF_HUB_CACHE, home / "hub"),
        ("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE, home / "datasets"),
    ):
        if Path(folder).absolute() != usual:
            places[name] = str(Path(folder).absolute())
    return places


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}
