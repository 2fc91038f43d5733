"""What is written: the right bytes, whole or not at all, and loadable by stock tools."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptailor.errors import ModelError, ResourceError, UsageError
from gptailor.merging import reference
from gptailor.merging.registry import METHODS
from gptailor.models.calibration import Calibration
from gptailor.models.family import Family
from gptailor.recipe import DTYPES, Layer, Merge, Recipe, Take, read_recipe
from gptailor.stitching.write import RECIPE_FILE, write_model
from tests.calibrations import save_statistics
from tests.models.tiny import (
    FFN,
    LAYER_SHAPES,
    NAMES,
    Array,
    drawn,
    encoded,
    floats,
    free_bytes,
    load_model,
    load_tensors,
    run_python,
    save_family,
    save_model,
    small_disk,
)

MODELS = ("base", "red", "green", "blue")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """A family in each dtype that can be merged."""
    root = tmp_path_factory.mktemp("families")
    return {d: save_family(root / d, MODELS, num_layers=5, dtype=d) for d in ("BF16", "F16", "F32")}


@pytest.fixture(scope="module")
def models(families: dict[str, dict[str, str]]) -> dict[str, str]:
    return families["BF16"]


def recipe(models: dict[str, str], *layers: Layer, **changes: Any) -> Recipe:
    ends = {"base": "base", "embeddings": "base", "head": "base"} | changes
    return Recipe(models, layers=layers, **ends)


def stitched(made: Recipe, out: Path, **options: Any) -> dict[str, Any]:
    write_model(made, Family(made.models, made.base), out, sync=False, **options)
    return load_model(out)


MERGES = {
    "linear": Merge(
        "linear", 2, (("red", 0.3), ("green", 0.9), ("blue", -0.2)), (("normalize", 1.0),)
    ),
    "linear-sum": Merge("linear", 2, (("red", 0.3), ("green", 0.9)), (("normalize", 0.0),)),
    "linear-one": Merge("linear", 2, (("red", 0.7),), (("normalize", 0.0),)),
    "task_arithmetic": Merge(
        "task_arithmetic", 2, (("red", 0.5), ("green", 0.7)), (("lambda", 0.9), ("normalize", 0.0))
    ),
    "task_arithmetic-mean": Merge(
        "task_arithmetic", 2, (("red", 0.5), ("blue", 0.7)), (("lambda", 1.0), ("normalize", 1.0))
    ),
    "slerp": Merge("slerp", 2, (("red", 1.0), ("green", 1.0)), (("t", 0.3),)),
    "slerp-back": Merge("slerp", 2, (("green", 1.0), ("base", 1.0)), (("t", 0.8),)),
    "ties": Merge(
        "ties", 2, (("red", 1.0), ("green", 0.5), ("blue", 0.8)),
        (("density", 0.4), ("lambda", 0.9), ("normalize", 1.0)),
    ),
    "ties-sum": Merge(
        "ties", 2, (("red", 0.4), ("green", 0.5)),
        (("density", 1.0), ("lambda", 1.0), ("normalize", 0.0)),
    ),
    "ties-one": Merge(
        "ties", 2, (("red", 0.4),), (("density", 0.3), ("lambda", 1.0), ("normalize", 1.0))
    ),
    "ties-each": Merge(
        "ties", 2, (("red", 0.4), ("green", 0.5)), (("density", (0.3, 0.8)), ("rescale", 1.0))
    ),
    "average": Merge("average", 2, (("red", 1.0), ("green", 1.0), ("red", 1.0))),
    "nuslerp": Merge("nuslerp", 2, (("red", 0.4), ("green", 0.5))),
    "nuslerp-rows": Merge(
        "nuslerp", 2, (("red", 0.4), ("green", 0.5)),
        (("nuslerp_flatten", 0.0), ("task_vectors", 1.0)),
    ),
    "nuslerp-columns": Merge(
        "nuslerp", 2, (("red", 0.4), ("green", 0.5)),
        (("nuslerp_flatten", 0.0), ("nuslerp_row_wise", 1.0)),
    ),
    "multislerp": Merge("multislerp", 2, (("red", 0.4), ("green", 0.5), ("blue", 0.1))),
    "multislerp-base": Merge(
        "multislerp", 2, (("red", 0.4), ("green", 0.5)), (("task_vectors", 1.0),)
    ),
    "karcher": Merge("karcher", 2, (("red", 1.0), ("green", 1.0), ("blue", 1.0))),
    # sources of random masks are in the order of their folders, which is the canonical order
    "dare_linear": Merge(
        "dare_linear", 2, (("blue", 0.4), ("red", 0.5)), (("density", 0.6), ("seed", 3.0))
    ),
    "dare_ties": Merge(
        "dare_ties", 2, (("blue", 0.4), ("green", 0.3), ("red", 0.5)), (("density", (0.6, 1, 0.2)),)
    ),
    "della": Merge(
        "della", 2, (("blue", 0.4), ("red", 0.5)), (("density", 0.6), ("epsilon", (0.1, 0.2)))
    ),
    "della_linear": Merge("della_linear", 2, (("blue", 0.4), ("red", 0.5)), (("density", 0.6),)),
    "breadcrumbs": Merge(
        "breadcrumbs", 2, (("red", 0.4), ("green", 0.5)), (("density", 0.6), ("gamma", 0.1))
    ),
    "breadcrumbs_ties": Merge(
        "breadcrumbs_ties", 2, (("red", 0.4), ("green", 0.5)), (("density", 0.6), ("lambda", 0.5))
    ),
    "sce": Merge("sce", 2, (("red", 1.0), ("green", 1.0), ("blue", 1.0)), (("select_topk", 0.4),)),
    "ram": Merge("ram", 2, (("red", 1.0), ("green", 1.0)), (("epsilon", 0.05),)),
    "model_stock": Merge("model_stock", 2, (("red", 1.0), ("green", 1.0), ("blue", 1.0))),
    "model_stock-rows": Merge(
        "model_stock", 2, (("red", 1.0), ("green", 1.0)), (("filter_wise", 1.0),)
    ),
    "stock": Merge("stock", 2, (("red", 1.0), ("green", 1.0))),
    "nearswap": Merge("nearswap", 2, (("red", 1.0),), (("t", 0.02),)),
    "arcee_fusion": Merge("arcee_fusion", 2, (("red", 1.0),)),
    "widen": Merge("widen", 2, (("red", 1.0), ("green", 1.0))),
    "fisher": Merge("fisher", 2, (("red", 0.5), ("green", 1.0), ("blue", 0.2))),
    "fisher-floor": Merge("fisher", 2, (("red", 0.5), ("base", 0.6)), (("floor", 0.1),)),
    "regmean": Merge("regmean", 2, (("red", 0.5), ("green", 1.0), ("blue", 0.2))),
    "regmean-exact": Merge(
        "regmean", 2, (("red", 0.5), ("base", 0.6)), (("reduce_non_diagonal_ratio", 1.0),)
    ),
}  # fmt: skip


def expected(
    merge: Merge, sources: list[Array], base: Array, name: str, statistics: list[Array] | None
) -> Array:
    """The float64 reference for the recipe as it is written, not for its canonical form."""
    is_average = merge.method == "regmean" and statistics is None
    if is_average:
        merge = replace(merge, method="linear", parameters=())
    return reference.merge(
        merge.method,
        sources,
        base if merge.takes_base else None,
        weights=[w for _, w in merge.weights] if METHODS[merge.method].weighted else None,
        parameters=dict(merge.parameters),
        key=int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"),
        statistics=statistics,
    )


def test_every_method_has_a_case() -> None:
    assert {merge.method for merge in MERGES.values()} == set(METHODS)


def one_rounding(value: Array, dtype: str) -> Array:
    """Half a unit in the last place, plus float32's error before the rounding."""
    bits, least = {"F32": (24, -149), "F16": (11, -24), "BF16": (8, -133)}[dtype]
    exponent = np.floor(np.log2(np.maximum(np.abs(value), 1e-300)))
    return np.asarray(2.0 ** np.maximum(exponent - bits, least - 1) + 1e-6)


