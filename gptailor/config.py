"""The search configuration: `search.yaml`, every key checked before anything heavy is imported.

Paths are relative to the file's folder, the output to the working directory. `key.path=value`
arguments on the command line override the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from gptailor.errors import UsageError, plain, unknown
from gptailor.merging.registry import TASK_ARITHMETIC, get_method
from gptailor.models.untrusted import home_expanded, is_folder
from gptailor.recipe import DTYPES, absolute_ref
from gptailor.recipe.repair import BY_TASK, DEFAULT_TOKENS, RepairedLayers
from gptailor.strict_yaml import dump_yaml, load_yaml, read_text, truth

ARMS = ("dense", "block_influence", "angular", "uniform", "paper", "random")
"""The control arms that a search can start from; dense candidates are always evaluated."""

REFIT = "refit"
"""The name of the candidate that a search makes itself, see `RepairSpace.refit`."""

TEXTS = "texts"
"""The folder in the output with what the base wrote for repairs and for the holdout."""

LANGUAGE = "language"
"""The task that a search with repairs adds to its holdout."""

AUTO: Final = "auto"
"""As the text of a repair: what the base writes itself."""

RENAMED = {"search.seeds": "search.arms"}
"""Keys of earlier versions that are still read → their names today."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerSpace(_Strict):
    """How many layers a recipe keeps (`max: null` = all), and which are never dropped."""

    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)] | None = None
    protect: tuple[Annotated[int, Field(ge=0)], ...] = ()


