"""The `repair` of a recipe: what is written, what is refused, and what is hashed."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.errors import UsageError
from gptailor.recipe import DTYPES, Merge, Recipe, Take, read_recipe
from gptailor.recipe.repair import (
    BY_TASK,
    DEFAULT_DOCUMENTS,
    DEFAULT_RIDGE,
    DEFAULT_TOKENS,
    TEXT,
    UNCUT,
    CalibrationDocuments,
    CalibrationTask,
    Repair,
    read_repair,
    read_ridge,
)
from tests.recipe.recipes import MODELS, recipe

GOLDEN = Path(__file__).parents[1] / "golden"
TASKS = CalibrationDocuments((CalibrationTask("arc"), CalibrationTask("gsm", 5)))
FULL = Repair(
    CalibrationDocuments(
        tasks=(CalibrationTask("arc"), CalibrationTask("gsm", 5)),
        include_path="./tasks",
        documents=64,
        skip=512,
        seed=3,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        system_instruction="Be brief: no more than a word.",
        text="./text.jsonl",
        tokens=1000,
        digest="0123456789abcdef",
    ),
    layers="gaps",
    teachers=(("arc", "red"), ("gsm", "green"), ("text", "base")),
    ridge=0.01,
    dtype="float32",
)
_FULL_TEXT = """repair:
  layers: gaps
  teachers:
    arc: red
    gsm: green
    text: base
  ridge: 0.01
  calibration:
    tasks:
    - arc
    - task: gsm
      num_fewshot: 5
    include_path: ./tasks
    documents: 64
    skip: 512
    seed: 3
    apply_chat_template: true
    fewshot_as_multiturn: true
    system_instruction: 'Be brief: no more than a word.'
    text: ./text.jsonl
    tokens: 1000
    digest: 0123456789abcdef
  dtype: float32
"""
PLAIN = recipe(Take("red", 0), Take("base", 4), Take("base", 5))


def written(**changes: Any) -> dict[str, Any]:
    """A recipe's dict with a repair of one task; `changes` go into the repair."""
    return PLAIN.to_dict() | {"repair": {"calibration": {"tasks": ["arc"]}} | changes}


def read(**changes: Any) -> Repair:
    found = Recipe.from_dict(written(**changes), "r.yaml").repair
    assert found is not None
    return found


# Text


def test_the_text_of_a_repair() -> None:
    text = PLAIN.with_repair(FULL).to_yaml()
    begin, end = text.index("repair:"), text.index("layers:\n  -")
    assert text[begin:end] == _FULL_TEXT
    assert Recipe.from_yaml(text) == PLAIN.with_repair(FULL)


def test_defaults() -> None:
    found = read()
    assert found == Repair(CalibrationDocuments((CalibrationTask("arc"),)))
    assert (found.layers, found.teachers, found.ridge, found.dtype) == (
        "all", BY_TASK, DEFAULT_RIDGE, "",
    )  # fmt: skip
    documents = found.calibration
    assert (documents.documents, documents.tokens) == (DEFAULT_DOCUMENTS, DEFAULT_TOKENS)
    assert (documents.skip, documents.seed, documents.digest) == (0, 0, "")
    assert documents.to_dict() == {"tasks": ["arc"]}
    assert PLAIN.with_repair(found).to_dict()["repair"] == {
        "layers": "all", "teachers": "task", "ridge": DEFAULT_RIDGE,
        "calibration": {"tasks": ["arc"]},
    }  # fmt: skip


def test_a_recipe_may_have_no_repair() -> None:
    assert "repair" not in PLAIN.to_dict()
    assert "repair" not in PLAIN.to_yaml()
    assert Recipe.from_dict(PLAIN.to_dict() | {"repair": None}) == PLAIN
    assert PLAIN.with_repair(FULL).with_repair(None) == PLAIN
    assert PLAIN.with_repair(None) is PLAIN


_words = st.text(min_size=1, max_size=8).filter(str.isprintable)
_names = _words.filter(lambda name: name != TEXT)


