"""Recipes have strict keys and one canonical text.

The text is compared with `tests/golden/recipe*.yaml`. After a deliberate change, check the
difference and write the new text with `GPTAILOR_BLESS=1 pytest tests/recipe/test_recipe.py`.
Archives and published models hold this text, so the schema's number may have to change too.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.errors import UsageError
from gptailor.recipe import NO_LAYER, Layer, Merge, Recipe, Take, absolute_ref, read_recipe
from gptailor.strict_yaml import load_yaml
from tests.recipe.recipes import MODELS, TA, TIES, merge, recipe, recipes, weights

GOLDEN = Path(__file__).parents[1] / "golden"


def entry(**keys: Any) -> dict[str, Any]:
    return {"schema": "gptailor/recipe/1", "models": MODELS, "base": "base", "layers": [keys]}


def layer(**keys: Any) -> Layer:
    return Recipe.from_dict(entry(**keys)).layers[0]


def refused(data: object) -> str:
    with pytest.raises(UsageError) as caught:
        Recipe.from_dict(data, "r.yaml")
    text = str(caught.value)
    assert "r.yaml" in text
    assert "\n" not in text
    return text


FULL = recipe(
    Take("red", 0),
    Take("green", 3, 0.97),
    Merge("linear", 4, weights(red=0.25, green=0.75), (("normalize", 1.0),)),
    Merge("linear", 5, weights(red=0.25), (("normalize", 0.0),)),
    Merge("task_arithmetic", 1, weights(red=0.5, green=-0.5), (("lambda", 0.7), *TA[1:])),
    Merge("slerp", 8, weights(green=1.0, red=1.0), (("t", 0.3),), 1.5),
    Merge("ties", 7, weights(red=1.0, blue=0.1), (("density", 0.5), *TIES[1:])),
    head="green",
    dtype="float16",
)


SPARSE = Merge(
    "della", 2, weights(red=0.5, blue=1.0),
    (("density", (0.4, 0.6)), ("epsilon", 0.1), ("lambda", 1.1), ("seed", 7.0)),
)  # fmt: skip
PARTS = recipe(
    SPARSE,
    replace(SPARSE, modules=(("self_attn", replace(SPARSE, weights=weights(red=1.0, blue=1.0))),)),
    Take("red", 3, 0.9, modules=(("mlp", Take("green", 3)), ("norm", merge("karcher", "red")))),
    Merge("nearswap", 4, weights(red=1.0), (("t", 0.001),)),
    Merge("model_stock", 5, weights(blue=1.0, red=1.0), (("filter_wise", 1.0),)),
    embeddings=Merge("average", NO_LAYER, weights(red=1.0, blue=1.0)),
    head=Take("red", NO_LAYER, modules=(("norm", Take("blue", NO_LAYER)),)),
)


# Text


@pytest.mark.parametrize(
    ("name", "made", "point"),
    [("recipe.yaml", FULL, "d166cca7"), ("recipe_parts.yaml", PARTS, "6d7d9b4a")],
)
def test_golden_text_and_hash(name: str, made: Recipe, point: str) -> None:
    """The hash is the archive's key; it may change only together with the schema's number."""
    if os.environ.get("GPTAILOR_BLESS"):
        (GOLDEN / name).write_text(made.to_yaml())
    assert made.to_yaml() == (GOLDEN / name).read_text()
    read = Recipe.from_yaml((GOLDEN / name).read_text())
    assert read == made
    assert made.point == read.point == read.hash[:8] == point


def test_the_example_of_the_documentation() -> None:
    text = """
schema: gptailor/recipe/1
models: {base: HuggingFaceTB/SmolLM2-135M, math: ./models/math, code: ./models/code}
base: base                  # gives config, tokenizer, and whatever no entry names
dtype: bfloat16
embeddings: base
head: base
layers:
  - {take: math, layer: 0}
  - {merge: task_arithmetic, layer: 1, weights: {math: 0.5, code: 0.5}, lambda: 1.0}
  - {take: base, layer: 3, scale: 0.97}