class MergeSpace(_Strict):
    """Which merge methods the search may use (none: selection only) and which weights it tries."""

    methods: tuple[str, ...] = (TASK_ARITHMETIC.name,)
    lambdas: tuple[Annotated[float, Field(gt=0, le=2)], ...] = (0.3, 0.5, 0.7, 1.0)

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The methods that need calibration statistics of the models."""
        return tuple(name for name in self.methods if get_method(name).is_calibrated)

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for name in methods:
            get_method(name, "space.merge.methods")
        return methods

    @field_validator("lambdas")
    @classmethod
    def _sorted(cls, lambdas: tuple[float, ...]) -> tuple[float, ...]:
        if not lambdas:
            raise ValueError("must name at least one weight")
        return tuple(sorted(set(lambdas)))


class FrontCalibration(_Strict):
    """How much repairs of the front read, and that of `REFIT`: more than the search's.

    Attributes:
        documents: how many in all; None for 128 of each task. If there are fewer, all.
        tokens: how much of the text, at most.
    """

    documents: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] = DEFAULT_TOKENS


class RepairCalibration(_Strict):
    """What a search's repairs read.

    Attributes:
        tasks: their documents that are not scored; None for the tasks of the evaluation.
        include_path: as for the evaluation; None for its value.
        documents: how many in all; None for half as many as an evaluation scores.
        text: what is read besides the tasks, so that a repair keeps the language: a file whose
            lines are documents, or a `.jsonl` whose objects have a `text`; "auto": what the base
            writes itself (`evaluation.own_text`); false: nothing.
        tokens: how much of the text is read, at most.
        front: what repairs of the front read, once the search has ended; false for no more.
    """

    tasks: tuple[str, ...] | None = None
    include_path: str | None = None
    documents: Annotated[int, Field(ge=1)] | None = None
    text: str | Literal[False] = AUTO
    tokens: Annotated[int, Field(ge=1)] = 512
    front: FrontCalibration | Literal[False] = FrontCalibration()

    @field_validator("text", "front", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return False if value is None else truth(value)


class RepairSpace(_Strict):
    """How the recipes of a search are repaired; see `gptailor.recipe.Repair`.

    Attributes:
        layers: gaps, alternate, after or all; "auto": alternate while the search goes on, after for
            repairs of the front.
        teachers: "task" for each task's best dense candidate, "merge", a model's name, or task →
            model.
        calibration: what is read.
        ridge: relative to the mean diagonal of the normal equations, or auto.
        refit: make one more candidate before the search: the merge of all variants, every layer
            refitted to the teachers.
    """

    layers: RepairedLayers | Literal["auto"] = AUTO
    teachers: str | dict[str, str] = BY_TASK
    calibration: RepairCalibration = RepairCalibration()
    ridge: Annotated[float, Field(ge=1e-6, le=1e6)] | Literal["auto"] = "auto"
    refit: bool = True


class Space(_Strict):
    """Which recipes the search may propose.

    Attributes:
        layers, merge: how many layers they keep, and how these may be merged.
        scale: no scales, so far.
        dtype: of the recipes.
        repair: how cuts are repaired; "auto": by the defaults, if the tasks have documents that are
            not scored (`evaluation.rungs`); false: not at all.
    """

    layers: LayerSpace = LayerSpace()
    merge: MergeSpace = MergeSpace()
    scale: Literal[False] = False
    dtype: str = "bfloat16"
    repair: RepairSpace | Literal["auto", False] = "auto"

    @field_validator("repair", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return truth(value)

    @field_validator("scale", mode="before")
    @classmethod
    def _is_true(cls, value: object) -> object:
        return truth(value)

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES, "space.dtype")
        return dtype


class TaskSpec(_Strict):
    """One task or group of lm-eval, or a text.

    Attributes:
        task: lm-eval's name of a task, group or tag; any name for a text.
        text: a file whose lines are documents, or a `.jsonl` whose objects have a `text`; the
            model's perplexity on them is the score.
        num_fewshot: examples in the context; None for the task's own number.
        metric: "acc", or with its filter "exact_match,strict-match"; None for the task's first
            metric, or the one that a group aggregates.
        weight: in the accuracy; 0 for a task of the holdout that is only shown.
        limit: as in lm-eval: only the first documents of each task; a fraction of them if below 1.
    """

    task: str
    text: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    metric: str | None = None
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TaskSpec:
        if self.text is not None and self.num_fewshot is not None:
            raise ValueError("a text is read without examples: leave num_fewshot out")
        if self.text is not None and self.weight > 0:
            raise ValueError(
                "a text is scored by its perplexity, which can't be part of an accuracy: set "
                "weight: 0"
            )
        return self


class _Tasks(_Strict):
    tasks: Annotated[tuple[TaskSpec, ...], Field(min_length=1)]

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, tasks: object) -> object:
        if not isinstance(tasks, list | tuple):
            return tasks
        return [{"task": task} if isinstance(task, str) else task for task in tasks]


class Holdout(_Tasks):
    """Tasks that the search never sees; the front is scored on them at the end."""

    @field_validator("tasks")
    @classmethod
    def _some_count(cls, tasks: tuple[TaskSpec, ...]) -> tuple[TaskSpec, ...]:
        if not any(spec.weight > 0 for spec in tasks):
            raise ValueError(
                "all tasks have weight 0, so there is no accuracy: add one with a weight above 0"
            )
        return tasks


class EvaluationConfig(_Tasks):
    """How a recipe is scored.

    Attributes:
        include_path: a folder with the user's own tasks in lm-eval's YAML.
        holdout: tasks for the front only.
        rungs: total number of documents, spread evenly over the tasks; empty for all documents.
        dtype: of the model while it is scored; "auto": that of the recipes, but float32 on a
            processor that is slow at it.
        device: "auto", "cpu", "cuda", "cuda:1".
        batch_size: sequences in one forward pass.
        candidates_gib: how much of the device's memory the candidates' weights may take; default:
            what is free on a GPU, less headroom. On the CPU they are mapped and take none unless
            this is given. If not all fit, the most used layers stay.
        apply_chat_template, system_instruction: as in lm-eval.
        fewshot_as_multiturn: as in lm-eval: each example is a turn of the chat. Default: the value
            of `apply_chat_template`.
    """

    include_path: str | None = None
    holdout: Holdout | None = None
    rungs: tuple[Annotated[int, Field(ge=1)], ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    batch_size: Annotated[int, Field(ge=1)] = 32
    candidates_gib: Annotated[float, Field(gt=0)] | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = Field(
        default_factory=lambda given: bool(given.get("apply_chat_template"))
    )
    system_instruction: str | None = None

    @field_validator("tasks")
    @classmethod
    def _all_count(cls, tasks: tuple[TaskSpec, ...]) -> tuple[TaskSpec, ...]:
        for spec in tasks:
            if spec.weight == 0:
                raise ValueError(
                    f"the task {spec.task} has weight 0, which only tasks of the holdout may have: "
                    "move it to evaluation.holdout, or give it a weight above 0"
                )
        return tasks

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in ("auto", *DTYPES):
            raise unknown("dtype", dtype, ("auto", *DTYPES), "evaluation.dtype")
        return dtype

    @field_validator("device")
    @classmethod
    def _is_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", device):
            raise ValueError("must be auto, cpu, cuda, or one GPU like cuda:1")
        return device

    @field_validator("rungs")
    @classmethod
    def _one(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        if len(rungs) > 1:
            raise ValueError("more than one rung is not supported yet: name the last one only")
        return rungs

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("fewshot_as_multiturn needs apply_chat_template")
        return self


class SearchConfig(_Strict):
    """How the space is searched.

    Attributes:
        algorithm: "nsga2", or "random", the baseline: see `gptailor.search.algorithms`.
        population: recipes in a generation.
        evaluations: total number of recipes to evaluate, control arms included.
        seed: of every random choice.
        arms: control arms that are evaluated first and start the population.
        arm_sizes: fractions of the layers that the control arms keep.
        schedule: "generational": the result depends on seed and scores only, not on the number of
            workers; "asynchronous": no worker ever waits for another; "auto": asynchronous if
            there are more workers than a quarter of the population.
    """

    algorithm: Literal["nsga2", "random"] = "nsga2"
    schedule: Literal["auto", "generational", "asynchronous"] = "auto"
    population: Annotated[int, Field(ge=4)] = 48
    evaluations: Annotated[int, Field(ge=1)] = 500
    seed: Annotated[int, Field(ge=0)] = 0
    arms: tuple[str, ...] = ARMS
    arm_sizes: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.9, 0.8, 0.7)

    @field_validator("arms")
    @classmethod
    def _known(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for name in arms:
            if name not in ARMS:
                raise unknown("control arm", name, ARMS, "search.arms")
        return arms


class Config(_Strict):
    """A whole `search.yaml`; `calibration` is a folder that `gptailor calibrate` wrote."""

    models: Annotated[dict[str, str], Field(min_length=1)]
    base: str
    calibration: str | None = None
    space: Space = Space()
    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("accuracy", "parameters")
    evaluation: EvaluationConfig
    search: SearchConfig = SearchConfig()
    output: str = "runs/search"
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the file itself, for example that a key was renamed."""
        return self._notes

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.base not in self.models:
            raise unknown("model", self.base, self.models, "base")
        for name, ref in self.models.items():
            if not (name.isprintable() and ref.isprintable()):
                raise UsageError(f"models: {name!r} has characters that can't be shown.")
        if self.space.merge.calibrated and self.calibration is None:
            raise UsageError(
                f"space.merge.methods names {self.space.merge.calibrated[0]}, which needs "
                "calibration data: make it with `gptailor calibrate` and set calibration to its "
                "folder."
            )
        names = [spec.task for spec in self.evaluation.tasks]
        held = (
            [spec.task for spec in self.evaluation.holdout.tasks] if self.evaluation.holdout else []
        )
        for name in names:
            if name in held:
                raise UsageError(f"The task {name} is part of the search, so it is no holdout.")
        known = ["accuracy", "parameters", *names]
        for objective in self.objectives:
            if objective not in known:
                raise unknown("objective", objective, known, "objectives")
        return self

    @property
    def refit_place(self) -> str:
        """Where a search makes its own candidate."""
        return str((Path(self.output) / REFIT).resolve())

    @property
    def own_models(self) -> dict[str, str]:
        """The candidates without the one that the search makes."""
        return {n: ref for n, ref in self.models.items() if n != REFIT or not self.has_refit}

    @property
    def has_refit(self) -> bool:
        """Whether one of the candidates is the one that the search makes."""
        return self.models.get(REFIT) == self.refit_place

    def with_refit(self) -> Config:
        """Returns a copy with one more candidate, `REFIT`, in the output folder.

        Raises:
            UsageError: another candidate has that name.
        """
        place = self.refit_place
        if self.models.get(REFIT, place) != place:
            raise UsageError(
                f"models: the name {REFIT} is taken by the candidate that the search makes: choose "
                "another one, or set space.repair.refit: false."
            )
        return self.model_copy(update={"models": {**self.models, REFIT: place}})

    @property
    def own_texts(self) -> tuple[str, str]:
        """Files with what the base writes: for repairs, and for the holdout."""
        folder = (Path(self.output) / TEXTS).resolve()
        return str(folder / "calibration.jsonl"), str(folder / "holdout.jsonl")

    def with_language(self) -> Config:
        """Returns a copy whose holdout also has the perplexity of what the base wrote, if it has no
        text so far."""
        holdout = self.evaluation.holdout
        if holdout is None or any(spec.text is not None for spec in holdout.tasks):
            return self
        if LANGUAGE in [spec.task for spec in (*self.evaluation.tasks, *holdout.tasks)]:
            return self
        text = TaskSpec(task=LANGUAGE, text=self.own_texts[1], weight=0)
        changed = holdout.model_copy(update={"tasks": (*holdout.tasks, text)})
        evaluation = self.evaluation.model_copy(update={"holdout": changed})
        return self.model_copy(update={"evaluation": evaluation})

    def without_repair(self) -> Config:
        """Returns a copy whose recipes are not repaired."""
        space = self.space.model_copy(update={"repair": False})
        return self.model_copy(update={"models": self.own_models, "space": space})

    def computed_in(self, dtype: str) -> Config:
        """Returns a copy with `evaluation.dtype` set to `dtype`."""
        evaluation = self.evaluation.model_copy(update={"dtype": dtype})
        return self.model_copy(update={"evaluation": evaluation})


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a configuration.

    Args:
        path: a `search.yaml`.
        overrides: `key.path=value`, the value in YAML.

    Raises:
        UsageError: the file is missing, is not YAML, or has a wrong key or value.
    """
    path = Path(path)
    try:
        data = load_yaml(read_text(path), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"The configuration {path} can't be read: {reason}.") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} must be a mapping of keys to values.")
    data, renamed = renamed_keys(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        if key in RENAMED:
            renamed = (*renamed, key)
        _override(data, f"{RENAMED.get(key, key)}{equals}{text}")
    config = with_absolute_paths(parse_config(data, str(path)), path.parent)
    config._notes = tuple(
        f"{key} is now called {RENAMED[key]}; the old name still works."
        for key in dict.fromkeys(renamed)
    )
    return config


def renamed_keys(data: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns a configuration with today's key names, and the keys that were renamed.

    Raises:
        UsageError: a key is given under both names.
    """
    changed, old_keys = dict(data), []
    for old, new in RENAMED.items():
        (section, old_key), new_key = old.split("."), new.split(".")[1]
        inside = changed.get(section)
        if isinstance(inside, dict) and old_key in inside:
            if new_key in inside:
                raise UsageError(f"{old} is now called {new}: leave {old} out.")
            old_keys.append(old)
            changed[section] = {
                new_key if key == old_key else key: value for key, value in inside.items()
            }
    return changed, tuple(old_keys)