@st.composite
def repairs(draw: st.DrawFn) -> Repair:
    tasks = tuple(
        CalibrationTask(name, draw(st.none() | st.integers(0, 9)))
        for name in draw(st.lists(_names, max_size=3, unique=True))
    )
    has_template = draw(st.booleans())
    documents = CalibrationDocuments(
        tasks,
        include_path=draw(st.none() | _words),
        documents=draw(st.integers(1, 10**6)),
        skip=draw(st.integers(0, 10**6)),
        seed=draw(st.integers(0, 2**40)),
        apply_chat_template=has_template,
        fewshot_as_multiturn=has_template and draw(st.booleans()),
        system_instruction=draw(st.none() | st.sampled_from(["", "a: b", "x\ny", " - ", "null"])),
        text=draw(_words) if not tasks or draw(st.booleans()) else None,
        tokens=draw(st.integers(1, 10**6)),
        digest=draw(st.sampled_from(["", "1234567890123456", "12e4567890123456", "a" * 16])),
    )
    model = st.sampled_from(list(MODELS))
    return Repair(
        documents,
        draw(st.sampled_from(["gaps", "alternate", "after", "all"])),
        draw(
            st.sampled_from([BY_TASK, UNCUT])
            | model
            | st.just(tuple((group, draw(model)) for group in documents.groups))
        ),
        draw(st.floats(1e-6, 1e6)),
        draw(st.sampled_from(["", *DTYPES])),
    )


@settings(max_examples=100, deadline=None)
@given(repairs())
def test_round_trip(made: Repair) -> None:
    whole = PLAIN.with_repair(made)
    again = Recipe.from_yaml(whole.to_yaml())
    assert again == whole
    assert again.hash == whole.hash
    assert read_repair(made.to_dict(), MODELS, DTYPES, "repair") == made


# What is refused

REFUSED: list[tuple[dict[Any, Any], str]] = [
    ({"layer": "all"}, "unknown key 'layer' in r.yaml: repair: did you mean 'layers'?"),
    ({3: "all"}, "unknown key '3' in r.yaml: repair"),
    ({"layers": "gap"}, "unknown choice of layers 'gap' in r.yaml: repair: did you mean 'gaps'?"),
    ({"layers": ["gaps"]}, "unknown choice of layers"),
    ({"layers": None}, "unknown choice of layers 'None'"),
    ({"dtype": "bf16"}, "unknown dtype 'bf16' in r.yaml: repair: did you mean 'bfloat16'?"),
    ({"dtype": ["float32"]}, "unknown dtype"),
    ({"dtype": None}, "unknown dtype 'None'"),
    ({"dtype": 0}, "unknown dtype '0'"),
    ({"dtype": False}, "unknown dtype 'False'"),
    ({"teachers": "rad"}, "unknown teacher 'rad' in r.yaml: repair: teachers: did you mean 'red'?"),
    ({"teachers": None}, "repair: teachers must be a mapping"),
    ({"teachers": ["red"]}, "repair: teachers must be a mapping"),
    ({"teachers": {"arc": "rad"}}, "unknown model 'rad' in r.yaml: repair: teachers"),
    ({"teachers": {"arc": ["red"]}}, "unknown model"),
    ({"teachers": {"arc": None}}, "unknown model 'None'"),
    ({"teachers": {"arc": "merge"}}, "unknown model 'merge'"),
    ({"teachers": {"arcs": "red"}}, "unknown task 'arcs' in r.yaml: repair: teachers: did you"),
    ({"teachers": {1: "red"}}, "unknown task '1'"),
    ({"teachers": {"arc": "red", "text": "red"}}, "unknown task 'text'"),
    ({"teachers": {}}, "repair: teachers: arc has no teacher"),
    *(
        ({"ridge": ridge}, "must be auto or from 1e-6 to 1e6")
        for ridge in (0, 9e-7, 1.1e6, -1, True, None, "0.3", [1], float("nan"), 10**400)
    ),
    ({"calibration": None}, "r.yaml: repair: calibration must be a mapping"),
    ({"calibration": ["arc"]}, "r.yaml: repair: calibration must be a mapping"),
    ({"calibration": {}}, "calibration names neither tasks nor a text"),
]  # fmt: skip
REFUSED_CALIBRATIONS: list[tuple[dict[str, Any], str]] = [
    ({"task": ["arc"]}, "unknown key 'task' in r.yaml: repair: calibration: did you mean 'tasks'?"),
    ({"tasks": []}, "calibration names neither tasks nor a text"),
    ({"tasks": "arc"}, "tasks must be a list of tasks"),
    ({"tasks": None}, "tasks must be a list of tasks"),
    ({"tasks": ["arc", {"task": "arc", "num_fewshot": 5}]}, "tasks names a task twice"),
    ({"tasks": [3]}, "calibration: tasks must be a mapping"),
    ({"tasks": [{"task": "arc", "shots": 5}]}, "unknown key 'shots' in r.yaml: repair: calib"),
    ({"tasks": [{"num_fewshot": 5}]}, "None is not the name of a task"),
    ({"tasks": [{"task": ["arc"]}]}, "['arc'] is not the name of a task"),
    ({"tasks": ["text"]}, "'text' is not the name of a task"),
    ({"tasks": [""]}, "'' is not the name of a task"),
    ({"tasks": ["a\x00"]}, "'a\\x00' is not the name of a task"),
    *(
        ({"tasks": [{"task": "arc", "num_fewshot": shots}]},
         f"num_fewshot is {shots!r}, but must be a number from 0 on")
        for shots in (-1, 1.5, "5", True, False)
    ),
    *(
        ({key: value}, f"{key} is {value!r}, but must be a number from {least} on")
        for key, least in (("documents", 1), ("skip", 0), ("seed", 0), ("tokens", 1))
        for value in (least - 1, 1.0, "1", None, True)
    ),
    *(
        ({key: value}, f"{key} must be true or false")
        for key in ("apply_chat_template", "fewshot_as_multiturn")
        for value in (1, None, "yes")
    ),
    ({"fewshot_as_multiturn": True}, "fewshot_as_multiturn needs apply_chat_template"),
    *(
        ({key: value}, f"{key} must be text")
        for key in ("include_path", "system_instruction", "text", "digest")
        for value in (3, None, ["a"])
    ),
    *(({key: "a\x1b[0m"}, f"{key} must be text") for key in ("include_path", "text", "digest")),
    *(({key: ""}, f"{key} is empty, but must name") for key in ("include_path", "text")),
]  # fmt: skip