"""
    found = Recipe.from_yaml(text)
    assert found.layers == (
        Take("math", 0),
        Merge("task_arithmetic", 1, weights(math=0.5, code=0.5), TA),
        Take("base", 3, 0.97),
    )
    assert found.src_layers == (0, 1, 3)
    assert found.num_layers == 3


def test_defaults() -> None:
    found = Recipe.from_dict(entry(take="red", layer=2))
    assert (found.embeddings, found.head, found.dtype) == ("base", "base", "bfloat16")


@settings(max_examples=150, deadline=None)
@given(recipes())
def test_round_trip(made: Recipe) -> None:
    text = made.to_yaml()
    again = Recipe.from_yaml(text)
    assert again == made
    assert again.to_yaml() == text
    assert Recipe.from_dict(yaml.safe_load(text)) == made


# What is refused


def test_keys() -> None:
    good = entry(take="red", layer=0)
    assert "unknown key 'layer' in r.yaml: did you mean 'layers'?" in refused(good | {"layer": 1})
    assert "unknown key 'heads' in r.yaml: did you mean 'head'?" in refused(good | {"heads": 1})
    for key in ("models", "base", "layers"):
        assert f"the key {key!r} is missing" in refused({k: v for k, v in good.items() if k != key})
    assert "schema is 'gptailor/recipe/2'" in refused(good | {"schema": "gptailor/recipe/2"})
    assert "schema is None" in refused({k: v for k, v in good.items() if k != "schema"})
    no_mappings: tuple[object, ...] = (None, [], "text", 3)
    for nothing in no_mappings:
        assert "must be a mapping" in refused(nothing)
    no_entries: tuple[object, ...] = (None, [], {}, "x")
    for layers in no_entries:
        assert "layers must be a list with at least one entry" in refused(good | {"layers": layers})
    assert "models: base is 3, but must be a folder" in refused(good | {"models": {"base": 3}})
    assert "models must map names" in refused(good | {"models": {1: "x", "base": "b"}})
    assert "models must be a mapping" in refused(good | {"models": ["base"]})


@pytest.mark.parametrize("key", ["base", "embeddings", "head"])
@pytest.mark.parametrize("name", ["rad", 3, None, ["red"], {"red": 1}])
def test_models(key: str, name: object) -> None:
    text = refused(entry(take="red", layer=0) | {key: name})
    assert f"unknown model {str(name)!r} in r.yaml: {key}" in text
    if name == "rad":
        assert "did you mean 'red'?" in text


@pytest.mark.parametrize("dtype", ["bf16", "float64", None, ["float32"], 16])
def test_dtype(dtype: object) -> None:
    assert f"unknown dtype {str(dtype)!r}" in refused(entry(take="red", layer=0) | {"dtype": dtype})


LAYERS: list[tuple[dict[str, Any], str]] = [
    ({"layer": 1}, "layers[0] needs either 'take' or 'merge'"),
    ({"tkae": "red", "layer": 1}, "unknown key 'tkae' in r.yaml: layers[0]: did you mean 'take'?"),
    ({"take": "red", "merge": "linear", "layer": 1}, "needs either 'take' or 'merge'"),
    ({"take": "rde", "layer": 1}, "unknown model 'rde' in r.yaml: layers[0]: did you mean 'red'?"),
    ({"take": ["red"], "layer": 1}, "unknown model"),
    ({"take": None, "layer": 1}, "unknown model 'None'"),
    ({"take": "red"}, "layer is None, but must be 0 or a higher integer"),
    ({"take": "red", "layer": -1}, "layer is -1"),
    ({"take": "red", "layer": True}, "layer is True"),
    ({"take": "red", "layer": 1.0}, "layer is 1.0"),
    ({"take": "red", "layer": "1"}, "layer is '1'"),
    ({"take": "red", "layer": [1]}, "layer is [1]"),
    ({"take": "red", "layer": 1, "scale": 0.09}, "scale is 0.09, outside its bounds 0.1 to 10"),
    ({"take": "red", "layer": 1, "scale": 11}, "scale is 11, outside"),
    ({"take": "red", "layer": 1, "scale": "1"}, "scale is '1', but must be a number"),
    ({"take": "red", "layer": 1, "scale": True}, "scale is True, but must be a number"),
    ({"take": "red", "layer": 1, "scale": float("nan")}, "scale is nan"),
    ({"take": "red", "layer": 1, "scale": None}, "scale is None"),
    ({"take": "red", "layer": 1, "lambda": 1}, "unknown key 'lambda'"),
    ({"take": "red", "layer": 1, "scal": 1}, "unknown key 'scal' in r.yaml: layers[0]: did you "
     "mean 'scale'?"),
    ({"merge": "slrep", "layer": 1, "models": ["red", "blue"]},
     "unknown merge method 'slrep' in r.yaml: layers[0]: did you mean 'slerp'?"),
    ({"merge": ["slerp"], "layer": 1, "models": ["red", "blue"]}, "unknown merge method"),
    ({"merge": None, "layer": 1}, "unknown merge method 'None'"),
    ({"merge": "slerp", "layer": 1}, "the key 'models' is missing"),
    ({"merge": "slerp", "layer": 1, "models": ["red", "blue"]}, "slerp needs a value for t"),
    ({"merge": "slerp", "layer": 1, "models": ["red"], "t": 0.5}, "takes exactly 2 models, not 1"),
    ({"merge": "slerp", "layer": 1, "models": ["red", "green", "blue"], "t": 0.5}, "not 3"),
    ({"merge": "slerp", "layer": 1, "models": "red", "t": 0.5}, "models must be a list"),
    ({"merge": "slerp", "layer": 1, "models": [["red"], "blue"], "t": 0.5}, "unknown model"),
    ({"merge": "slerp", "layer": 1, "models": ["red", "blue"], "t": 1.01},
     "t is 1.01, outside its bounds 0 to 1"),
    ({"merge": "slerp", "layer": 1, "weights": {"red": 1, "blue": 1}, "t": 0.5}, "'models' is mis"),
    ({"merge": "ties", "layer": 1}, "the key 'weights' is missing"),
    ({"merge": "ties", "layer": 1, "weights": {}}, "ties takes 1 to 16 models, not 0"),
    ({"merge": "ties", "layer": 1, "weights": ["red"]}, "weights must be a mapping"),
    ({"merge": "ties", "layer": 1, "weights": {"redd": 1}}, "did you mean 'red'?"),
    ({"merge": "ties", "layer": 1, "weights": {"red": 1001}},
     "the weight of red is 1001, outside its bounds -1000 to 1000"),
    ({"merge": "ties", "layer": 1, "weights": {"red": "1"}}, "the weight of red is '1', but must"),
    ({"merge": "ties", "layer": 1, "weights": {"red": float("inf")}}, "the weight of red is inf"),
    ({"merge": "ties", "layer": 1, "weights": {"red": None}}, "the weight of red is None"),
    ({"merge": "ties", "layer": 1, "weights": {"red": 1}, "density": -0.1}, "density is -0.1"),
    ({"merge": "ties", "layer": 1, "weights": {"red": 1}, "density": [1]}, "density is [1]"),
    ({"merge": "ties", "layer": 1, "weights": {"red": 1}, "densty": 1}, "did you mean 'density'?"),
    ({"merge": "ties", "layer": 1, "weights": {"red": 1}, "normalize": 1},
     "normalize is 1, but must be true or false"),
    ({"merge": "task_arithmetic", "layer": 1, "weights": {"red": 1}, "lamda": 1},
     "did you mean 'lambda'?"),
    ({"merge": "task_arithmetic", "layer": 1, "weights": {"red": 1}, "lambda": 101},
     "lambda is 101, outside its bounds -100 to 100"),
    ({"merge": "linear", "layer": 1, "weights": {"red": 1, "blue": -1}},
     "the weights of linear add up to zero"),
    ({"merge": "multislerp", "layer": 1, "weights": {"red": 1, "blue": -1}},
     "the weights of multislerp add up to zero"),
    ({"merge": "nuslerp", "layer": 1, "weights": {"red": 1}}, "nuslerp takes exactly 2 models"),
    ({"merge": "model_stock", "layer": 1, "models": ["red"]}, "takes 2 to 16 models, not 1"),
    ({"merge": "nearswap", "layer": 1, "models": ["red", "blue"], "t": 1}, "exactly 1 model,"),
    ({"merge": "nearswap", "layer": 1, "models": ["red"]}, "nearswap needs a value for t"),
    ({"merge": "sce", "layer": 1, "models": ["red", "base"]},
     "base is the base, which sce uses anyway"),
    ({"merge": "nuslerp", "layer": 1, "weights": {"red": 1, "base": 1}, "task_vectors": True},
     "base is the base, which nuslerp uses anyway"),
    ({"merge": "karcher", "layer": 1, "weights": {"red": 1}}, "the key 'models' is missing"),
    ({"merge": "karcher", "layer": 1, "models": ["red"], "weights": {}}, "unknown key 'weights'"),
    ({"merge": "ties", "layer": 1, "weights": {"red": 1}, "density": {"blue": 0.5}},
     "unknown source 'blue' in r.yaml: layers[0]: density"),
    ({"merge": "dare_ties", "layer": 1, "weights": {"red": 1}, "seed": 0.5}, "a whole number"),
    ({"merge": "della", "layer": 1, "weights": {"red": 1}, "density": 0.9}, "do not fit together"),
    ({"take": "red", "layer": 1, "modules": []}, "modules must be a mapping"),
    ({"take": "red", "layer": 1, "modules": {"mlp": "red"}}, "modules: mlp must be a mapping"),
    ({"take": "red", "layer": 1, "modules": {1: {}}}, "1 is not part of a tensor's name"),
    ({"take": "red", "layer": 1, "modules": {"": {}}}, "'' is not part of a tensor's name"),
    ({"take": "red", "layer": 1, "modules": {"mlp": {"t": 1}}}, "modules: mlp"),
    ({"take": "red", "layer": 1, "modules": {"mlp": {"take": "rde"}}}, "did you mean 'red'?"),
    ({"take": "red", "layer": 1, "modules": {"mlp": {"take": "red", "layer": 2}}},
     "unknown key 'layer' in r.yaml: layers[0]: modules: mlp"),
    ({"take": "red", "layer": 1, "modules": {"mlp": {"merge": "karcher"}}}, "'models' is missing"),
    ({"take": "red", "layer": 1, "modules": {"m": {"take": "red", "merge": "ties"}}}, "needs"),
    ({"merge": "slerp", "layer": 1, "models": ["red", "blue"], "t": 0.5,
      "modules": {"mlp": {"t": 2}}}, "modules: mlp: t is 2, outside its bounds 0 to 1"),
    ({"merge": "slerp", "layer": 1, "models": ["red", "blue"], "t": 0.5,
      "modules": {"mlp": {"scale": 2}}}, "unknown key 'scale' in r.yaml: layers[0]: modules: mlp"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), LAYERS)
def test_layers(keys: dict[str, Any], message: str) -> None:
    text = refused(entry(**keys))
    assert message in text
    assert "layers[0]" in text


def test_modules_override_keys_of_their_layer() -> None:
    found = layer(
        merge="ties",
        layer=1,
        weights={"red": 0.5, "blue": 0.7},
        density={"red": 0.2, "blue": 0.4},
        scale=0.5,
        modules={
            "q_proj": {"lambda": 0.5},
            "self_attn": {"weights": {"blue": 1.0, "green": 0.1}},
            "up_proj": {"take": "green"},
            "mlp": {"merge": "karcher", "models": ["red", "blue"]},
        },
    )
    assert isinstance(found, Merge)
    sparse, whole = (("density", (0.2, 0.4)), *TIES[1:]), weights(red=0.5, blue=0.7)
    own = Merge("ties", 1, whole, sparse, 0.5)
    assert found.at("input_layernorm.weight") == own
    assert found.at("self_attn.q_proj.weight") == replace(
        own, parameters=(sparse[0], ("lambda", 0.5), *TIES[2:])
    )
    assert found.at("self_attn.k_proj.weight") == replace(  # blue's density stays, green has none
        own, weights=weights(green=0.1, blue=1.0), parameters=(("density", (1.0, 0.4)),)
    )
    assert found.at("mlp.up_proj.weight") == Take("green", 1, 0.5)
    assert found.at("mlp.down_proj.weight") == replace(merge("karcher", "red", "blue"), scale=0.5)
    assert found.used_models == ("red", "blue", "green")
    assert found.models == ("red", "blue")


@pytest.mark.parametrize("key", ["embeddings", "head"])
def test_ends(key: str) -> None:
    def read(end: object) -> Recipe:
        return Recipe.from_dict(entry(take="red", layer=0) | {key: end}, "r.yaml")

    made = read({"merge": "linear", "weights": {"red": 1, "blue": 2}, "modules": {"norm": {}}})
    end = getattr(made, key)
    assert end == Merge("linear", NO_LAYER, weights(red=1.0, blue=2.0), modules=end.modules)
    line = f"{key}: {{merge: linear, weights: {{red: 1.0, blue: 2.0}}, modules: {{norm: {{}}}}}}\n"
    assert line in made.to_yaml()
    assert Recipe.from_yaml(made.to_yaml()) == made
    assert getattr(read({"take": "blue"}), key) == "blue"
    for wrong, message in [
        ({"merge": "linear", "layer": 0, "weights": {"red": 1}}, f"r.yaml: {key}: unknown key"),
        ({"merge": "linear", "weights": {"red": 1}, "scale": 0.5}, "unknown key 'scale'"),
        ({"merge": "liner", "weights": {"red": 1}}, "did you mean 'linear'?"),
    ]:
        text = refused(entry(take="red", layer=0) | {key: wrong})
        assert message.partition(": unknown")[0] in text and key in text


def test_a_number_of_400_digits_is_refused() -> None:
    refused(entry(take="red", layer=1, scale=10**400))


def test_an_entry_that_is_not_a_mapping() -> None:
    for wrong in (None, "red", 3, ["take"]):
        assert "layers[0] must be a mapping" in refused(entry() | {"layers": [wrong]})


def test_the_order_of_weights_is_that_of_the_models() -> None:
    found = layer(merge="linear", layer=1, weights={"blue": 1, "red": 2})
    assert isinstance(found, Merge)
    assert found.weights == (("red", 2.0), ("blue", 1.0))


BAD_YAML = [
    ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is written twice"),
    ("a: 1\n'a': 3\n", "line 2: the key 'a' is written twice"),
    ("1: a\n'1': b\n", "line 2: the key '1' is written twice"),
    ("x: &x {a: 1}\ny: {<<: *x, b: 1, b: 2}\n", "line 2: the key 'b' is written twice"),
    ("x: &x {a: 1}\ny: {<<: {<<: *x, b: 1, b: 2}}\n", "line 2: the key 'b' is written twice"),
    ("x: &x {a: 1}\ny: {<<: *x, <<: *x}\n", "line 2: the key '<<' is written twice"),
    ("a: 1\n---\na: 2\n", "line 2: a second document begins here, but a file may hold only one"),
    ("layers:\n  - {take: red, take: blue}\n", "the key 'take' is written twice"),
    ("a: [1\n", "line 2"),
    ("? [a]\n: b\n", "line 1: a key that is a list or a mapping"),
    ("? {a: 1}\n: b\n", "line 1: a key that is a list or a mapping"),
    ("a: !!timestamp 2001-99-99\n", "month must be in 1..12"),
    ("a: " + "9" * 5000 + "\n", "a number of 5000 characters"),
    ("a: !!python/object:os.system x\n", "could not determine a constructor"),
    ("a: \x00\n", "special characters are not allowed"),
    ("a: *nobody\n", "found undefined alias"),
    ("a: &a [*a]\nb: {<<: 3}\n", "line"),
    ("[" * 5000, "brackets more than 100 deep"),
    ("- " * 5000, "recursion"),
    ("a\n\tb: [", ""),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML)
def test_yaml(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_yaml(text, "r.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("r.yaml")
    assert "\n" not in str(caught.value)


def test_merge_keys_may_be_overridden() -> None:
    """As in any YAML, a mapping's own key wins, then the first one that is merged."""
    text = """
p: &p {take: red, layer: 0}
q: &q {<<: *p, layer: 1}
r: {<<: *q, layer: 2}
s: {layer: 3, <<: [*q, {take: blue, scale: 2}]}
t: {<<: &u {<<: *p, layer: 4}}
u: *u
"""
    assert load_yaml(text, "r.yaml") == yaml.safe_load(text)
    assert load_yaml(text, "r.yaml")["s"] == {"take": "red", "layer": 3, "scale": 2}