def parse_config(data: object, source: str) -> Config:
    """Checks a configuration that was already read; raises like `read_config`."""
    if isinstance(data, dict):
        data, _ = renamed_keys(data)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise _explained(error, source) from error


def parse_evaluation(data: object, source: str) -> EvaluationConfig:
    """Checks the `evaluation` section of a configuration; raises like `read_config`."""
    try:
        return EvaluationConfig.model_validate(data)
    except ValidationError as error:
        raise _explained(error, source) from error


def with_absolute_paths(config: Config, folder: Path) -> Config:
    """Returns the configuration with its paths, except the output, relative to `folder`."""
    data = config.model_dump()
    if config.calibration is not None:
        data["calibration"] = str((folder / Path(config.calibration).expanduser()).resolve())
    data["models"] = {name: absolute_ref(ref, folder) for name, ref in config.models.items()}
    include_path = config.evaluation.include_path
    if include_path is not None:
        data["evaluation"]["include_path"] = _folder("evaluation", folder, include_path)
    if config.evaluation.holdout is not None:
        for task in data["evaluation"]["holdout"]["tasks"]:
            if task["text"] is not None:
                task["text"] = str(_resolved(folder, task["text"]))
    if isinstance(config.space.repair, RepairSpace):
        calibration = config.space.repair.calibration
        written = data["space"]["repair"]["calibration"]
        if calibration.include_path is not None:
            key = "space.repair.calibration"
            written["include_path"] = _folder(key, folder, calibration.include_path)
        if calibration.text and calibration.text != AUTO:
            written["text"] = str(_resolved(folder, calibration.text))
    return Config.model_validate(data)