@pytest.mark.parametrize("in_dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", MERGES)
def test_merges_equal_the_float64_reference(
    name: str, in_dtype: str, families: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    merge, models = MERGES[name], families[in_dtype]
    inputs = {m: load_model(Path(models[m])) for m in MODELS}
    statistics: dict[str, dict[str, Array]] = {m: {} for m in MODELS}
    calibration = None
    if METHODS[merge.method].is_calibrated:
        folder = save_statistics(tmp_path / "calibration", merge.method, models, dtype=in_dtype)
        calibration = Calibration(str(folder))
        for model in MODELS:
            found_there = load_tensors(folder / f"{model}.{merge.method}.safetensors")
            statistics[model] = {n: floats(entry) for n, entry in found_there.items()}
    for dtype, out_dtype in DTYPES.items():
        layers = (Take("red", 0), merge, Take("blue", 4))
        made = recipe(models, *layers, dtype=dtype, calibration=calibration)
        out = stitched(made, tmp_path / dtype)
        for suffix in LAYER_SHAPES:
            source = f"model.layers.2.{suffix}"
            found = out[f"model.layers.1.{suffix}"]
            assert found[:2] == (out_dtype, LAYER_SHAPES[suffix])
            wanted = expected(
                merge, [floats(inputs[m][source]) for m in merge.models],
                floats(inputs["base"][source]), source,
                [statistics[m][source] for m in merge.models]
                if source in statistics[merge.models[0]] else None,
            )  # fmt: skip
            assert np.all(np.abs(floats(found) - wanted) <= one_rounding(wanted, out_dtype)), suffix


@pytest.mark.parametrize("in_dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_takes_are_copied_or_cast_once(
    in_dtype: str, dtype: str, families: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    models, out_dtype = families[in_dtype], DTYPES[dtype]
    made = recipe(models, Take("red", 3), Take("blue", 0), head="green", dtype=dtype)
    out = stitched(made, tmp_path / "out")
    names = {f"model.layers.0.{s}": ("red", f"model.layers.3.{s}") for s in LAYER_SHAPES}
    names |= {f"model.layers.1.{s}": ("blue", f"model.layers.0.{s}") for s in LAYER_SHAPES}
    names["model.embed_tokens.weight"] = ("base", "model.embed_tokens.weight")
    names["model.norm.weight"] = ("green", "model.norm.weight")
    assert set(out) == set(names)
    inputs = {m: load_model(Path(models[m])) for m in MODELS}
    for name, (model, source) in names.items():
        values = floats(inputs[model][source])
        assert out[name] == (out_dtype, values.shape, encoded(values, out_dtype)), name


def test_a_passthrough_stitch_imports_nothing_heavy(models: dict[str, str], tmp_path: Path) -> None:
    made = recipe(models, Take("red", 0), Take("blue", 4))
    (tmp_path / "r.yaml").write_text(made.to_yaml())
    code = (
        "import sys; from gptailor.cli import main\n"
        "code = main(['stitch', sys.argv[1], sys.argv[2], '--no-verify'])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'lm_eval', 'pymoo', 'huggingface_hub'}\n"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    done = run_python(code, tmp_path / "r.yaml", tmp_path / "out")
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    inputs = {m: load_model(Path(models[m])) for m in ("red", "blue")}
    out = load_model(tmp_path / "out")
    for suffix in LAYER_SHAPES:
        assert out[f"model.layers.0.{suffix}"] == inputs["red"][f"model.layers.0.{suffix}"]
        assert out[f"model.layers.1.{suffix}"] == inputs["blue"][f"model.layers.4.{suffix}"]


def test_taking_the_whole_model_gives_the_same_tensors(
    models: dict[str, str], tmp_path: Path
) -> None:
    made = recipe(models, *(Take("red", i) for i in range(5)), embeddings="red", head="red")
    assert stitched(made, tmp_path / "out") == load_model(Path(models["red"]))


def test_shards_as_inputs(families: dict[str, dict[str, str]], tmp_path: Path) -> None:
    whole = families["BF16"]
    parts = {m: str(save_model(tmp_path / m, 5, shards=k)) for k, m in enumerate(MODELS, start=2)}
    layers = (MERGES["ties"], Take("red", 1), MERGES["slerp"], Take("base", 4))
    one = stitched(recipe(whole, *layers), tmp_path / "one")
    two = stitched(recipe(parts, *layers), tmp_path / "two")
    assert one == two
    assert not list((tmp_path / "two").glob("*index*"))


BIG = "model.layers.1.mlp.gate_proj.weight"


def test_threads_and_ways_to_read_change_no_byte(tmp_path: Path) -> None:
    shape = (700, 1001)
    models = {
        m: str(
            save_model(
                tmp_path / m, 2,
                tensors={BIG: ("BF16", shape, encoded(drawn(m, BIG, shape), "BF16"))},
            )
        )
        for m in MODELS
    }  # fmt: skip
    names = ("linear", "slerp", "ties", "dare_ties", "della", "sce", "nuslerp-rows", "widen")
    layers = [replace(MERGES[name], src_layer=1) for name in names]
    made = recipe(models, *layers, replace(MERGES["task_arithmetic"], src_layer=1, scale=0.5))
    files = []
    cases = [(1, "mmap"), (2, "mmap"), (7, "auto"), (2, "pread"), (1, "direct"), (3, "direct")]
    for i, (threads, io) in enumerate(cases):
        out = tmp_path / f"out{i}"
        write_model(made, Family(models, "base", io), out, sync=i % 2 == 0, threads=threads)
        files.append((out / "model.safetensors").read_bytes())
    assert all(file == files[0] for file in files[1:])


def test_the_name_of_a_model_changes_no_byte(models: dict[str, str], tmp_path: Path) -> None:
    merge = Merge("linear", 2, (("red", 0.1), ("green", 0.7), ("blue", 0.3)), (("normalize", 0.0),))
    new = {"base": "base", "red": "z", "green": "y", "blue": "x"}
    renamed = replace(merge, weights=tuple((new[m], w) for m, w in merge.weights))
    other = {new[m]: ref for m, ref in models.items()}
    one = stitched(recipe(models, merge, dtype="float32"), tmp_path / "one")
    two = stitched(recipe(other, renamed, dtype="float32"), tmp_path / "two")
    assert one == two


# The folder


def test_the_folder(models: dict[str, str], tmp_path: Path) -> None:
    for name in ("generation_config.json", "chat_template.jinja", "LICENSE"):
        (Path(models["base"]) / name).write_text(f"{name} of the base")
    made = recipe(models, Take("red", 3), MERGES["slerp"])
    out = tmp_path / "deep" / "er" / "out"
    write_model(made, Family(models, "base"), out, notes="| task | score |")
    assert {p.name for p in out.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "LICENSE", "README.md", RECIPE_FILE,
    }  # fmt: skip
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        assert (out / name).read_bytes() == (Path(models["base"]) / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert config["dtype"] == "bfloat16"
    assert read_recipe(out / RECIPE_FILE).hash == made.hash
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert "2 of 5 layers" in card
    assert "| task | score |" in card
    assert "  0 ← layer 3 of red" in card
    assert str(tmp_path.parent) not in card
    assert (out / "model.safetensors").stat().st_mode & 0o444 == 0o444 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_header_that_safetensors_reads(models: dict[str, str], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    made = recipe(models, Take("red", 3), MERGES["linear"], dtype="float32")
    out = stitched(made, tmp_path / "out")
    theirs = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert {name: value.tobytes() for name, value in theirs.items()} == {
        name: raw for name, (_, _, raw) in out.items()
    }
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    assert (
        json.loads(raw[8:][: int.from_bytes(raw[:8], "little")])["__metadata__"]["format"] == "pt"
    )


def test_inputs_are_not_touched(models: dict[str, str], tmp_path: Path) -> None:
    def state() -> list[tuple[str, int, int]]:
        paths = [p for ref in models.values() for p in [Path(ref), *Path(ref).rglob("*")]]
        return [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(paths)]

    before = state()
    stitched(recipe(models, MERGES["ties"], Take("red", 0)), tmp_path / "out")
    assert state() == before


def test_places_that_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    family = Family(models, "base")
    made = recipe(models, Take("red", 0))
    (tmp_path / "full").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "to_red").symlink_to(models["red"])
    root = Path(models["base"]).parent
    cases = [
        (tmp_path / "full", "already exists"),
        (tmp_path / "file", "already exists"),
        (tmp_path / "link", "already exists"),
        (Path(models["base"]), r"is also an input \(base\)"),
        (Path(models["red"]), r"is also an input \(red\)"),
        (tmp_path / "to_red", r"is also an input \(red\)"),
        (root / "x" / ".." / "red", r"is also an input \(red\)"),
        (root, "is also an input"),
        (Path(models["green"]) / "out", "is inside an input"),
        (tmp_path / "to_red" / "out", "is inside an input"),
    ]
    for out, message in cases:
        with pytest.raises(UsageError, match=message):
            write_model(made, family, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "link", "to_red"]
    assert not (tmp_path / "nowhere").exists()
    assert not (Path(models["green"]) / "out").exists()


def test_a_parent_that_is_a_file(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match=f"{tmp_path / 'file'} can't be written"):
        write_model(recipe(models, Take("red", 0)), Family(models, "base"), tmp_path / "file" / "o")


def test_base_without_tokenizer(tmp_path: Path) -> None:
    models = save_family(tmp_path, ["base"], tokenizer=False)
    with pytest.raises(ModelError, match=r"base has no tokenizer: copy tokenizer\.json"):
        write_model(recipe(models, Take("base", 0)), Family(models, "base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Not a number


def with_nan(folder: Path, name: str, model: str) -> Path:
    values = drawn(model, name, LAYER_SHAPES["mlp.up_proj.weight"])
    values[3, 5] = np.nan
    tensors = {name: ("BF16", values.shape, encoded(values, "BF16"))}
    return save_model(folder, name=model, tensors=tensors)


NAN_CASES = [(m, b) for m in ("linear", "task_arithmetic", "slerp", "ties") for b in MODELS[1:3]]


@pytest.mark.parametrize(
    ("method", "broken"), [*NAN_CASES, ("task_arithmetic", "base"), ("ties", "base")]
)
def test_nan_in_a_merge_names_tensor_and_file(method: str, broken: str, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    models = save_family(tmp_path, MODELS)
    with_nan(tmp_path / broken, name, broken)
    made = recipe(models, Take("red", 0), MERGES[method])
    out = tmp_path / "new" / "out"
    with pytest.raises(ModelError) as caught:
        write_model(made, Family(models, "base"), out)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / broken / 'model.safetensors'}: {name} can't be merged")
    assert "\n" not in text
    assert list(out.parent.iterdir()) == []


def test_nan_that_is_not_merged_is_copied(tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    models = {"base": str(with_nan(tmp_path / "base", name, "base"))}
    copied = stitched(recipe(models, Take("base", 2)), tmp_path / "copy")
    values = load_model(tmp_path / "base")[name]
    assert copied["model.layers.0.mlp.up_proj.weight"] == values
    cast = stitched(recipe(models, Take("base", 2), dtype="float32"), tmp_path / "cast")
    assert np.isnan(floats(cast["model.layers.0.mlp.up_proj.weight"])).sum() == 1


# Too large for float16


def with_number(folder: Path, name: str, value: float, dtype: str = "BF16") -> Path:
    values = drawn(folder.name, name, LAYER_SHAPES["mlp.down_proj.weight"])
    values[3, 5], values[4, 0] = value, np.inf
    tensors = {name: (dtype, values.shape, encoded(values, dtype))}
    return save_model(folder, dtype=dtype, tensors=tensors)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("how", ["taken", "merged", "scaled", "module"])
def test_a_number_too_large_for_float16(how: str, dtype: str, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    models = save_family(tmp_path, MODELS, dtype=dtype)
    value = -70144.0 if how != "scaled" else 40192.0
    with_number(tmp_path / "red", name, value, dtype)
    merge = Merge("linear", 2, (("red", 1.0), ("green", 1.0)), (("normalize", 0.0),))
    second: Layer = Take("red", 2)
    if how == "merged":
        second = merge
    if how == "module":
        second = Take("green", 2, modules=(("mlp.down_proj", Take("red", 2)),))
    first = Take("green", 0, 0.5) if how == "scaled" else Take("green", 0)  # folded: times 2
    made = recipe(models, first, second, dtype="float16")
    with pytest.raises(ModelError) as caught:
        write_model(made, Family(models, "base"), tmp_path / "out", sync=False)
    text = str(caught.value)
    path = tmp_path / "red" / "model.safetensors"
    where = f"{path}: {name}" if how != "merged" else f"{name}, merged from green, red"
    assert text.startswith(f"{where}: element {3 * FFN + 5} is ")
    assert text.endswith("but the largest number in float16 is 65504: use dtype bfloat16.")
    assert not (tmp_path / "out").exists()
    for wide in ("bfloat16", "float32"):
        write_model(
            recipe(models, first, second, dtype=wide), Family(models, "base"),
            tmp_path / wide, sync=False,
        )  # fmt: skip


def test_infinite_numbers_stay_infinite(tmp_path: Path) -> None:
    """Infinity in a source is not an overflow; a tensor taken in its own type keeps its bytes."""
    name = "model.layers.2.mlp.down_proj.weight"
    models = {"base": str(with_number(tmp_path / "base", name, 1.0))}
    for dtype in ("float16", "float32", "bfloat16"):
        made = stitched(recipe(models, Take("base", 2), dtype=dtype), tmp_path / dtype)
        entry = made["model.layers.0.mlp.down_proj.weight"]
        assert np.argwhere(np.isinf(floats(entry))).tolist() == [[4, 0]]
    assert entry == load_model(tmp_path / "base")[name]


# Disk full, kill -9


@pytest.mark.system
@pytest.mark.parametrize("spare", [-1, 1])
def test_a_full_disk_leaves_nothing(spare: int, models: dict[str, str], tmp_path: Path) -> None:
    """With `spare` pages beyond the tensors, it shows before the writing begins or only midway."""
    made = recipe(models, MERGES["linear"], *(Take("red", i) for i in range(5)))
    family = Family(models, "base")
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        n_bytes = write_model(made, family, disk / "fits", sync=False).n_bytes
        page = os.statvfs(disk).f_frsize
        keep = -(-n_bytes // page) * page + spare * page
        (disk / "filler").write_bytes(b"\1" * (free_bytes(disk) - keep))
        with pytest.raises(ResourceError) as caught:
            write_model(made, family, disk / "sub" / "out")
        assert caught.value.exit_code == 4
        assert ("is full" in str(caught.value)) == (spare > 0)
        assert list((disk / "sub").iterdir()) == []
        (disk / "filler").unlink()
        write_model(made, family, disk / "sub" / "out")
        assert load_model(disk / "sub" / "out") == load_model(disk / "fits")


KILLED = """
import os, sys
from gptailor.models.family import Family
from gptailor.recipe import read_recipe
from gptailor.stitching.write import write_model
made = read_recipe(sys.argv[1])
os.fsync = lambda fd: os.kill(os.getpid(), int(sys.argv[3]))
write_model(made, Family(made.models, made.base), sys.argv[2])
"""


@pytest.mark.parametrize("out_name", ["out", "o[u]t*"])
def test_kill_9_leaves_no_output_and_the_next_run_cleans(
    out_name: str, models: dict[str, str], tmp_path: Path
) -> None:
    made = recipe(models, Take("red", 0), MERGES["linear"])
    (tmp_path / "r.yaml").write_text(made.to_yaml())
    out = tmp_path / "place" / out_name
    done = run_python(KILLED, tmp_path / "r.yaml", out, int(signal.SIGKILL))
    assert done.returncode == -signal.SIGKILL
    stale = list(out.parent.iterdir())
    assert len(stale) == 1
    assert stale[0].name.startswith(f".{out_name}.tmp-")
    assert stitched(made, out)
    assert list(out.parent.iterdir()) == [out]


def test_a_stale_folder_with_our_own_process_id(models: dict[str, str], tmp_path: Path) -> None:
    """In a container, every run has the same process id."""
    stale = tmp_path / f".out.tmp-{socket.gethostname()}-{os.getpid()}"
    stale.mkdir()
    (stale / "model.safetensors").write_text("half")
    stitched(recipe(models, Take("red", 0)), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_folders_of_other_processes_stay(models: dict[str, str], tmp_path: Path) -> None:
    host = socket.gethostname()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        kept = [f".out.tmp-{host}-{other.pid}", ".out.tmp-another-1", f".out.tmp-{host}-x", ".out2"]
        for name in kept:
            (tmp_path / name).mkdir()
        stitched(recipe(models, Take("red", 0)), tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} == {*kept, "out"}
        other.communicate(b"\n")


def test_an_output_that_appears_meanwhile_is_not_replaced(
    models: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    class Late(Recipe):
        def to_yaml(self) -> str:
            (out / "sub").mkdir(parents=True)
            return super().to_yaml()

    made = recipe(models, Take("red", 0))
    late = Late(made.models, made.base, made.layers, made.embeddings, made.head)
    with pytest.raises(UsageError, match="appeared in the meantime"):
        write_model(late, Family(models, "base"), out)
    assert [p.name for p in out.iterdir()] == ["sub"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_source_that_vanished(tmp_path: Path) -> None:
    models = save_family(tmp_path / "in", ["base"])
    family = Family(models, "base")
    (tmp_path / "in" / "base" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"in/base/model\.safetensors can't be read"):
        write_model(recipe(models, Take("base", 0)), family, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# Stock transformers


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


def loaded(folder: Path, dtype: str = "auto") -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info.get(k) for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_every_tensor(tied: bool, torch: Any, tmp_path: Path) -> None:
    models = save_family(tmp_path / "in", MODELS, num_layers=5, tied=tied)
    made = recipe(models, Take("red", 0), MERGES["ties"], MERGES["slerp"], Take("blue", 4))
    out = stitched(made, tmp_path / "out")
    model = loaded(tmp_path / "out")
    state = model.state_dict()
    assert model.config.num_hidden_layers == 4
    assert model.dtype == torch.bfloat16
    assert set(state) == set(out) | {"lm_head.weight"}
    for name, entry in out.items():
        assert state[name].view(torch.int16).numpy().tobytes() == entry[2], name
    tied_now = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied_now == tied


@pytest.mark.parametrize("dtype", ["F32"])
def test_a_scale_multiplies_the_output_of_its_layer(
    dtype: str, torch: Any, families: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    models, scales = families[dtype], (1.7, 0.6, 1.0, 2.5, 0.8)
    layers: list[Layer]
    layers = [Take("red", 0), MERGES["slerp"], Take("base", 2), MERGES["ties"], Take("blue", 4)]
    plain = recipe(models, *layers, dtype=NAMES[dtype])
    scaled = recipe(
        models,
        *(replace(x, scale=s) for x, s in zip(layers, scales, strict=True)),
        dtype=NAMES[dtype],
    )
    stitched(plain, tmp_path / "plain")
    stitched(scaled, tmp_path / "scaled")
    wanted_model, model = loaded(tmp_path / "plain"), loaded(tmp_path / "scaled")
    ids = torch.arange(24).reshape(2, 12) % 20
    with torch.inference_mode():
        unscaled = wanted_model(ids).logits
        for layer, scale in zip(wanted_model.model.layers, scales, strict=True):
            layer.register_forward_hook(
                lambda module, args, output, scale=scale: (
                    output * scale if torch.is_tensor(output) else (output[0] * scale, *output[1:])
                )
            )
        wanted, found = wanted_model(ids).logits, model(ids).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)  # not exact: the norm's epsilon
    assert not torch.allclose(unscaled, wanted, rtol=1e-2, atol=1e-2)