AMBIGUOUS = ["no", "On", "OFF", "yes", "null", "~", "1e3", "007", "1_000", "0x1F", "2026-01-01"]


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_names_that_yaml_reads_as_something_else(name: str) -> None:
    """As keys they are names; as values too, unless YAML 1.2 gives them another meaning."""
    text = f"""
schema: gptailor/recipe/1
models: {{base: ./base, {name}: ./x}}
base: base
layers:
  - {{merge: linear, layer: 0, weights: {{{name}: 1.0, base: 0.5}}}}
  - {{take: '{name}', layer: 1}}
"""
    recipe = Recipe.from_yaml(text)
    assert list(recipe.models) == ["base", name]
    assert recipe.layers[0].models == ("base", name)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    unquoted = text.replace(f"'{name}'", name)
    if name.lower() in ("no", "on", "off", "yes", "2026-01-01"):
        assert Recipe.from_yaml(unquoted) == recipe
    elif name == "1e3":
        with pytest.raises(
            UsageError, match=r"layers\[1\]: YAML reads the name .* as 1000\.0: put"
        ):
            Recipe.from_yaml(unquoted)


def test_a_number_is_a_name_where_a_model_has_that_name() -> None:
    data = entry(take=7, layer=0) | {"models": {"base": "./b", "7": "./x"}, "base": "base"}
    assert Recipe.from_dict(data).layers[0].models == ("7",)
    assert "YAML reads the name of a model as true: put it in quotes" in refused(
        entry(take=True, layer=0)
    )


