"""The search configuration: every wrong key or value is one sentence that says what is right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptailor.config import Config, config_yaml, parse_config, parse_evaluation, read_config
from gptailor.errors import UsageError
from gptailor.run.config_difference import config_difference
from gptailor.verbs.checks import find_problems

GOOD: dict[str, Any] = {
    "models": {"base": "org/base", "math": "org/math", "code": "org/code"},
    "base": "base",
    "evaluation": {"tasks": ["piqa", {"task": "mmlu", "num_fewshot": 5, "weight": 2}]},
}


def changed(path: str, value: object) -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = data
    for key in parents:
        place = place.setdefault(key, {})
    place[last] = value
    return data


def refused(data: object) -> str:
    with pytest.raises(UsageError) as caught:
        parse_config(data, "s.yaml")
    text = str(caught.value)
    assert text.count("s.yaml") == 1
    assert "\n" not in text
    assert ": :" not in text
    assert text.endswith(".")
    return text


def test_the_example_of_the_documentation() -> None:
    text = """
models: {base: a/b, math: a/m, code: a/c}
base: base
space:
  layers: {min: 18, max: 30, protect: []}
  merge: {methods: [task_arithmetic, slerp, ties], lambdas: [0.3, 0.5, 0.7, 1.0]}
  scale: false
objectives: [accuracy, parameters]
evaluation:
  tasks: [piqa, {task: mmlu, num_fewshot: 5, metric: acc, weight: 2}]
  holdout: {tasks: [arc_easy]}
  rungs: [1000]
  dtype: bfloat16
  device: auto
search: {algorithm: nsga2, population: 48, evaluations: 500, seed: 0,
         arms: [block_influence, angular, uniform, paper]}