def _resolved(folder: Path, path: str) -> Path:
    """A path as an absolute one, from `folder`."""
    return (folder / home_expanded(path)).resolve()


def _folder(section: str, folder: Path, include_path: str) -> str:
    """A section's include_path as an absolute path, from `folder`."""
    place = _resolved(folder, include_path)
    if not is_folder(place):
        raise UsageError(f"{section}.include_path: the folder {place} does not exist.")
    return str(place)


def _override(data: dict[str, Any], override: str) -> None:
    key_path, equals, text = override.partition("=")
    if not equals or not key_path:
        raise UsageError(f"{override!r} is not of the form key.path=value.")
    *parents, last = key_path.split(".")
    place = data
    for key in parents:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise UsageError(f"{override!r}: {key} is not a mapping.")
    place[last] = load_yaml(text, override)


def _explained(error: ValidationError, source: str) -> UsageError:
    """One sentence for pydantic's first complaint; suggests the nearest key for a typo."""
    first = error.errors()[0]
    loc = [part for part in first["loc"] if part != RepairSpace.__name__]  # a branch of a union
    where = plain(".".join(str(part) for part in loc), 100)
    if first["type"] == "extra_forbidden":
        *parents, key = loc
        inside = plain(".".join(map(str, parents)), 100)
        place = ": ".join([source, inside] if parents else [source])
        return unknown("key", key, _keys(parents), place)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UsageError):
        return UsageError(f"{source}: {cause}")
    if first["type"] == "missing":
        return UsageError(f"{source}: the key {where!r} is missing.")
    message = plain(str(cause) if cause else str(first["msg"]))
    got = first["input"]
    shown = f" (it is {plain(repr(got), 100)})" if isinstance(got, str | int | float | bool) else ""
    place = f"{source}: {where}" if where else source
    return UsageError(f"{place}: {message[:1].lower()}{message[1:]}{shown}.")


def _keys(parents: Sequence[str | int]) -> list[str]:
    """The keys that exist at a place in the configuration."""
    model: Any = Config
    for part in parents:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        found = _models_in(annotation)
        if not found:
            return []
        model = found[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in getattr(annotation, "__args__", ()) for m in _models_in(a)]


def config_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `read_config` can read."""
    return dump_yaml(config.model_dump(mode="json"))
