"""The verbs for one model: write it, score it, calibrate its sources on a text."""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from gptailor.errors import ModelError, ResourceError, UsageError, unknown
from gptailor.evaluation.family import open_family
from gptailor.files import left_behind, process_marker
from gptailor.merging.registry import CALIBRATED
from gptailor.models.family import Family
from gptailor.patience import Patience, Say, slowly
from gptailor.recipe import DTYPES, Recipe, dense_recipe, read_recipe

if TYPE_CHECKING:
    from gptailor.evaluation.outcome import Score
    from gptailor.stitching.patch import Patch


def stitch(
    source: str | Path,
    out: str | Path,
    *,
    point: str | None = None,
    verify: bool = True,
    sync: bool = True,
    threads: int = 0,
    io: str | None = None,
    max_shard_size: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes the model that a recipe describes; returns its folder.

    Args:
        source: a recipe file, a mergekit YAML, or a run folder together with `point`.
        out: the folder to make; it must not exist.
        point: the point's id in the run, or its first characters.
        verify: load the result, run it once and generate 20 tokens before it gets its name.
        sync: flush to the disk before the folder gets its name.
        threads: for merging; 0 for as many as there are cores.
        io: how weights are read: auto, mmap, pread or direct; None for GPTAILOR_IO's value.
        max_shard_size: largest weight file, like 5GB; None for 50GB, as in transformers 5.
        note: takes what the user should know about the models and the result.

    Raises:
        UsageError, ModelError, ResourceError: see `stitching.write.write_model`.
    """
    notes = ""
    if point is None:
        if Path(source).is_dir():
            raise UsageError(f"{source} is a folder: name a point of the run with --point ID.")
        recipe, family, notes = _described(Path(source), io)
    else:
        recipe, notes = _point(Path(source), point)
        family = open_family(recipe.used_models, recipe.base, io)
    for text in family.notes:
        note(text)
    return write_stitched(
        recipe,
        family,
        out,
        notes=notes,
        verify=verify,
        sync=sync,
        threads=threads,
        max_shard_size=max_shard_size,
        note=note,
    )


def write_stitched(
    recipe: Recipe,
    family: Family,
    out: str | Path,
    *,
    notes: str = "",
    verify: bool = True,
    sync: bool = True,
    threads: int = 0,
    max_shard_size: str | None = None,
    device: str = "auto",
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes the model of a recipe of an opened family, with its repair; returns its folder.

    The other arguments and errors are those of `stitch`; `device` is where a repair is computed.
    """
    from gptailor.stitching.layout import MAX_SHARD_SIZE
    from gptailor.stitching.write import write_model

    if verify:
        _check_room(recipe, family, out)
    with Patience(note) as patience, ExitStack() as stack:
        patch = None
        if recipe.repair is not None:
            recipe, patch = stack.enter_context(
                _repaired(recipe, family, out, device, patience, note)
            )
        with patience.step(f"Writing {out}"):
            plan = write_model(
                recipe,
                family,
                out,
                notes=notes,
                sync=sync,
                threads=threads,
                max_shard_size=MAX_SHARD_SIZE if max_shard_size is None else max_shard_size,
                test=_smoke_test(out, patience) if verify else None,
                patch=patch,
            )
    for text in plan.notes:
        note(text)
    return Path(out)


@contextlib.contextmanager
def _repaired(
    recipe: Recipe, family: Family, out: str | Path, device: str, patience: Patience, note: Say
) -> Iterator[tuple[Recipe, Patch]]:
    """Computes a recipe's repair; its file lies beside the output and is removed at the end."""
    from gptailor.evaluation.footprint import held_bytes
    from gptailor.evaluation.forward_dtype import choose, find_ability
    from gptailor.evaluation.repair.patch_file import compute_patch
    from gptailor.stitching.folder import check_out

    check_out(Path(out), family)  # before minutes are spent
    choice = choose("auto", recipe.dtype, [find_ability(device)], held_bytes(family))
    said = [""]
    for stale in left_behind(Path(out), "repair"):
        stale.unlink(missing_ok=True)
    path = Path(out).parent / f"{process_marker(Path(out), 'repair')}{os.getpid()}"
    try:
        with patience.step("Repairing", lambda: said[-1]):
            resolved, patch = compute_patch(
                recipe, family, path, dtype=choice.dtype, device=device, says=said.append, note=note
            )
        note(f"Repaired {len(patch.tensors)} weights; the model card lists the layers.")
        yield resolved, patch
    finally:
        path.unlink(missing_ok=True)


def _check_room(recipe: Recipe, family: Family, out: str | Path) -> None:
    """Raises a `ResourceError` early if there is too little memory to test the result."""
    from gptailor.evaluation.device_memory import available_bytes
    from gptailor.stitching.plan import check_recipe

    check_recipe(recipe, family)
    n_bytes = family.parameters(recipe.src_layers) * (4 if recipe.dtype == "float32" else 2)
    room = available_bytes()
    if n_bytes > room:
        raise ResourceError(
            f"Testing {out} would take {n_bytes / 1e9:.1f} GB of memory, but only "
            f"{room / 1e9:.1f} GB are free: use --no-verify."
        )


def _smoke_test(out: str | Path, patience: Patience) -> Callable[[Path], object]:
    def test(folder: Path) -> None:
        with patience.step(f"Loading and running {out}"):
            from gptailor.evaluation.smoke import smoke_test

            smoke_test(folder, out)

    return test


def calibrate(
    source: str | Path,
    text: str | Path,
    out: str | Path | None = None,
    *,
    methods: Sequence[str] = (),
    num_tokens: int = 100_000,
    seq_len: int = 512,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "auto",
    note: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Writes the statistics of the models that fisher and regmean need; returns the files.

    Args:
        source: a recipe file or a `search.yaml`.
        text: each line is a document; or a `.jsonl` whose objects have a `text`.
        out: the folder; default: the one that the file names as its calibration.
        methods: fisher, regmean or both; default: those that the file uses.
        num_tokens: how much of the text is read, at most.
        seq_len: the longest piece of a document, in tokens.
        seed: of the tokens that are drawn for fisher.
        dtype: of the models in the forward pass.
        device: as in `search.yaml`.
        note: takes what the user should know about the models.

    Raises:
        UsageError: there is nothing to do, no folder, or no text.
        ModelError: a model is unusable.
        ResourceError: memory or disk is exhausted.
    """
    from gptailor.evaluation.calibrate import calibrate_model, read_sequences

    models, base, folder, needed = _calibrated(Path(source))
    for method in methods:
        if method not in CALIBRATED:
            raise unknown("method", method, CALIBRATED, "--method")
    out = out or folder
    if out is None:
        raise UsageError(f"{source} names no calibration: name a folder with --out.")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES, "--dtype")
    wanted = {method: needed.get(method) or list(models) for method in methods or needed}
    if not wanted:
        raise UsageError(f"{source} uses neither fisher nor regmean: name one with --method.")
    names = {base, *(name for some in wanted.values() for name in some)}
    family = open_family({name: ref for name, ref in models.items() if name in names}, base)
    for found in family.notes:
        note(found)
    for candidate in family.candidates.values():
        if Path(out).resolve() == candidate.folder.resolve():
            raise UsageError(f"The output {out} is also an input ({candidate.name}).")
    with slowly(f"Reading {text}", note):
        sequences = read_sequences(text, family.base, num_tokens=num_tokens, seq_len=seq_len)
    return [
        calibrate_model(
            family.candidates[name],
            method,
            sequences,
            out,
            device=device,
            dtype=dtype,
            seed=seed,
            note=note,
        )
        for method, some in wanted.items()
        for name in some
    ]


def evaluate(
    source: str | Path,
    tasks: Sequence[str] = (),
    *,
    like: str | Path | None = None,
    metric: str | None = None,
    limit: float | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool | None = None,
    system_instruction: str | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    io: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Score, ...]:
    """Scores one model folder, hub id or recipe, the same way as a search does.

    Args:
        source: a model, a recipe file or a mergekit YAML.
        tasks: lm-eval's names of tasks, groups or tags.
        like: a `search.yaml` or a run's config.yaml, instead of tasks and their options: scores on
            the same documents as that search and its holdout.
        metric: only this one, as in `search.yaml`; None for all metrics of the tasks.
        limit: as in lm-eval: only the first documents of each task; a fraction of them if below 1.
        include_path: a folder with the user's own tasks.
        num_fewshot: examples in the context; None for each task's own number.
        apply_chat_template, system_instruction: as in lm-eval.
        fewshot_as_multiturn: as in lm-eval; None for the value of `apply_chat_template`.
        batch_size, dtype, device: as in `search.yaml`; None for its defaults, or `like`'s values.
        io: how weights are read: auto, mmap, pread or direct; None for GPTAILOR_IO's value.
        note: takes what the user should know about the models.

    Returns:
        For each task or group the metric that a search uses, then its others, then those of the
        tasks inside it; with `metric` or `like` only the metric that a search uses.

    Raises:
        UsageError: tasks or metric are unknown, the model can't answer a request, or the code of a
            task fails.
        ModelError: the model is unusable, or gives no numbers.
        ResourceError: memory is exhausted.
    """
    from gptailor.config import parse_evaluation, read_config
    from gptailor.evaluation.evaluator import Evaluator
    from gptailor.evaluation.footprint import held_bytes
    from gptailor.evaluation.forward_dtype import choose, find_ability
    from gptailor.stitching.plan import check_recipe

    path, whose = Path(source), "the recipe's"
    if path.suffix in (".yaml", ".yml"):
        recipe, family, _ = _described(path, io)
        check_recipe(recipe, family)
    else:
        family, whose = open_family({"model": str(source)}, "model", io), "the model's"
        found = family.base.tensors[family.architecture.embeddings[0]].dtype
        names = {name: dtype for dtype, name in DTYPES.items()}
        if found not in names:
            raise ModelError(f"{source} has weights of dtype {found}, which is not supported.")
        recipe = dense_recipe(family.refs, "model", "model", family.num_layers, names[found])
    for text in family.notes:
        note(text)
    each = {"num_fewshot": num_fewshot, "metric": metric, "limit": limit}
    given = {
        "include_path": include_path,
        "apply_chat_template": apply_chat_template or None,
        "fewshot_as_multiturn": fewshot_as_multiturn,
        "system_instruction": system_instruction,
    }
    asked: dict[str, object] = {"batch_size": batch_size, "dtype": dtype, "device": device}
    seed = 0
    if like is not None:
        search = read_config(like)
        seed = search.search.seed
        also = [key for key, value in {**each, **given}.items() if value is not None]
        if tasks or also:
            key = "tasks" if tasks else also[0]
            raise UsageError(f"like takes its tasks from {like}: leave {key} out.")
        asked = search.evaluation.model_dump() | {k: v for k, v in asked.items() if v is not None}
    else:
        asked |= {"tasks": [{"task": task, **each} for task in tasks], **given}
    config = parse_evaluation({k: v for k, v in asked.items() if v is not None}, "eval")
    ability = find_ability(config.device)
    choice = choose(config.dtype, recipe.dtype, [ability], held_bytes(family), whose=whose)
    note(choice.sentence)
    config = config.model_copy(update={"dtype": choice.dtype})
    said = [""]
    with slowly("Starting", note, lambda: said[-1]):
        evaluator = Evaluator(
            family, config, seed=seed, comparable=False, says=said.append, note=note
        )
    scores: list[Score] = []
    for documents in evaluator.workloads:
        with slowly("Evaluating", note, lambda: f"{evaluator.lm.num_tokens:,} tokens so far"):
            outcome = evaluator.evaluate(recipe, documents)
        if outcome.status != "ok":
            raise outcome.as_error()
        is_all = like is None and metric is None
        scores += evaluator.all_scores(documents) if is_all else outcome.scores
    return tuple(scores)


def _calibrated(
    path: Path,
) -> tuple[dict[str, str], str, str | None, dict[str, list[str]]]:
    """Models, base, calibration folder, and method → models whose statistics it needs."""
    from gptailor.config import read_config
    from gptailor.recipe import SCHEMA
    from gptailor.strict_yaml import load_yaml, read_text

    try:
        data = load_yaml(read_text(path), str(path))
    except (OSError, UnicodeDecodeError):
        data = {"schema": SCHEMA}  # read_recipe raises the error
    needed: dict[str, list[str]] = {}
    if isinstance(data, dict) and "evaluation" in data:
        config = read_config(path)
        for method in config.space.merge.calibrated:
            needed[method] = list(config.models)
        return config.models, config.base, config.calibration, needed
    recipe = read_recipe(path)
    for method, model in recipe.used_statistics:
        needed.setdefault(method, []).append(model)
    folder = None if recipe.calibration is None else recipe.calibration.folder
    return dict(recipe.models), recipe.base, folder, needed


def _described(path: Path, io: str | None = None) -> tuple[Recipe, Family, str]:
    """Reads a recipe or a mergekit YAML; returns recipe, opened family, Markdown for the card."""
    from gptailor.strict_yaml import read_text

    config = None
    with contextlib.suppress(OSError, UnicodeDecodeError):  # read_recipe raises the error
        if "merge_method" in read_text(path):  # most recipes need no mergekit reader
            from gptailor.mergekit import read_mergekit, to_recipe

            config = read_mergekit(path)
    if config is None:
        recipe = read_recipe(path).with_statistics_found()
        return recipe, open_family(recipe.used_models, recipe.base, io), ""
    family = open_family(config.models, config.base, io)
    text = textwrap.indent(config.text.strip(), "    ")
    return to_recipe(config, family), family, f"Made from this mergekit configuration:\n\n{text}"


def _point(run: Path, point: str) -> tuple[Recipe, str]:
    """Finds a run's recipe by the first characters of its id; its scores in Markdown."""
    from gptailor.run.folder import read_run

    evaluations = read_run(run).evaluations
    by_id = {e.recipe.hash: e.recipe for e in evaluations}
    matches = [recipe for digest, recipe in by_id.items() if digest.startswith(point)]
    if len(matches) != 1:
        if matches:
            raise UsageError(
                f"{len(matches)} points of {run} begin with {point!r}: give more characters."
            )
        raise unknown("point", point, [recipe.point for recipe in by_id.values()], str(run))
    rows = [
        f"| {s.task} | {e.documents} | {s.metric} | {s.value:.4f} |"
        for e in evaluations
        if e.recipe.hash == matches[0].hash
        for s in e.outcome.scores
    ]
    notes = "| task | documents | metric | score |\n|---|---|---|---|\n" + "\n".join(rows)
    return matches[0], notes if rows else ""