output: runs/smollm2
"""
    config = parse_config(yaml.safe_load(text), "s.yaml")
    assert config.space.layers.max == 30
    assert config.evaluation.tasks[1].weight == 2.0
    assert config.evaluation.tasks[0].task == "piqa"
    assert config.evaluation.holdout is not None
    assert config.search.arms[0] == "block_influence"


def test_words_that_older_yaml_reads_as_booleans(tmp_path: Path) -> None:
    """Names stay names, and booleans may be written either way."""
    path = tmp_path / "s.yaml"
    path.write_text(
        "models: {no: a/b, on: a/m, 2026-01-01: a/d}\nbase: no\nspace: {scale: off}\n"
        "evaluation: {tasks: [piqa], apply_chat_template: yes, fewshot_as_multiturn: No}\n"
    )
    config = read_config(path, ["models.off=a/c"])
    assert config.models == {"no": "a/b", "on": "a/m", "2026-01-01": "a/d", "off": "a/c"}
    assert config.base == "no"
    assert config.evaluation.apply_chat_template
    assert not config.evaluation.fewshot_as_multiturn
    path.write_text(config_yaml(config))
    assert read_config(path) == config


def test_defaults_need_only_three_keys() -> None:
    config = parse_config(GOOD, "s.yaml")
    assert config.objectives == ("accuracy", "parameters")
    assert config.space.merge.methods == ("task_arithmetic",)


KEYS = [
    ("modles", "modles", "models"),
    ("space.layer", "layer", "layers"),
    ("space.layers.mni", "mni", "min"),
    ("space.merge.lamdas", "lamdas", "lambdas"),
    ("evaluation.batchsize", "batchsize", "batch_size"),
    ("evaluation.holdout.task", "task", "tasks"),
    ("search.sead", "sead", "seed"),
    ("search.evaluation", "evaluation", "evaluations"),
]


@pytest.mark.parametrize(("path", "wrong", "right"), KEYS)
def test_unknown_keys(path: str, wrong: str, right: str) -> None:
    data = changed(path, 1)
    if "holdout" in path:
        data["evaluation"]["holdout"]["tasks"] = ["x"]
    text = refused(data)
    assert f"unknown key {wrong!r} in s.yaml" in text
    assert f"did you mean {right!r}?" in text


def test_unknown_key_of_a_task() -> None:
    text = refused(changed("evaluation.tasks", ["piqa", {"task": "x", "metrc": "acc"}]))
    assert "unknown key 'metrc' in s.yaml: evaluation.tasks.1: did you mean 'metric'?" in text


NAMES = [
    ("base", "bse", "unknown model 'bse' in base: did you mean 'base'?"),
    ("space.merge.methods", ["slrep"], "unknown merge method 'slrep' in space.merge.methods: did"),
    ("space.dtype", "bfloat61", "unknown dtype 'bfloat61' in space.dtype: did you mean 'bfloat16'"),
    ("evaluation.dtype", "float", "did you mean 'float32'?"),
    ("objectives", ["acuracy"], "unknown objective 'acuracy' in objectives: did you mean 'accura"),
    ("objectives", ["accuracy", "piqo"], "did you mean 'piqa'?"),
    ("search.arms", ["block_inf"], "unknown control arm 'block_inf' in search.arms: did you me"),
    (
        "search.algorithm",
        "nsga3",
        "search.algorithm: input should be 'nsga2' or 'random' (it is 'nsga3')",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), NAMES)
def test_unknown_names(path: str, value: object, message: str) -> None:
    assert message in refused(changed(path, value))


VALUES: list[tuple[str, object]] = [
    ("models", {}),
    ("models", ["base"]),
    ("models", {"base": 3}),
    ("models", None),
    ("base", 3),
    ("space", []),
    ("space.layers.min", 0),
    ("space.layers.min", 1.5),
    ("space.layers.min", "many"),
    ("space.layers.max", -1),
    ("space.layers.protect", 3),
    ("space.layers.protect", [-1]),
    ("space.merge.methods", "slerp"),
    ("space.merge.methods", [["slerp"]]),
    ("space.merge.lambdas", []),
    ("space.merge.lambdas", [0]),
    ("space.merge.lambdas", [2.1]),
    ("space.merge.lambdas", [float("nan")]),
    ("space.merge.lambdas", ["x"]),
    ("space.scale", True),
    ("objectives", []),
    ("evaluation", None),
    ("evaluation.tasks", []),
    ("evaluation.tasks", "piqa"),
    ("evaluation.tasks", [3]),
    ("evaluation.tasks", [{"task": "x", "num_fewshot": -1}]),
    ("evaluation.tasks", [{"task": "x", "weight": 0}]),
    ("evaluation.tasks", [{"task": "x", "weight": float("inf")}]),
    ("evaluation.tasks", [{"task": "x", "weight": float("nan")}]),
    ("evaluation.holdout", {"tasks": []}),
    ("evaluation.holdout", ["x"]),
    ("evaluation.rungs", [100, 300]),
    ("evaluation.rungs", [0]),
    ("evaluation.rungs", 100),
    ("evaluation.batch_size", 0),
    ("evaluation.include_path", 3),
    ("evaluation.tasks", [{"task": "x", "limit": 0}]),
    ("evaluation.device", "gpu"),
    ("evaluation.device", "cuda:x"),
    ("evaluation.device", "meta"),
    ("evaluation.apply_chat_template", "perhaps"),
    ("search.population", 3),
    ("search.evaluations", 0),
    ("search.seed", -1),
    ("search.arm_sizes", [0]),
    ("search.arm_sizes", [1.1]),
    ("output", 3),
]


@pytest.mark.parametrize(("path", "value"), VALUES)
def test_wrong_values(path: str, value: object) -> None:
    assert f"s.yaml: {path}" in refused(changed(path, value))


@pytest.mark.parametrize("key", ["models", "base", "evaluation"])
def test_missing_keys(key: str) -> None:
    text = refused({k: v for k, v in GOOD.items() if k != key})
    assert text == f"s.yaml: the key {key!r} is missing."


def test_missing_key_of_a_task() -> None:
    text = refused(changed("evaluation.tasks", [{"metric": "acc"}]))
    assert text == "s.yaml: the key 'evaluation.tasks.0.task' is missing."


def test_lambdas_are_a_set() -> None:
    config = parse_config(changed("space.merge.lambdas", [1.0, 0.5, 1.0]), "s.yaml")
    assert config.space.merge.lambdas == (0.5, 1.0)


# Files and overrides


def written(folder: Path, data: object = GOOD) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_overrides(tmp_path: Path) -> None:
    path = written(tmp_path)
    overrides = ["search.seed=7", "space.merge.methods=[slerp, ties]", "output=a=b"]
    config = read_config(path, overrides)
    assert config.search.seed == 7
    assert config.space.merge.methods == ("slerp", "ties")
    assert config.output == "a=b"
    assert config.models["base"] == "org/base"
    later = read_config(path, ["search.seed=1", "search.seed=2"])
    assert later.search.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.seed", "'search.seed' is not of the form key.path=value"),
        ("=3", "not of the form"),
        ("search.sead=3", "did you mean 'seed'?"),
        ("base.x=3", "base is not a mapping"),
        ("evaluation.tasks.0=x", "tasks is not a mapping"),
        ("search.seed=x", "search.seed"),
        ("search.seed=[", "search.seed=["),
        ("search.seed={a: 1, a: 2}", "the key 'a' is written twice"),
        ("search..seed=3", "unknown key ''"),
        (".=3", "unknown key ''"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_config(written(tmp_path), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("local", "tasks"):
        (tmp_path / "a" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = changed("evaluation.include_path", "tasks")
    data["models"] = {"base": "./local", "up": "../b", "plain": "local", "hub": "org/x@v2"}
    data["output"] = "runs/x"
    written(tmp_path / "a", data)
    config = read_config("a/s.yaml")
    assert config.models == {
        "base": str(tmp_path / "a" / "local"),
        "up": str(tmp_path / "b"),
        "plain": str(tmp_path / "a" / "local"),
        "hub": "org/x@v2",
    }
    assert config.evaluation.include_path == str(tmp_path / "a" / "tasks")
    assert config.output == "runs/x"  # relative to where the command runs


WEIGHTS: list[tuple[str, list[Any], str]] = [
    ("evaluation.tasks", ["a", {"task": "b", "weight": 0}], "the task b has weight 0, which only"),
    ("evaluation.holdout.tasks", [{"task": "b", "weight": 0}], "so there is no accuracy: add one"),
    ("evaluation.holdout.tasks", ["a", {"task": "b", "weight": -1}], "greater than or equal to 0"),
    (
        "evaluation.holdout.tasks",
        [{"task": "b", "text": "t.txt"}],
        "tasks.0: a text is scored by its perplexity, which can't be part of an accuracy: set we",
    ),
    (
        "evaluation.holdout.tasks",
        ["a", {"task": "b", "text": "t.txt", "weight": 0, "num_fewshot": 0}],
        "tasks.1: a text is read without examples: leave num_fewshot out.",
    ),
]


@pytest.mark.parametrize(("path", "tasks", "message"), WEIGHTS)
def test_tasks_that_do_not_count(path: str, tasks: list[Any], message: str) -> None:
    assert message in refused(changed(path, tasks))


def test_a_text_is_relative_to_the_file(tmp_path: Path) -> None:
    held = ["x", {"task": "language", "text": "a/b.txt", "weight": 0}]
    config = read_config(written(tmp_path, changed("evaluation.holdout.tasks", held)))
    assert config.evaluation.holdout is not None
    texts = [spec.text for spec in config.evaluation.holdout.tasks]
    assert texts == [None, str(tmp_path / "a" / "b.txt")]
    (tmp_path / "again.yaml").write_text(config_yaml(config))
    assert read_config(tmp_path / "again.yaml") == config


def test_include_path_must_exist(tmp_path: Path) -> None:
    path = written(tmp_path, changed("evaluation.include_path", "nowhere"))
    with pytest.raises(UsageError, match=f"include_path: the folder {tmp_path}/nowhere does not"):
        read_config(path)


def test_round_trip(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    data = changed("evaluation.include_path", "tasks")
    data["evaluation"] |= {"holdout": {"tasks": ["x"]}, "rungs": [30]}
    data["space"] = {"merge": {"lambdas": [0.1, 1 / 3]}, "layers": {"protect": [0, 3]}}
    config = read_config(written(tmp_path, data))
    text = config_yaml(config)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.yaml").write_text(text)
    again = read_config(tmp_path / "again" / "config.yaml")
    assert again == config
    assert config_yaml(again) == text
    assert isinstance(again, Config)


def test_unreadable_configurations(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(UsageError, match=f"The configuration {path} can't be read"):
            read_config(path)
    path = tmp_path / "x.yaml"
    for content, message in (
        (b"\xff\xfe", "not a text file"),
        (b"", "must be a mapping"),
        (b"- a\n", "must be a mapping"),
        (b"base: a\nbase: b\n", "the key 'base' is written twice"),
        (b"base: [\n", "x.yaml, line"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_config(path)


def test_fewshot_examples_are_turns_of_a_chat() -> None:
    """The same default as in lm-eval's command line."""
    chat = {"tasks": ["x"], "apply_chat_template": True}
    assert parse_evaluation(chat, "s.yaml").fewshot_as_multiturn
    assert not parse_evaluation({**chat, "fewshot_as_multiturn": False}, "s").fewshot_as_multiturn
    assert not parse_evaluation({"tasks": ["x"]}, "s.yaml").fewshot_as_multiturn
    message = r"s\.yaml: fewshot_as_multiturn needs apply_chat_template"
    with pytest.raises(UsageError, match=message):
        parse_evaluation({"tasks": ["x"], "fewshot_as_multiturn": True}, "s.yaml")