@pytest.mark.parametrize(("word", "value"), [("yes", 1.0), ("Off", 0.0), ("true", 1.0)])
def test_truth_values_may_be_words_of_yaml_1_1(word: str, value: float) -> None:
    text = Recipe.from_dict(entry(merge="linear", layer=0, weights={"red": 1, "blue": 1})).to_yaml()
    text = text.replace("merge: linear,", f"merge: linear, normalize: {word},")
    (found,) = Recipe.from_yaml(text).layers
    assert isinstance(found, Merge)
    assert found.number("normalize") == value


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.text("{}[]:,-&*!?#|>'\" \na1<")
)
def test_any_text_is_a_usage_error_or_data(text: str) -> None:
    try:
        Recipe.from_yaml(text, "r.yaml")
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        raise AssertionError("this can't be a recipe")


# Files


def test_model_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    for name in ("near", "sub"):
        (tmp_path / "a" / name).mkdir(parents=True)
    models = {"base": "near", "red": "./sub", "green": "../x", "blue": "org/hub@v1", "far": "/y"}
    path = tmp_path / "a" / "r.yaml"
    path.write_text(recipe(Take("red", 0), models=models).to_yaml())
    assert dict(read_recipe(path).models) == {
        "base": str(tmp_path / "a" / "near"),
        "red": str(tmp_path / "a" / "sub"),
        "green": str(tmp_path / "x"),
        "blue": "org/hub@v1",
        "far": "/y",
    }
    assert absolute_ref("~/x", tmp_path) == str(Path.home() / "x")


def test_a_recipe_that_can_not_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(UsageError, match=f"The recipe {path} can't be read"):
            read_recipe(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a text file"):
        read_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", ["a\x85b", "line\nbreak", "bell\x07", "\u202ertl"])
def test_names_that_cannot_be_shown_are_refused(name: str) -> None:
    data = entry() | {"models": {"base": "./b", name: "./c"}, "base": "base"}
    assert "can't be shown" in refused(data)


def test_a_number_may_have_an_exponent_and_no_point() -> None:
    text = """
schema: gptailor/recipe/1
models: {base: ./base, a: ./a, b: ./b}
base: base
layers:
  - {merge: karcher, layer: 0, models: [a, b], tol: 1e-3}
  - {merge: ram, layer: 1, models: [a, b], epsilon: 2E-6}
"""
    recipe = Recipe.from_yaml(text)
    values = [dict(layer.parameters) for layer in recipe.layers if isinstance(layer, Merge)]
    assert (values[0]["tol"], values[1]["epsilon"]) == (1e-3, 2e-6)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