def refused(data: object) -> str:
    with pytest.raises(UsageError) as caught:
        Recipe.from_dict(data, "r.yaml")
    text = str(caught.value)
    assert "r.yaml: repair" in text
    assert text.isprintable()
    return text


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_malformed_repairs(changes: dict[Any, Any], message: str) -> None:
    assert message in refused(PLAIN.to_dict() | {"repair": written()["repair"] | changes})


@pytest.mark.parametrize(("changes", "message"), REFUSED_CALIBRATIONS)
def test_malformed_calibrations(changes: dict[str, Any], message: str) -> None:
    assert message in refused(written(calibration={"tasks": ["arc"]} | changes))


def test_a_repair_is_a_mapping_with_a_calibration() -> None:
    no_mappings: tuple[object, ...] = ([], "all", 3, True)
    for nothing in no_mappings:
        assert "repair must be a mapping" in refused(PLAIN.to_dict() | {"repair": nothing})
    text = refused(PLAIN.to_dict() | {"repair": {"layers": "all"}})
    assert "the key 'calibration' is missing: name tasks or a text" in text


def test_a_ridge_may_be_automatic() -> None:
    assert read_ridge("auto", "x") == read(ridge="auto").ridge == DEFAULT_RIDGE
    assert read_ridge(1, "x") == 1.0
    assert isinstance(read_ridge(1, "x"), float)
    assert (read_ridge(1e-6, "x"), read_ridge(1e6, "x")) == (1e-6, 1e6)


def test_teachers_of_each_group() -> None:
    both = {"tasks": ["arc", "gsm"], "text": "t.txt"}
    found = read(calibration=both, teachers={"text": "base", "gsm": "red", "arc": "green"})
    assert found.teachers == (("arc", "green"), ("gsm", "red"), ("text", "base"))
    assert found.calibration.groups == ("arc", "gsm", "text")
    only_text = read(calibration={"text": "t.txt"}, teachers={"text": "base"})
    assert only_text.calibration.groups == ("text",)
    for one in (BY_TASK, UNCUT, "green"):
        assert read(teachers=one).teachers == one


# Paths


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(PLAIN.with_repair(FULL).to_yaml())
    found = read_recipe(folder / "recipe.yaml").repair
    assert found is not None
    documents = replace(
        FULL.calibration, include_path=str(folder / "tasks"), text=str(folder / "text.jsonl")
    )
    assert found == replace(FULL, calibration=documents)
    assert found.relative_to(Path("/elsewhere")) == found
    up = replace(FULL, calibration=replace(FULL.calibration, text="../t.txt", include_path=None))
    moved = up.relative_to(folder).calibration
    assert (moved.text, moved.include_path) == (str(tmp_path / "t.txt"), None)


def test_paths_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    documents = CalibrationDocuments(text="~/t.txt")
    assert Repair(documents).relative_to(Path("/x")).calibration.text == str(tmp_path / "t.txt")


# Hash


def test_a_recipe_without_a_repair_keeps_its_hash() -> None:
    golden = Recipe.from_yaml((GOLDEN / "recipe.yaml").read_text())
    assert Recipe.from_dict(golden.to_dict() | {"repair": None}).point == golden.point == "d166cca7"
    mended = golden.with_repair(FULL)
    assert mended.hash != golden.hash
    assert mended.with_repair(None).hash == golden.hash


