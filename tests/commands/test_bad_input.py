"""Users' mistakes on the command line: an exit code, one helpful line, nothing left behind.

Commands run the way a user runs them, in separate processes. Only tests that need lm-eval run in
this process, because importing it takes seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gptailor.merging.registry import METHODS, Method
from tests.calibrations import save_statistics
from tests.models.tiny import (
    LAYER_SHAPES,
    encoded,
    free_bytes,
    run_python,
    save_family,
    save_index,
    save_model,
    small_disk,
)

LINEAR = {"merge": "linear", "layer": 1, "weights": {"red": 1.0, "green": 1.0}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a valid family: base, red, green."""
    save_family(tmp_path)
    return tmp_path


def write_recipe(place: Path, *layers: dict[str, Any], **changes: Any) -> Path:
    data = {
        "schema": "gptailor/recipe/1",
        "models": {name: f"./{name}" for name in ("base", "red", "green")},
        "base": "base",
        "layers": list(layers) or [{"take": "red", "layer": 0}, LINEAR],
    }
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(data | changes))
    return path


def gptailor(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gptailor.cli", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def one_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    assert stderr.endswith(".\n")
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("gptailor: ")
    assert "a bug in gptailor" not in stderr
    return stderr


def state(place: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(place)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in sorted(place.rglob("*"))
        if p.is_file()
    }


def fails(place: Path, exit_code: int, *messages: str, out: str = "out") -> None:
    """Asserts that stitching the recipe fails this way, and leaves the folder unchanged."""
    before = state(place)
    done = gptailor("stitch", place / "recipe.yaml", place / out)
    text = one_line(done.stderr)
    assert done.returncode == exit_code, text
    assert done.stdout == ""
    for message in messages:
        assert message in text
    assert state(place) == before
    assert not [p for p in place.rglob("*") if ".tmp-" in p.name]


def test_the_recipe_is_fine(place: Path) -> None:
    """The recipe that the tests below break works, so they fail for the reason they name."""
    done = gptailor("stitch", write_recipe(place), place / "out", "--no-verify", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"folder": str(place / "out")}
    assert done.stderr == ""


# Models: exit code 3


def test_truncated_safetensors(place: Path) -> None:
    write_recipe(place)
    path = place / "green" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    fails(place, 3, str(path), "is truncated", "download it again")


def test_index_with_a_missing_shard(place: Path) -> None:
    write_recipe(place)
    save_model(place / "red2", name="red", shards=3)
    write_recipe(place, models={"base": "./base", "red": "./red2", "green": "./green"})
    (place / "red2" / "model-00002-of-00003.safetensors").unlink()
    fails(place, 3, "model-00002-of-00003.safetensors", "does not exist", "download")


def test_index_that_escapes_its_folder(place: Path) -> None:
    write_recipe(place)
    (place / "red" / "model.safetensors").rename(place / "outside.safetensors")
    save_index(place / "red", {"x": "../outside.safetensors"})
    fails(place, 3, "../outside.safetensors", "not a file in the same folder")


def test_candidates_of_different_depth(place: Path) -> None:
    write_recipe(place)
    save_model(place / "green", num_layers=3)
    fails(place, 3, "green has 3 layers", "base has 4", "same depth")


def test_candidates_of_different_shape(place: Path) -> None:
    write_recipe(place)
    name = "model.layers.3.mlp.up_proj.weight"
    save_model(place / "green", tensors={name: ("BF16", (8, 16), b"\0" * 256)})
    fails(place, 3, str(place / "green"), name, "[8, 16]", "[24, 16]")


def test_folder_without_tokenizer(place: Path) -> None:
    write_recipe(place)
    for path in (place / "base").glob("tokenizer*"):
        path.unlink()
    fails(place, 3, "base has no tokenizer", "tokenizer.json")


def test_only_pickles(place: Path) -> None:
    write_recipe(place)
    (place / "red" / "model.safetensors").rename(place / "red" / "pytorch_model.bin")
    fails(place, 3, "pytorch_model.bin", "pickle", "safe_serialization")


def test_a_missing_model(place: Path) -> None:
    write_recipe(place, models={"base": "./base", "red": "./rde", "green": "./green"})
    fails(place, 3, f"The model folder {place}/rde does not exist")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_nan_in_a_merged_tensor(place: Path, method: Method) -> None:
    names = ["green", "red"][: method.max_sources]
    sources = {"weights": dict.fromkeys(names, 0.5)} if method.weighted else {"models": names}
    options = {p.name: p.shown(p.search[0]) for p in method.parameters}
    entry: dict[str, Any] = {"merge": method.name, "layer": 1} | sources | options
    write_recipe(place, entry)
    name = "model.layers.1.mlp.up_proj.weight"
    values = np.full(LAYER_SHAPES["mlp.up_proj.weight"], np.nan)
    save_model(place / "green", tensors={name: ("BF16", values.shape, encoded(values, "BF16"))})
    if method.is_calibrated:
        models = {n: str(place / n) for n in names}
        write_recipe(
            place, entry, calibration=str(save_statistics(place / "cal", method.name, models))
        )
    fails(place, 3, f"{place}/green/model.safetensors: {name} can't be merged", "NaN")


# Recipes and paths: exit code 2


RECIPES: list[tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = [
    ([{"take": "redd", "layer": 0}], {}, ["unknown model 'redd'", "did you mean 'red'?"]),
    ([], {"base": "bsae"}, ["unknown model 'bsae'", "did you mean 'base'?"]),
    ([LINEAR | {"merge": "linaer"}], {}, ["method 'linaer'", "did you mean 'linear'?"]),
    ([LINEAR | {"wieghts": {}}], {}, ["unknown key 'wieghts'", "did you mean 'weights'?"]),
    ([], {"embedings": "base"}, ["unknown key 'embedings'", "did you mean 'embeddings'?"]),
    ([], {"dtype": "bfloat61"}, ["unknown dtype 'bfloat61'", "did you mean 'bfloat16'?"]),
    ([LINEAR | {"weights": {"red": 2000}}], {}, ["weight of red is 2000", "bounds -1000 to 1000"]),
    ([LINEAR | {"layer": 4}], {}, ["layers[0] names layer 4", "layers 0 to 3"]),
    ([LINEAR | {"layer": -1}], {}, ["layer is -1", "0 or a higher integer"]),
    ([LINEAR | {"layer": [1]}], {}, ["layer is [1]"]),
    ([{"take": ["red"], "layer": 0}], {}, ["unknown model"]),
    ([], {"base": ["base"]}, ["unknown model"]),
    ([{"layer": 0}], {}, ["needs either 'take' or 'merge'"]),
    ([], {"models": {"base": "./base", "red": "./base+./adapter", "green": "./green"}},
     ["base+adapter is not supported", "merge_and_unload"]),
]  # fmt: skip


@pytest.mark.parametrize(("layers", "changes", "messages"), RECIPES)
def test_wrong_recipes(
    place: Path, layers: list[dict[str, Any]], changes: dict[str, Any], messages: list[str]
) -> None:
    write_recipe(place, *layers, **changes)
    fails(place, 2, *messages)


@pytest.mark.parametrize("text", ["", "a: 2001-99-99", "[" * 3000, "a: 1\na: 2", "a: \0", "\tx"])
def test_files_that_are_not_recipes(place: Path, text: str) -> None:
    (place / "recipe.yaml").write_text(text)
    fails(place, 2, "recipe.yaml")


def test_a_missing_recipe(place: Path) -> None:
    fails(place, 2, "recipe.yaml can't be read", "No such file")


@pytest.mark.parametrize(
    ("out", "message"),
    [("full", "already exists"), ("red", "is also an input"), ("red/x", "is inside an input")],
)
def test_output_folders(place: Path, out: str, message: str) -> None:
    write_recipe(place)
    (place / "full").mkdir()
    (place / "full" / "file").write_text("precious")
    fails(place, 2, message, str(place / out), out=out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stich", "a", "b"], "unknown verb 'stich': did you mean 'stitch'?"),
        (["stitch", "a"], "the following arguments are required: out"),
        (["stitch", "a", "b", "--thread", "x"], "--threads"),
        (["eval", "m"], "one of the arguments --tasks --like is required"),
        (["report", "nowhere"], "nowhere holds no run"),
        (["stitch", "nowhere", "out", "--point", "ab"], "nowhere holds no run"),
        (["stitch", ".", "out"], "--point ID"),
        (["search", "nowhere.yaml"], "nowhere.yaml can't be read"),
        (["check", "nowhere.yaml"], "nowhere.yaml can't be read"),
    ],
)
def test_words(words: list[str], message: str) -> None:
    done = gptailor(*words)
    assert done.returncode == 2
    assert message in one_line(done.stderr)


def search_yaml(place: Path, tasks_dir: Path | None = None, **changes: Any) -> Path:
    data: dict[str, Any] = {
        "models": {name: f"./{name}" for name in ("base", "red", "green")},
        "base": "base",
        "evaluation": {"tasks": ["t_shared"], "device": "cpu"},
        "search": {"evaluations": 4, "population": 4, "arms": ["dense"]},
        "output": str(place / "run"),
    }
    if tasks_dir is not None:
        data["evaluation"]["include_path"] = str(tasks_dir)
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    path = place / "search.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"bsae": "x"}, ["unknown key 'bsae'", "did you mean 'base'?"]),
        ({"search": {"popluation": 9}}, ["unknown key 'popluation'", "did you mean 'population'?"]),
        ({"base": "bass"}, ["unknown model 'bass'", "did you mean 'base'?"]),
        ({"search": {"population": 2}}, ["search.population", "(it is 2)"]),
        ({"space": {"layers": {"min": 3, "max": 2}}}, ["space.layers", "min 3", "max 2"]),
        ({"space": {"merge": {"methods": ["tiess"]}}}, ["'tiess'", "did you mean 'ties'?"]),
        ({"space": {"merge": {"lambdas": [3.0]}}}, ["space.merge.lambdas", "(it is 3.0)"]),
        ({"space": {"layers": {"protect": [9]}}}, ["protect"]),
    ],
)
def test_wrong_configurations(place: Path, changes: dict[str, Any], messages: list[str]) -> None:
    path = search_yaml(place, **changes)
    before = state(place)
    done = gptailor("search", path)
    assert done.returncode == 2
    text = one_line(done.stderr)
    for message in messages:
        assert message in text
    assert state(place) == before


