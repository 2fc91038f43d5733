"""mergekit's YAML: gptailor builds the model that mergekit builds, to within one rounding.

The goldens are mergekit's own results in float32, rounded once to bfloat16; see
`tools/mergekit_models.py`.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file

from gptailor import cli
from gptailor.errors import UsageError
from gptailor.mergekit import MergekitConfig, read_mergekit, to_recipe
from gptailor.mergekit.config import MERGEKIT_METHODS, mergekit_parameters
from gptailor.mergekit.convert import grouped
from gptailor.mergekit.setting import parse_setting, value_of
from gptailor.merging.registry import METHODS
from gptailor.models.family import Family
from gptailor.recipe import Merge, Recipe, Take, read_recipe
from tests.mergekit.family import GOLDEN, NUM_LAYERS, save_family

NAMES = sorted(path.stem for path in GOLDEN.glob("*.yml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family, with every golden configuration beside it."""
    folder = tmp_path_factory.mktemp("mergekit")
    save_family(folder)
    for path in GOLDEN.glob("*.yml"):
        (folder / path.name).write_text(path.read_text())
    return folder


def parsed(folder: Path, text: str, name: str = "merge.yml") -> MergekitConfig:
    (folder / name).write_text(text)
    config = read_mergekit(folder / name)
    assert config is not None
    return config


def recipe(folder: Path, text: str) -> Recipe:
    config = parsed(folder, text)
    return to_recipe(config, Family(config.models, config.base))


def stitched(source: Path, out: Path) -> Path:
    assert cli.main(["stitch", str(source), str(out), "--no-verify", "--no-sync"]) == 0
    return out


# The result


