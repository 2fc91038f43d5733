"""Files made to exhaust memory or time: refused in seconds, with bounded memory per byte.

Each case runs in a separate process, whose memory can be measured.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models.tiny import run_python, save_model

MAX_SECONDS = 10.0
"""Enough even on a busy machine; quadratic time would take hours."""
MAX_BYTES_PER_BYTE = 50
FREE_MB = 60

MEASURE = """
import json, resource, sys, time
from pathlib import Path
from gptailor.errors import GptailorError
from gptailor.models.candidate import Candidate
from gptailor.models.family import Family
from gptailor.recipe import Recipe
import gptailor.mergekit.parse
from gptailor.strict_yaml import load_yaml

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

kind, path = sys.argv[1], Path(sys.argv[2])
before, began = peak(), time.process_time()
try:
    if kind == "model":
        Family({"base": str(path), "x": sys.argv[3]}, "base")
    elif kind == "recipe":
        Recipe.from_yaml(path.read_text())
    elif kind == "mergekit":
        gptailor.mergekit.parse.parse_mergekit(load_yaml(path.read_text(), "m"), path)
    outcome = "ok"
except GptailorError as error:
    outcome = str(error)
print(json.dumps([outcome, time.process_time() - began, peak() - before]))
"""


def measured(kind: str, path: Path, n_bytes: int, *more: Path) -> str:
    """The error's text, or "ok"; fails if it took too much time or memory."""
    done = run_python(MEASURE, kind, path, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome, seconds, n_memory = json.loads(done.stdout)
    assert seconds < MAX_SECONDS, outcome
    assert n_memory < MAX_BYTES_PER_BYTE * n_bytes + FREE_MB * 2**20, (n_memory / 2**20, outcome)
    return str(outcome)


def entries(count: int, name: str) -> str:
    """Tensors without bytes."""
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return ",".join(f'"{name.format(i)}":{entry}' for i in range(count))


HEADERS: dict[str, tuple[str, str]] = {
    "a key twice": ("{" + entries(60_000, "{}") + "," + entries(1, "59999") + "}", "twice"),
    "many empty lists": ('{"a":[' + "[]," * 4_000_000 + "0]}", "more values than any model needs"),
    "many empty objects": ('{"a":[' + "{}," * 900_000 + "0]}", "not exactly the keys"),
    "many numbers": ('{"a":[' + "1," * 6_000_000 + "1]}", "not exactly the keys"),
    "nesting": ('{"a":' + "[" * 2_000_000 + "]" * 2_000_000 + "}", "not valid JSON"),
    "a long name": ("{" + entries(1, "1." * 2_000_000) + "}", "is not a valid tensor name"),
    "names of numbers": ("{" + entries(8_000, "{}." + "1.x." * 120) + "}", "have 8000"),
    "many tensors": ("{" + entries(60_000, "model.layers.0.x{}") + "}", "config.json"),
    "many layers": ("{" + entries(60_000, "model.layers.{}.x") + "}", "60000"),
    "a huge string": ('{"__metadata__":{"a":"' + "x" * 8_000_000 + '"}}', "numbered layers"),
    "a huge dtype": (
        '{"a":{"dtype":"' + "x" * 8_000_000 + '","shape":[],"data_offsets":[0,0]}}', "unknown dtype"
    ),
    "long numbers": ('{"a":[' + ("9" * 4000 + ",") * 1000 + "1]}", "not exactly the keys"),
    "zeros": ("\0" * 8_000_000, "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case: str, tmp_path: Path) -> None:
    text, message = HEADERS[case]
    model = save_model(tmp_path / "model", num_layers=2)
    good = save_model(tmp_path / "good", num_layers=2)
    raw = text.encode()
    (model / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    assert message in measured("model", model, len(raw), good)


def test_an_index(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_layers=2, shards=2)
    file = "model-00001-of-00002.safetensors"
    text = ",".join(f'"x{i}":"{file}"' for i in range(100_000))
    raw = f'{{"weight_map":{{{text},"x0":"{file}"}}}}'.encode()
    (model / "model.safetensors.index.json").write_bytes(raw)
    assert "'x0' appears twice" in measured("model", model, len(raw), model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "larger than the 10,000,000 bytes"),
        ("tokenizer.json", "larger than the 200,000,000 bytes"),
        ("model.safetensors.index.json", "larger than the 100,000,000 bytes"),
    ],
)
def test_endless_files(name: str, message: str, tmp_path: Path) -> None:
    """A sparse file of 1 TB costs an attacker no disk space."""
    shards = 2 if "index" in name else 1
    model = save_model(tmp_path / "model", num_layers=2, shards=shards)
    good = save_model(tmp_path / "good", num_layers=2)
    with (model / name).open("wb") as file:
        file.truncate(10**12)
    assert message in measured("model", model, 0, good)


CONFIGS: dict[str, tuple[str, str]] = {
    "layers": ('"num_hidden_layers": 1000000000000', "num_hidden_layers 1000000000000"),
    "layers elsewhere": (
        '"text_config": {"num_hidden_layers": 1000000000000}',
        "num_hidden_layers 1000000000000",
    ),
    "experts": ('"vision": {"a": [{"num_local_experts": 1000000000}]}', "num_local_experts"),
    "nesting": ('"a": ' + "[" * 900 + "]" * 900, "nested more than 100 deep"),
    "more nesting": ('"a": ' + '{"a":' * 100_000 + "1" + "}" * 100_000, "not valid JSON"),
    "a list of layers": ('"mlp_only_layers": [' + "7," * 2_000_000 + "7]", "ok"),
    "half a character": ('"a": "\\ud800"', "is not valid text"),
    "a long number": ('"num_hidden_layers": ' + "9" * 5000, "not valid JSON"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, tmp_path: Path) -> None:
    text, message = CONFIGS[case]
    model = save_model(tmp_path / "model", num_layers=2)
    good = save_model(tmp_path / "good", num_layers=2)
    plain = (model / "config.json").read_text().rstrip("}")
    (model / "config.json").write_text(f"{plain}, {text}}}")
    assert message in measured("model", model, 2 * len(text), good)


LAUGHS = "a0: &a0 [x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
MERGES = "a0: &a0 {k0: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
HEAD = "schema: gptailor/recipe/1\nmodels: {a: x}\nbase: a\nlayers:\n"
LONG = "".join(map(chr, range(0x4E00, 0x9000)))  # all characters differ: difflib's worst case
NUMBER = HEAD + "- {take: a, layer: "
RECIPES: dict[str, tuple[str, str]] = {
    "a billion laughs": (LAUGHS, "too large once its aliases are expanded"),
    "laughs where a number should be": (
        LAUGHS + HEAD + "- {take: a, layer: *a29}\n", "too large once its aliases"
    ),
    "laughs through merge keys": (MERGES, "too large once its aliases are expanded"),
    "a list in itself": ("a: &a [*a]\n", "too large once its aliases are expanded"),
    "base 60": (NUMBER + "1:" * 300_000 + "1}\n", "characters"),
    "base 60 in fractions": (NUMBER + "1:" * 300_000 + "1.5}\n", "characters"),
    "a long hexadecimal number": (NUMBER + "0x" + "f" * 900_000 + "}\n", "characters"),
    "brackets": ("[" * 1_000_000, "brackets more than 100 deep"),
    "a long name": (HEAD.replace("{a: x}", f"\n  ? {LONG}\n  : x") + "- {take: a}\n", "unknown"),
    "long names alike": (
        HEAD.replace("{a: x}", f"\n  ? {LONG}\n  : x").replace("base: a", f"base: {LONG}x")
        + "- {take: a}\n", "unknown model"
    ),
    "too long": ("#" * 3_000_000, "more than 2,000,000 characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(case: str, tmp_path: Path) -> None:
    text, message = RECIPES[case]
    (tmp_path / "recipe.yaml").write_text(text)
    assert message in measured("recipe", tmp_path / "recipe.yaml", 2 * len(text))


def test_mergekit_with_many_models(tmp_path: Path) -> None:
    models = "".join(f"- {{model: ./{i}/x}}\n" for i in range(2_000))
    text = f"merge_method: linear\nmodels:\n{models}"
    (tmp_path / "m.yaml").write_text(text)
    assert "more than 1000 models" in measured("mergekit", tmp_path / "m.yaml", 10 * len(text))


def test_an_endless_recipe(tmp_path: Path) -> None:
    with (tmp_path / "recipe.yaml").open("wb") as file:
        file.truncate(10**12)
    done = run_python(
        "import sys; from gptailor.cli import main; sys.exit(main(['stitch', *sys.argv[1:]]))",
        tmp_path / "recipe.yaml",
        tmp_path / "out",
    )
    assert done.returncode == 2
    assert "more than 2,000,000 characters" in done.stderr