# Resources: exit code 4


@pytest.mark.system
def test_a_full_disk(place: Path, tmp_path: Path) -> None:
    write_recipe(place)
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        (disk / "filler").write_bytes(b"\1" * (free_bytes(disk) - (8 << 10)))
        done = gptailor("stitch", place / "recipe.yaml", disk / "out")
        assert done.returncode == 4
        assert re.search(r"has \d[.\d]* kB free, but the model needs [1-9][.\d]* kB", done.stderr)
        one_line(done.stderr)
        assert [p.name for p in disk.iterdir()] == ["filler"]


@pytest.mark.system
def test_a_disk_that_fills_up(place: Path, tmp_path: Path) -> None:
    write_recipe(place)
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        done = gptailor("stitch", place / "recipe.yaml", disk / "fits", "--no-verify")
        assert done.returncode == 0, done.stderr
        tensors = (disk / "fits" / "model.safetensors").stat().st_size
        page = os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(b"\1" * (free_bytes(disk) - -(-tensors // page) * page))
        done = gptailor("stitch", place / "recipe.yaml", disk / "out")
        assert done.returncode == 4
        assert f"The disk of {disk}/out is full" in one_line(done.stderr)
        assert sorted(p.name for p in disk.iterdir()) == ["filler", "fits"]


# Interrupted: 143, 130


INTERRUPTED = """
import os, sys
from gptailor.cli import main
os.fsync = lambda fd: os.kill(os.getpid(), int(sys.argv[3]))
sys.exit(main(["stitch", sys.argv[1], sys.argv[2], "--no-verify"]))
"""


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted(place: Path, signum: int, exit_code: int) -> None:
    recipe = write_recipe(place)
    before = state(place)
    done = run_python(INTERRUPTED, recipe, place / "out", int(signum))
    assert done.returncode == exit_code
    one_line(done.stderr)
    assert state(place) == before
    assert not (place / "out").exists()


# A run folder that is in use


HOLD = """
import sys
from gptailor.run.archive import Archive
with Archive(sys.argv[1]):
    print("open", flush=True)
    input()
"""


def test_a_run_folder_in_use(place: Path) -> None:
    path = search_yaml(place)
    words = [sys.executable, "-c", HOLD, str(place / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        before = state(place)
        done = gptailor("search", path, "--resume")
        assert done.returncode == 2
        text = one_line(done.stderr)
        assert f"is in use by another search (process {other.pid})" in text
        done = gptailor("search", path)
        assert done.returncode == 2
        assert "--resume" in one_line(done.stderr)
        assert state(place) == before
        other.communicate(b"\n")


# Tests that need lm-eval


def main_fails(capsys: pytest.CaptureFixture[str], exit_code: int, *words: object) -> str:
    from gptailor.cli import main

    handler = signal.getsignal(signal.SIGTERM)
    try:
        capsys.readouterr()
        assert main([str(word) for word in words]) == exit_code
        captured = capsys.readouterr()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines(True) if line.startswith("gptailor: ")]
    assert "Traceback" not in captured.err
    return one_line("".join(lines))


@pytest.mark.long  # reads the names of all tasks of lm-eval, to find a similar one
def test_unknown_task(
    models: dict[str, str], tasks_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = main_fails(
        capsys, 2, "eval", models["red"], "--tasks", "t_sharde", "--include-path", tasks_dir
    )
    assert "unknown task 't_sharde'" in text
    assert "did you mean 't_shared'?" in text


def test_unknown_metric(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {"tasks": [{"task": "t_long", "metric": "acc_nrom"}]}
    path = search_yaml(tmp_path, tasks_dir, models=models, evaluation=tasks)
    text = main_fails(capsys, 2, "search", path)
    assert "unknown metric 'acc_nrom' in the task t_long: did you mean 'acc_norm'?" in text


def test_a_search_that_never_began_leaves_no_run_folder(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {"tasks": [{"task": "t_long", "metric": "nothing"}]}
    path = search_yaml(tmp_path, tasks_dir, models=models, evaluation=tasks)
    main_fails(capsys, 2, "search", path)
    assert not (tmp_path / "run").exists()


def test_model_without_tokenizer(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = save_model(tmp_path / "bare", tokenizer=False)
    text = main_fails(capsys, 3, "eval", bare, "--tasks", "t_shared", "--include-path", tasks_dir)
    assert str(bare) in text
    assert "tokenizer" in text