def test_equal_repairs_hash_equally() -> None:
    """Also if one recipe was made from another, whose layers had been simplified."""
    mended = PLAIN.with_repair(FULL)
    assert Recipe.from_yaml(mended.to_yaml()).hash == mended.hash
    sum_of_one = Merge("linear", 4, (("base", 1.0),), (("normalize", 1.0),))
    longer = recipe(Take("red", 0), sum_of_one, Take("base", 5))
    assert longer.hash == PLAIN.hash
    assert longer.with_repair(FULL).hash == mended.hash
    assert longer.with_repair(FULL).canonical().hash == mended.hash
    assert longer.with_repair(FULL).canonical().repair == FULL


_ANOTHER: dict[str, Any] = {
    "tasks": (CalibrationTask("arc"), CalibrationTask("gsm", 4)), "include_path": "./others",
    "documents": 65, "skip": 511, "seed": 4, "apply_chat_template": False,
    "fewshot_as_multiturn": False, "system_instruction": None, "text": "./text.txt",
    "tokens": 1001, "digest": "1123456789abcdef",
}  # fmt: skip


def test_each_field_changes_the_hash() -> None:
    """Where documents come from counts only while it is not known which ones they are."""
    unknown = replace(FULL, calibration=replace(FULL.calibration, digest=""))
    different = [
        unknown,
        FULL,
        replace(FULL, layers="all"),
        replace(FULL, layers="after"),
        replace(FULL, layers="alternate"),
        replace(FULL, ridge=0.02),
        replace(FULL, dtype=""),
        replace(FULL, dtype="bfloat16"),
        replace(FULL, teachers="red"),
        replace(FULL, teachers=UNCUT),
        replace(FULL, teachers=BY_TASK),
        replace(FULL, teachers=(("arc", "green"), ("gsm", "red"), ("text", "base"))),
        replace(FULL, calibration=replace(FULL.calibration, digest=_ANOTHER["digest"])),
    ]
    assert set(_ANOTHER) == {field.name for field in fields(CalibrationDocuments)}
    for key, value in _ANOTHER.items():
        if key != "digest":
            one = replace(unknown, calibration=replace(unknown.calibration, **{key: value}))
            different.append(one)
            known = replace(one, calibration=replace(one.calibration, digest="0123456789abcdef"))
            assert PLAIN.with_repair(known).hash == PLAIN.with_repair(FULL).hash
    hashes = {PLAIN.hash, *(PLAIN.with_repair(one).hash for one in different)}
    assert len(hashes) == len(different) + 1


def test_renamed_models_hash_equally() -> None:
    new = {"base": "basis", "red": "task", "green": "merge", "blue": "text"}
    models = {new[name]: ref for name, ref in MODELS.items()}
    layers = tuple(Take(new[layer.used_models[0]], layer.src_layer) for layer in PLAIN.layers)
    renamed = Recipe(models, "basis", layers, "basis", "basis")
    assert renamed.hash == PLAIN.hash
    given: tuple[tuple[str, str], ...] = (("arc", "red"), ("gsm", "green"))
    for teachers in (BY_TASK, UNCUT, "base", "blue", given):
        named: Any = teachers
        if isinstance(teachers, tuple):
            named = tuple((group, new[model]) for group, model in teachers)
        else:
            named = new.get(teachers, teachers)
        before, after = Repair(TASKS, teachers=teachers), Repair(TASKS, teachers=named)
        assert PLAIN.with_repair(before).hash == renamed.with_repair(after).hash


def test_models_that_may_become_teachers_count() -> None:
    few = replace(PLAIN, models={name: MODELS[name] for name in ("base", "red")}, _cache={})
    assert few.hash == PLAIN.hash
    by_task, by_one = Repair(TASKS), Repair(TASKS, teachers="red")
    assert few.with_repair(by_task).hash != PLAIN.with_repair(by_task).hash
    assert few.with_repair(by_one).hash == PLAIN.with_repair(by_one).hash


# Models


def test_teachers_are_used_models() -> None:
    """So they are opened, and must exist."""
    assert set(PLAIN.used_models) == {"base", "red"}
    used: dict[Any, set[str]] = {
        BY_TASK: {"base", "red", "green", "blue"},
        UNCUT: {"base", "red"},
        "green": {"base", "red", "green"},
        (("arc", "blue"), ("gsm", "base")): {"base", "red", "blue"},
    }
    for teachers, names in used.items():
        mended = PLAIN.with_repair(Repair(TASKS, teachers=teachers))
        assert set(mended.used_models) == names
        assert list(mended.used_models) == [name for name in MODELS if name in names]
    assert FULL.used_models(MODELS) == ("red", "green", "base")
    assert Repair(TASKS, teachers=UNCUT).used_models(MODELS) == ()