# Keys of earlier versions


def test_the_old_name_of_a_key_is_read_with_a_note(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "models": models,
                "base": "base",
                "evaluation": {"tasks": ["t_shared"], "include_path": str(tasks_dir)},
                "search": {"seed": 3, "seeds": ["random"]},
            }
        )
    )
    config = read_config(path)
    assert (config.search.seed, config.search.arms) == (3, ("random",))
    sentence = "search.seeds is now called search.arms; the old name still works."
    assert config.notes == (sentence,)
    assert "seeds" not in config_yaml(config)
    overridden = read_config(path, ["search.seeds=[angular]"])
    assert overridden.search.arms == ("angular",)
    assert overridden.notes == (sentence,)
    assert read_config(path, ["search.arms=[paper]"]).search.arms == ("paper",)
    said: list[str] = []
    find_problems(config, fast=True, note=said.append)
    assert sentence in said


def test_a_key_under_both_names_is_refused() -> None:
    data = {"search": {"seeds": ["random"], "arms": ["random"]}}
    with pytest.raises(UsageError, match=r"search\.seeds is now called search\.arms: leave"):
        parse_config(data, "s.yaml")


def test_a_run_of_an_earlier_version_searches_the_same() -> None:
    old = {"search": {"seed": 0, "seeds": ["random"]}}
    new = {"search": {"seed": 0, "arms": ["random"]}}
    assert config_difference(old, new) == ""
    new["search"]["arms"] = ["angular"]
    assert config_difference(old, new).startswith("search.arms.0 was 'random'")