def steps_apart(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """How many representable numbers apart two tensors are, element by element."""
    kind = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[ours.dtype]
    numbers = [tensor.view(kind).to(torch.int64) for tensor in (ours, theirs)]
    ordered = [torch.where(n < 0, torch.iinfo(kind).min - n, n) for n in numbers]
    return (ordered[0] - ordered[1]).abs()


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_mergekits_within_one_rounding(
    name: str,
    folder: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    out = stitched(folder / f"{name}.yml", tmp_path / "out")
    theirs = load(gzip.decompress((GOLDEN / f"{name}.safetensors.gz").read_bytes()))
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    apart, elements = 0, 0
    for key, tensor in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype), key
        steps = steps_apart(ours[key], tensor)
        assert int(steps.max()) <= 1, (key, int(steps.max()))
        apart, elements = apart + int((steps > 0).sum()), elements + steps.numel()
    record_property("elements_one_rounding_apart", f"{apart} of {elements}")
    print(f"{name}: {apart} of {elements} elements are one rounding apart")
    most = 0.2 if name == "no_dtype" else 0.002  # float32 shows every intermediate rounding
    assert apart <= most * elements


def test_every_method_has_a_golden() -> None:
    tested = {
        yaml.safe_load((GOLDEN / f"{name}.yml").read_text())["merge_method"] for name in NAMES
    }
    same_but_for_masks = {"dare_linear", "della_linear"}
    assert tested | same_but_for_masks == set(MERGEKIT_METHODS)


def test_the_folder_holds_recipe_and_configuration(folder: Path, tmp_path: Path) -> None:
    text = (GOLDEN / "ties.yml").read_text().replace("model: red", f"model: {folder}/red")
    (folder / "absolute.yml").write_text(text)
    out = stitched(folder / "absolute.yml", tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "    merge_method: ties" in card
    assert "    # the base is not listed" in card
    assert str(folder) not in card, "a card is published, and paths are private"
    assert read_recipe(out / "gptailor_recipe.yaml").num_layers == NUM_LAYERS
    again = stitched(out / "gptailor_recipe.yaml", tmp_path / "again")
    weights = [(place / "model.safetensors").read_bytes() for place in (out, again)]
    assert weights[0] == weights[1]


# Settings


def test_a_gradient_is_piecewise_linear_over_the_layers() -> None:
    setting = parse_setting([0, 0.5, 0.3, 0.7, 1], "t")
    for t in np.linspace(0, 1, 23):
        expected = np.interp(t * 4, range(5), [0, 0.5, 0.3, 0.7, 1])
        assert value_of(setting, "any", float(t)) == pytest.approx(expected, abs=1e-12)


def test_the_first_matching_filter_counts() -> None:
    cases = [
        {"filter": "self_attn", "value": [0, 1]},
        {"filter": "proj", "value": 2},
        {"filter": "*", "value": 3},
        {"value": 4},
    ]
    setting = parse_setting(cases, "t")
    assert value_of(setting, "model.layers.1.self_attn.q_proj.weight", 0.25) == 0.25
    assert value_of(setting, "model.layers.1.mlp.up_proj.weight", 0.25) == 2
    assert value_of(setting, "model.norm.weight", 0.25) == 3
    assert value_of(setting[:2], "model.norm.weight", 0.25) is None


def test_one_filter_needs_no_list() -> None:
    setting = parse_setting({"filter": "mlp", "value": 2}, "t")
    assert [value_of(setting, name, 0.5) for name in ("mlp.up_proj", "norm")] == [2, None]


def test_a_flag_has_nothing_between_true_and_false() -> None:
    setting = parse_setting([False, True, False], "normalize")
    found = [value_of(setting, "", t, is_flag=True) for t in (0, 0.4, 0.5, 0.9, 1)]
    assert found == [0, 0, 1, 1, 0]


def test_a_number_that_yaml_reads_as_text_is_a_number() -> None:
    assert isinstance(yaml.safe_load("1e-5"), str)
    assert value_of(parse_setting("1e-5", "tol"), "", 0) == 1e-5


_parts = st.sampled_from(["a", "b", "ab", "mlp", "up", "weight", "norm"])
_names = st.lists(_parts, min_size=1, max_size=3).map(".".join)


@given(st.dictionaries(_names, st.integers(0, 2), min_size=1, max_size=8))
def test_grouped_values_expand_to_the_original_ones(numbers: dict[str, int]) -> None:
    values = {name: {"t": number} for name, number in numbers.items()}
    default, modules = grouped(values)
    for name, value in values.items():
        assert next((v for part, v in modules.items() if part in name), default) == value


def test_groups_have_short_names(folder: Path) -> None:
    found = recipe(folder, (GOLDEN / "slerp_slices.yml").read_text()).layers[3]
    assert found.to_dict() == {
        "merge": "slerp",
        "layer": 3,
        "models": ["base", "red"],  # t goes from the base to the other model
        "t": 0.5,
        "modules": {"self_attn": {"t": 0.7}, "mlp": {"t": 0.3}},
    }


def test_a_slice_of_one_layer_has_the_end_of_a_gradient(folder: Path) -> None:
    text = """
slices:
  - sources: [{model: base, layer_range: [2, 3]}, {model: red, layer_range: [2, 3]}]
merge_method: slerp
base_model: base
parameters: {t: [0.25, 0.75]}
"""
    found = recipe(folder, text)
    (layer,) = found.layers
    assert isinstance(layer, Merge) and isinstance(found.head, Merge)
    assert (layer.src_layer, layer.parameter("t"), found.head.parameter("t")) == (2, 0.75, 0.25)


def test_a_default_applies_where_no_filter_matches(folder: Path) -> None:
    text = """
models: [{model: red, parameters: {weight: 1}}]
merge_method: task_arithmetic
base_model: base
parameters: {lambda: [{filter: proj, value: 0.5}]}
"""
    layer = recipe(folder, text).layers[0]
    for name, value in (("self_attn.q_proj.weight", 0.5), ("input_layernorm.weight", 1.0)):
        merge = layer.at(name)
        assert isinstance(merge, Merge)
        assert dict(merge.parameters)["lambda"] == value


# Models, dtypes, tokenizer


def test_models_get_the_last_part_of_their_path(folder: Path) -> None:
    text = """
models: [{model: base}, {model: untied/base}, {model: "org/name@v1"}, {model: {model: {path: red}}}]
merge_method: karcher
"""
    config = parsed(folder, text)
    assert list(config.models) == ["base", "base-2", "name", "red"]
    assert config.models["name"] == "org/name@v1"
    assert config.models["red"] == str(folder / "red")
    assert (config.base, config.has_base) == ("base", False)


@pytest.mark.parametrize(
    ("lines", "dtype"),
    [
        ("dtype: float16", "float16"),
        ("dtype: float32\nout_dtype: bfloat16", "bfloat16"),
        ("out_dtype: torch.float16", "float16"),
        ("dtype: float32\nout_dtype: null", "float32"),
        ("", "float32"),
    ],
)
def test_dtype_of_the_result(lines: str, dtype: str, folder: Path) -> None:
    assert (
        recipe(folder, f"models: [{{model: red}}]\nmerge_method: karcher\n{lines}").dtype == dtype
    )


@pytest.mark.parametrize("source", ["base", "red", "./red", "{model: red}"])
def test_the_tokenizer_is_the_bases(source: str, folder: Path) -> None:
    text = "models: [{model: green}]\nmerge_method: karcher\nbase_model: red\n"
    found = recipe(folder, f"{text}tokenizer_source: {source}")
    assert found.base == "red"


def test_a_passed_through_model_is_taken(folder: Path) -> None:
    found = recipe(folder, "models: [{model: red}]\nmerge_method: passthrough\n")
    assert found.layers == tuple(Take("red", i) for i in range(NUM_LAYERS))
    assert (found.embeddings, found.head) == ("red", "red")


def test_every_method_of_mergekit_is_declared() -> None:
    assert set(MERGEKIT_METHODS) - {"passthrough"} <= set(METHODS)
    assert mergekit_parameters("della") == (
        ("lambda", "normalize", "rescale"),
        ("weight", "density", "epsilon"),
    )
    assert mergekit_parameters("nuslerp") == (("nuslerp_flatten", "nuslerp_row_wise"), ("weight",))


def test_a_recipe_is_not_a_mergekit_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("schema: gptailor/recipe/1  # merge_method: slerp\n")
    assert read_mergekit(tmp_path / "recipe.yaml") is None
    assert read_mergekit(tmp_path / "missing.yaml") is None
    (tmp_path / "list.yaml").write_text("- merge_method\n")
    assert read_mergekit(tmp_path / "list.yaml") is None


# What is refused

PLAIN: dict[str, Any] = {
    "models": [
        {"model": "red", "parameters": {"weight": 0.5}},
        {"model": "green", "parameters": {"weight": 0.5}},
    ],
    "merge_method": "task_arithmetic",
    "base_model": "base",
}


def slices(*sources: Any, **keys: Any) -> dict[str, Any]:
    return {"models": None, "slices": [{"sources": list(sources), **keys}]}


def source(model: str, *layer_range: int, **keys: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": list(layer_range), **keys}


def method(name: str, *models: str, **keys: Any) -> dict[str, Any]:
    return {"merge_method": name, "models": [{"model": m} for m in models], **keys}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"modules": {"text": {"models": []}}}, "modules: .* merge the text model alone"),
    ({"tokenizer": {"source": "base"}}, "tokenizer: .* leave the key out"),
    ({"chat_template": "auto"}, "chat_template: .* leave the key out"),
    ({"dtyp": "float16"}, "unknown key 'dtyp' .*did you mean 'dtype'"),
    ({"merge_method": "tie"}, "unknown merge_method 'tie' .*did you mean 'ties'"),
    ({"merge_method": "average"}, "unknown merge_method 'average'"),
    ({"merge_method": "ramplus_tl"}, "ramplus_tl is not supported: ram is"),
    ({"merge_method": None}, "unknown merge_method 'None'"),
    ({"models": None}, "needs either 'models' or 'slices', but has neither"),
    ({"slices": [{}]}, "needs either 'models' or 'slices', but has both"),
    ({"models": []}, "models must be a list with at least one entry"),
    ({"models": ["red"]}, r"models\[0\] must be a mapping"),
    ({"models": [{}]}, r"models\[0\]: the key 'model' is missing"),
    ({"models": [{"model": "red", "layer_range": [0, 1]}]}, "unknown key 'layer_range'"),
    ({"models": [{"model": 5}]}, "model is 5, but must be a folder or a hub id"),
    ({"models": [{"model": "red+lora"}]}, "'red.lora': base.lora is not supported: .*peft"),
    ({"models": [{"model": {"model": "red", "lora": "x"}}]}, "lora is not supported: .*peft"),
    ({"models": [{"model": {"override_architecture": "x"}}]}, "override_architecture is not"),
    ({"models": [{"model": {"path": "red"}}]}, "unknown key 'path'"),
    ({"dtype": "int64"}, "unknown dtype 'int64'"),
    ({"out_dtype": "bf16"}, "unknown dtype 'bf16'.*did you mean 'bfloat16'"),
    ({"tokenizer_source": "union"}, "'union' is not supported, .* write 'base'"),
    ({"tokenizer_source": "red"}, "always comes from base_model: write 'base'"),
    ({**method("karcher", "red"), "base_model": None, "tokenizer_source": "base"}, "no base_model"),
    ({"base_model": None}, "task_arithmetic needs a base_model: name one"),
    (method("slerp", "red", "green", base_model=None), "slerp needs a base_model"),
    (method("slerp", "red", "green"), "slerp takes exactly 2 models, not 3"),
    (
        method("nearswap", "red", "green"),
        "nearswap takes exactly 1 models besides base_model, not 2",
    ),
    (method("arcee_fusion", "red", "green"), "arcee_fusion takes exactly 1 .*, not 2"),
    (method("model_stock", "red", "base"), "model_stock takes 2 to 16 models besides .*, not 1"),
    (method("nuslerp", "red", "base"), "nuslerp takes exactly 2 models besides base_model, not 1"),
    (method("ties", "base"), "ties takes 1 to 16 models besides base_model, not 0"),
    (
        method("passthrough", "red"),
        r"passthrough takes exactly one model, not 2 \(base_model counts",
    ),
    (method("karcher", "red", "./red"), "red is named twice"),
    (
        method("slerp", "red"),
        "slerp needs the parameter t, and no value applies to model.embed_tokens",
    ),
    (
        {"models": [{"model": "red"}, PLAIN["models"][1]]},
        "task_arithmetic needs the parameter weight of red, and no value applies to model.emb",
    ),
    (
        {"merge_method": "linear"},
        r"needs the parameter weight of base, .*\(linear merges the base_model like any other",
    ),
    (
        {"parameters": {"weight": 1}, "models": [{"model": "red", "parameters": {"lambda": 1}}]},
        "lambda of task_arithmetic can't be set for a single model .*: move it",
    ),
    ({"parameters": {"density": 0.5}}, "unknown parameter of task_arithmetic 'density'"),
    ({"parameters": {"normalise": True}}, "'normalise' .*did you mean 'normalize'"),
    ({"parameters": [1]}, "parameters must be a mapping"),
    ({"parameters": {"lambda": "big"}}, "lambda is 'big', but must be a number"),
    ({"parameters": {"lambda": None}}, "lambda is None, but must be a number"),
    ({"parameters": {"lambda": float("nan")}}, "lambda is nan, but must be a number"),
    ({"parameters": {"lambda": []}}, "lambda is an empty list"),
    ({"parameters": {"lambda": [1, "x"]}}, r"lambda\[1\] is 'x', but must be a number"),
    ({"parameters": {"lambda": [1, {"value": 1}]}}, r"lambda\[1\] is .*, but must be a number"),
    ({"parameters": {"lambda": {"mlp": 1}}}, "unknown key 'mlp' .*Known: filter, value"),
    ({"parameters": {"lambda": [{"filter": "mlp"}]}}, r"lambda\[0\]: the key 'value' is missing"),
    ({"parameters": {"lambda": [{"filtr": "a", "value": 1}]}}, "did you mean 'filter'"),
    ({"parameters": {"lambda": [{"filter": 5, "value": 1}]}}, "filter is 5, but must be part"),
    ({"parameters": {"lambda": 1e9}}, "lambda is 1e.09, outside its bounds"),
    ({"parameters": {"normalize": 0.5}}, "normalize is 0.5 for .*, but must be true or false"),
    (slices(residual_weight=0.5), "residual_weight has no effect"),
    (slices(base_model="red"), "a slice can't have a base of its own"),
    (slices(source("red", 0, 2)), "base_model is not among the sources, and task_arithmetic needs"),
    (slices(), "sources must be a list with at least one entry"),
    (slices(source("red", 0, 2), source("base", 1, 3)), "layer_range differs among the sources"),
    (slices(source("red", 2, 2)), r"layer_range is \[2, 2\], but must be"),
    (slices(source("red", 0, 1, 2)), r"layer_range is \[0, 1, 2\], but must be"),
    (slices(source("red", -1, 2)), r"layer_range is \[-1, 2\], but must be"),
    (slices({"model": "red"}), "layer_range is None, but must be"),
    (slices(source("red", 0, 9), source("base", 0, 9)), r"\[0, 9\], but the models have 5 layers"),
    (slices(source("red", 0, 1, layers=3)), "unknown key 'layers' .*'layer_range'"),
    (slices(source("red", 0, 1), parameter={}), "unknown key 'parameter' .*'parameters'"),
    ({"models": None, "slices": [{}]}, "the key 'sources' is missing"),
    ({"models": None, "slices": ["red"]}, r"slices\[0\] must be a mapping"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[text for _, text in REFUSED])
def test_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    data = {key: value for key, value in (PLAIN | changes).items() if value is not None}
    if changes.get("merge_method", "") is None:
        data["merge_method"] = None
    with pytest.raises(UsageError, match=message) as caught:
        recipe(folder, yaml.safe_dump(data))
    assert str(caught.value).count("merge.yml") >= 1
    assert "\n" not in str(caught.value)


def test_a_model_is_looked_for_beside_the_file_then_as_mergekit_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far" / "red").mkdir(parents=True)
    monkeypatch.chdir(folder)
    text = "models: [{model: ./red}, {model: ./green}, {model: untied/red}]\nmerge_method: karcher"
    refs = [Path(ref) for ref in parsed(tmp_path / "far", text).models.values()]
    assert refs == [tmp_path / "far" / "red", folder / "green", folder / "untied" / "red"]


def test_models_of_several_dtypes_need_one_for_the_result(folder: Path, tmp_path: Path) -> None:
    text = "models: [{model: base}, {model: half}]\nmerge_method: karcher\n"
    config = parsed(folder, text)
    half = stitched_half(folder, tmp_path)
    family = Family({"base": str(folder / "base"), "half": str(half)}, "base")
    with pytest.raises(UsageError, match=r"several dtypes \(BF16, F32\): add out_dtype"):
        to_recipe(config, family)


def stitched_half(folder: Path, tmp_path: Path) -> Path:
    text = "models: [{model: red}]\nmerge_method: passthrough\ndtype: bfloat16\n"
    (folder / "half.yml").write_text(text)
    return stitched(folder / "half.yml", tmp_path / "half")


def test_a_wrong_file_ends_with_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "wrong.yml").write_text("merge_method: ties\nmodels: [{model: red}]\n")
    assert cli.main(["stitch", str(folder / "wrong.yml"), str(tmp_path / "out")]) == 2
    assert "wrong.yml: ties needs a base_model" in capsys.readouterr().err
