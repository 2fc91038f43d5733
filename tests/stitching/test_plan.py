"""Where each tensor of the result comes from.

The most important test comes first: everything that is merged, including the base's part, comes
from the source layer and not from the layer's position in the result.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.errors import ModelError, UsageError
from gptailor.models.calibration import (
    Calibration,
    statistics_path,
    weights_digest,
    writing,
)
from gptailor.models.family import Family
from gptailor.recipe import NO_LAYER, Layer, Merge, Recipe, Take
from gptailor.stitching.layout import coalesced
from gptailor.stitching.plan import count_parameters, make_plan, scale_factors
from gptailor.stitching.write import write_model
from tests.models.tiny import (
    HIDDEN,
    LAYER_SHAPES,
    VOCAB,
    encoded,
    floats,
    llama_tensors,
    load_model,
    save_family,
    save_model,
    save_shards,
)

BASE, RED, GREEN = 1.0, 2.0, 4.0  # the models' values; layer n adds n sixteenths


def numbered(model: str, name: str, shape: tuple[int, ...]) -> Any:
    """Every element of a tensor shows which model and which source layer it comes from."""
    value = {"base": BASE, "red": RED, "green": GREEN}[model]
    layer = int(name.split(".")[2]) if ".layers." in name else 15
    return np.full(shape, value + layer / 16)


@pytest.fixture(scope="module")
def numbered_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("numbered")
    return {
        name: str(save_model(root / name, 6, tensors=llama_tensors(name, 6, values=numbered)))
        for name in ("base", "red", "green")
    }


def recipe(models: dict[str, str], *layers: Layer, **changes: Any) -> Recipe:
    ends = {"base": "base", "embeddings": "base", "head": "base"} | changes
    return Recipe(models, layers=layers, **ends)


TA = (("lambda", 1.0), ("normalize", 0.0))
AFTER_A_CUT = {
    "task_arithmetic": (
        Merge("task_arithmetic", 4, (("red", 0.5), ("green", 0.25)), TA),
        BASE + 0.5 * (RED - BASE) + 0.25 * (GREEN - BASE),
    ),
    "ties": (
        Merge(
            "ties", 4, (("red", 1.0), ("green", 1.0)),
            (("density", 1.0), ("lambda", 0.5), ("normalize", 1.0)),
        ),
        BASE + 0.5 * ((RED - BASE) + (GREEN - BASE)) / 2,
    ),
    "linear": (
        Merge("linear", 4, (("base", 0.5), ("red", 0.5)), (("normalize", 1.0),)),
        (BASE + RED) / 2,
    ),
    "slerp": (  # parallel tensors: slerp is linear
        Merge("slerp", 4, (("base", 1.0), ("red", 1.0)), (("t", 0.5),)),
        (BASE + RED) / 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", AFTER_A_CUT)
def test_a_merge_after_a_removal_reads_the_source_layer(
    method: str, numbered_models: dict[str, str], tmp_path: Path
) -> None:
    merge, expected = AFTER_A_CUT[method]
    # output layer 1 is source layer 4: layers 1, 2 and 3 are gone
    made = recipe(numbered_models, Take("red", 0), merge, Take("green", 5))
    write_model(made, Family(numbered_models, "base"), tmp_path / "out", sync=False)
    tensors = load_model(tmp_path / "out")
    for suffix in LAYER_SHAPES:
        assert np.all(floats(tensors[f"model.layers.0.{suffix}"]) == RED)
        assert np.all(floats(tensors[f"model.layers.1.{suffix}"]) == expected + 4 / 16)
        assert np.all(floats(tensors[f"model.layers.2.{suffix}"]) == GREEN + 5 / 16)
    assert not any(name.startswith("model.layers.3.") for name in tensors)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_source_is_of_the_source_layer(
    data: st.DataObject, numbered_models: dict[str, str]
) -> None:
    family = Family(numbered_models, "base")
    layers = data.draw(
        st.lists(
            st.builds(Take, st.sampled_from(list(numbered_models)), st.integers(0, 5))
            | st.builds(
                lambda layer, w: Merge("task_arithmetic", layer, (("red", w), ("green", 0.5)), TA),
                st.integers(0, 5),
                st.sampled_from([0.0, 0.3, 1.0]),
            ),
            min_size=1,
            max_size=9,
        )
    )
    plan = make_plan(recipe(numbered_models, *layers), family)
    names = [t.name for t in plan.tensors]
    assert len(names) == len(set(names)) == len(layers) * len(LAYER_SHAPES) + 2
    for tensor in plan.tensors:
        if ".layers." not in tensor.name:
            continue
        out_layer, suffix = tensor.name.removeprefix("model.layers.").split(".", 1)
        wanted = f"model.layers.{layers[int(out_layer)].src_layer}.{suffix}"
        used = [*tensor.sources, *([tensor.base] if tensor.base else [])]
        assert {source.info.name for source in used} == {wanted}
        if tensor.merge is not None:
            assert tensor.base is not None
            assert tensor.base.model == "base"
    assert plan.config["num_hidden_layers"] == len(layers)


def test_the_base_of_a_merge_is_the_recipes_base(numbered_models: dict[str, str]) -> None:
    family = Family(numbered_models, "green")
    merge = Merge("task_arithmetic", 2, (("red", 0.5),), TA)
    made = recipe(numbered_models, merge, base="green", embeddings="red", head="base")
    plan = make_plan(made, family)
    by_name = {t.name: t for t in plan.tensors}
    assert by_name["model.embed_tokens.weight"].sources[0].model == "red"
    assert by_name["model.norm.weight"].sources[0].model == "base"
    tensor = by_name["model.layers.0.mlp.up_proj.weight"]
    assert tensor.base is not None
    assert tensor.base.model == "green"


def copies(plan: Any) -> list[Any]:
    offsets = [0]
    for tensor in plan.tensors:
        offsets.append(offsets[-1] + tensor.n_bytes)
    ranges = coalesced(plan.tensors, offsets)
    assert sum(r.n_bytes for r in ranges) == sum(t.n_bytes for t in plan.tensors if t.is_copy)
    return ranges


def test_neighbours_are_copied_as_one_range(tmp_path: Path) -> None:
    models = save_family(tmp_path, num_layers=12)
    family = Family(models, "base")
    # transformers writes layers in the order of their names, so 10 and 11 follow 1
    whole = make_plan(recipe(models, *(Take("base", i) for i in range(12))), family)
    assert len(copies(whole)) == 1
    cut = make_plan(recipe(models, *(Take("base", i) for i in (0, 1, 2, 5, 6, 9))), family)
    assert len(copies(cut)) == 4  # 0–2 with the embeddings, 5–6, 9, the norm
    mixed: list[Layer] = [Take("red" if i in (4, 5) else "base", i) for i in range(12)]
    assert len(copies(make_plan(recipe(models, *mixed), family))) == 3
    merge = Merge("linear", 4, (("red", 1.0), ("green", 1.0)), (("normalize", 1.0),))
    mixed = [merge if i == 4 else Take("base", i) for i in range(12)]
    assert len(copies(make_plan(recipe(models, *mixed), family))) == 2


def test_copies_of_shards_stay_within_their_file(tmp_path: Path) -> None:
    models = save_family(tmp_path, ["base"], num_layers=6, shards=3)
    family = Family(models, "base")
    plan = make_plan(recipe(models, *(Take("base", i) for i in range(6))), family)
    assert len(copies(plan)) == 3
    for part in copies(plan):
        assert part.offset + part.n_bytes <= part.path.stat().st_size


def test_layers_that_are_not_there(numbered_models: dict[str, str]) -> None:
    family = Family(numbered_models, "base")
    made = recipe(numbered_models, Take("red", 0), Take("red", 6))
    with pytest.raises(UsageError, match=r"layers\[1\] names layer 6, but .* layers 0 to 5"):
        make_plan(made, family)
    few = Family({"base": numbered_models["base"]}, "base")
    with pytest.raises(UsageError, match="names the model red, which is not open"):
        make_plan(recipe(numbered_models, Take("red", 0)), few)


@pytest.mark.parametrize("dtype", ["F64"])
def test_dtypes_that_can_not_be_cast(tmp_path: Path, dtype: str) -> None:
    models = save_family(tmp_path, ["base", "red"], dtype=dtype)
    family = Family(models, "base")
    with pytest.raises(ModelError, match=rf"has dtype {dtype}, which is not supported"):
        make_plan(recipe(models, Take("base", 0)), family)


def test_integer_buffers_are_taken_from_the_first_source(tmp_path: Path) -> None:
    name = "model.layers.{}.self_attn.table"
    models = {}
    for value, model in enumerate(("base", "red", "green")):
        table = encoded(np.arange(4) + 10 * value, "I64")
        tensors = {name.format(i): ("I64", (4,), table) for i in range(4)}
        models[model] = str(save_model(tmp_path / model, tensors=tensors))
    merge = Merge("linear", 2, (("red", 1.0), ("green", 1.0)), (("normalize", 1.0),))
    write_model(
        recipe(models, Take("base", 0), merge), Family(models, "base"), tmp_path / "o", sync=False
    )
    found = load_model(tmp_path / "o")[name.format(1)]
    assert found[0] == "I64"
    assert np.frombuffer(found[2], "<i8").tolist() in ([10, 11, 12, 13], [20, 21, 22, 23])


# Modules, embeddings and head


def by_name(plan: Any) -> dict[str, Any]:
    return {t.name: t for t in plan.tensors}


def test_modules_of_a_layer(numbered_models: dict[str, str], tmp_path: Path) -> None:
    """Attention is merged, one projection taken elsewhere, and the rest is red's, byte for byte."""
    merge = Merge("task_arithmetic", 4, (("red", 0.5), ("green", 0.25)), TA)
    parts = (("k_proj", Take("green", 4)), ("self_attn", merge), ("mlp", Take("red", 4)))
    made = recipe(numbered_models, Take("red", 0), Take("red", 4, modules=parts))
    family = Family(numbered_models, "base")
    tensors = by_name(make_plan(made, family))
    merged = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert merged.merge == replace(merge, weights=tuple(sorted(merge.weights)))  # by reference
    assert merged.base is not None
    assert merged.base.info.name == "model.layers.4.self_attn.q_proj.weight"
    assert tensors["model.layers.1.self_attn.k_proj.weight"].is_copy
    assert tensors["model.layers.1.mlp.up_proj.weight"].is_copy
    write_model(made, family, tmp_path / "out", sync=False)
    found = load_model(tmp_path / "out")
    expected = BASE + 0.5 * (RED - BASE) + 0.25 * (GREEN - BASE) + 4 / 16
    for suffix in LAYER_SHAPES:
        value = GREEN + 4 / 16 if "k_proj" in suffix else RED + 4 / 16
        value = expected if "self_attn" in suffix and "k_proj" not in suffix else value
        assert np.all(floats(found[f"model.layers.1.{suffix}"]) == value), suffix


def test_a_module_whose_merge_has_no_effect_is_a_copy(numbered_models: dict[str, str]) -> None:
    slerp = Merge("slerp", 2, (("red", 1.0), ("green", 1.0)), (("t", 0.5),))
    whole = replace(slerp, parameters=(("t", 1.0),))
    plan = make_plan(
        recipe(numbered_models, replace(slerp, modules=(("mlp", whole),))),
        Family(numbered_models, "base"),
    )
    tensors = by_name(plan)
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert down.is_copy
    assert [source.model for source in down.sources] == ["green"]
    query = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert query.merge is not None and not query.merge.modules


def test_a_module_that_names_no_tensor(numbered_models: dict[str, str]) -> None:
    family = Family(numbered_models, "base")
    made = recipe(numbered_models, Take("red", 0, modules=(("self_atn", Take("green", 0)),)))
    with pytest.raises(UsageError, match=r"unknown module 'self_atn' in layers\[0\]"):
        make_plan(made, family)
    head = Take("red", NO_LAYER, modules=(("lm_heed", Take("green", NO_LAYER)),))
    with pytest.raises(UsageError, match="unknown module 'lm_heed' in head"):
        make_plan(recipe(numbered_models, Take("red", 0), head=head), family)
    other = Take("red", 0, modules=(("mlp", Take("blue", 0)),))
    few = Family({name: numbered_models[name] for name in ("base", "red")}, "base")
    with pytest.raises(UsageError, match=r"layers\[0\] names the model blue, which is not open"):
        make_plan(recipe(numbered_models, other), few)


def test_merged_embeddings_and_head(numbered_models: dict[str, str], tmp_path: Path) -> None:
    made = recipe(
        numbered_models,
        Take("red", 0),
        embeddings=Merge("linear", NO_LAYER, (("red", 1.0), ("green", 1.0))),
        head=Merge("task_arithmetic", NO_LAYER, (("green", 0.5),), TA),
    )
    family = Family(numbered_models, "base")
    tensors = by_name(make_plan(made, family))
    assert tensors["model.embed_tokens.weight"].base is None
    assert tensors["model.norm.weight"].base.model == "base"
    write_model(made, family, tmp_path / "out", sync=False)
    found = load_model(tmp_path / "out")
    assert np.all(floats(found["model.embed_tokens.weight"]) == (RED + GREEN) / 2 + 15 / 16)
    assert np.all(floats(found["model.norm.weight"]) == (BASE + GREEN) / 2 + 15 / 16)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Embeddings: linear(red 1, green 1; normalize 1)." in card
    assert "| green | `green` (local) | 0 |" in card


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tokenizer has 20 tokens; rows that no token uses are padding."""
    root = tmp_path_factory.mktemp("uneven")
    rows = {"base": VOCAB + 8, "few": VOCAB, "many": VOCAB + 12}
    return {n: str(save_model(root / n, vocab=v, tied=False)) for n, v in rows.items()}


TOKENS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("embeddings", "head", "rows"),
    [
        ("base", "base", VOCAB + 8),
        ("many", "many", VOCAB + 12),
        ("few", "few", VOCAB),
        ("base", "many", VOCAB + 8),
        ("few", "base", VOCAB),
        ("many", Merge("linear", NO_LAYER, (("few", 0.5), ("many", 0.5))), VOCAB),
        (Merge("linear", NO_LAYER, (("many", 0.5), ("few", 0.0))), "many", VOCAB + 12),
        (Merge("task_arithmetic", NO_LAYER, (("many", 0.5),), TA), "many", VOCAB + 8),
        ("many", Take("many", NO_LAYER, modules=(("norm", Take("few", NO_LAYER)),)), VOCAB + 12),
    ],
)
def test_embeddings_and_head_have_the_rows_that_all_their_sources_have(
    uneven: dict[str, str], tmp_path: Path, embeddings: Any, head: Any, rows: int
) -> None:
    made = recipe(uneven, Take("many", 1), Take("few", 2), embeddings=embeddings, head=head)
    family = Family(uneven, "base")
    plan = write_model(made, family, tmp_path / "out", sync=False)
    found = load_model(tmp_path / "out")
    assert found[TOKENS][1] == found[HEAD][1] == (rows, HIDDEN)
    assert plan.config["vocab_size"] == rows
    whole = {name: load_model(Path(folder)) for name, folder in uneven.items()}
    for end, name in ((embeddings, TOKENS), (head, HEAD)):
        tensor = by_name(plan)[name]
        parts = [floats(whole[s.model][name])[:rows] for s in tensor.sources]
        expected = parts[0]
        if len(parts) == 2:
            expected = (parts[0] + parts[1]) / 2
        elif tensor.base is not None:
            expected = (parts[0] + floats(whole["base"][name])[:rows]) / 2
        else:
            assert tensor.is_copy, end
        assert np.abs(floats(found[name]) - expected).max() <= 2e-3
    assert count_parameters(made, family) == sum(math.prod(e[1]) for e in found.values())


def test_rows_without_a_token_are_cut_from_statistics_too(
    uneven: dict[str, str], tmp_path: Path
) -> None:
    family = Family(uneven, "base")
    merge = Merge("fisher", NO_LAYER, (("few", 1.0), ("many", 1.0)))
    for name in ("few", "many"):
        tensors = llama_tensors(name, vocab=family.candidates[name].tensors[HEAD].shape[0])
        tensors |= {HEAD: (*tensors[TOKENS][:2], encoded(np.ones(tensors[TOKENS][1]), "BF16"))}
        metadata = {"schema": "gptailor/calibration/1", "method": "fisher", "text": "t"}
        metadata["weights"] = weights_digest(family.candidates[name].tensors)
        shapes = {n: (t[0], t[1]) for n, t in tensors.items()}
        with writing(statistics_path(tmp_path, "fisher", name), metadata, shapes) as file:
            for n, t in tensors.items():
                file.write(n, memoryview(t[2]))
    made = recipe(uneven, Take("base", 0), head=merge, calibration=Calibration(str(tmp_path)))
    write_model(made, family, tmp_path / "out", sync=False)
    parts = [floats(load_model(Path(uneven[n]))[HEAD])[:VOCAB] for n in ("few", "many")]
    assert np.abs(floats(load_model(tmp_path / "out")[HEAD]) - sum(parts) / 2).max() <= 2e-3


def test_the_key_of_a_tensor_is_its_source(numbered_models: dict[str, str]) -> None:
    merge = Merge("dare_linear", 4, (("red", 0.5), ("green", 0.25)), (("density", 0.5),))
    plan = make_plan(
        recipe(numbered_models, Take("red", 0), merge, merge), Family(numbered_models, "base")
    )
    tensors = by_name(plan)
    name = "mlp.up_proj.weight"
    digest = hashlib.sha256(f"model.layers.4.{name}".encode()).digest()
    expected = int.from_bytes(digest[:8], "little")
    assert tensors[f"model.layers.1.{name}"].key == expected
    assert tensors[f"model.layers.2.{name}"].key == expected
    keys = [t.key for t in plan.tensors if t.name.startswith("model.layers.1.")]
    assert len(set(keys)) == len(keys)
    assert max(keys) < 2**64


@pytest.mark.parametrize("task_vectors", [0.0, 1.0])
def test_an_optional_base_is_given_where_it_takes_part(
    task_vectors: float, numbered_models: dict[str, str]
) -> None:
    values = (("task_vectors", task_vectors),)
    merge = Merge("nuslerp", 4, (("red", 0.5), ("green", 0.25)), values)
    plan = make_plan(recipe(numbered_models, merge), Family(numbered_models, "base"))
    bases = {t.base.info.name if t.base else "" for t in plan.tensors if ".layers." in t.name}
    assert (bases == {""}) == (task_vectors == 0.0)


def test_integer_buffers_of_a_module(tmp_path: Path) -> None:
    name = "model.layers.{}.self_attn.table"
    models = {}
    for value, model in enumerate(("base", "red", "green")):
        table = encoded(np.arange(4) + 10 * value, "I64")
        tensors = {name.format(i): ("I64", (4,), table) for i in range(4)}
        models[model] = str(save_model(tmp_path / model, tensors=tensors))
    merge = Merge("task_arithmetic", 2, (("green", 0.5),), TA)
    made = recipe(models, Take("red", 2, modules=(("self_attn", merge),)))
    found = by_name(make_plan(made, Family(models, "base")))[name.format(0)]
    assert (found.merge, found.base, found.sources[0].model) == (None, None, "green")


def test_scale_factors() -> None:
    layers = (Take("a", 0, 2.0), Take("a", 1), Take("a", 2, 0.5), Take("a", 3, 4.0))
    made = Recipe({"a": "x"}, "a", layers, "a", "a")
    assert scale_factors(made) == [1.0, 0.5, 0.5, 1.0]


def test_scales_apply_only_to_weights_that_write_to_the_stream(tmp_path: Path) -> None:
    models = save_family(tmp_path, ["base"])
    plan = make_plan(recipe(models, Take("base", 0, 2.0), Take("base", 1)), Family(models, "base"))
    scaled = {t.name: t.factor for t in plan.tensors if t.factor != 1.0}
    assert scaled == {
        "model.layers.1.mlp.down_proj.weight": 0.5,
        "model.layers.1.self_attn.o_proj.weight": 0.5,
    }
    assert not any(t.is_copy for t in plan.tensors if t.name in scaled)


def test_the_rest_of_the_config_is_kept(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    models = save_family(
        tmp_path, ["base"], config={"layer_types": kinds, "rope_theta": 5e5, "torch_dtype": "x"}
    )
    family = Family(models, "base")
    plan = make_plan(recipe(models, Take("base", 1), Take("base", 3), dtype="float16"), family)
    assert plan.config["layer_types"] == ["sliding_attention"] * 2
    assert plan.config["rope_theta"] == 5e5
    assert plan.config["dtype"] == plan.config["torch_dtype"] == "float16"
    assert plan.config["num_hidden_layers"] == 2
    assert family.base.config["num_hidden_layers"] == 4


def test_shards_and_single_files_give_one_plan(tmp_path: Path) -> None:
    tensors = llama_tensors("base")
    whole = save_model(tmp_path / "whole", name="base")
    parts = save_model(tmp_path / "parts", name="base")
    (parts / "model.safetensors").unlink()
    save_shards(parts, tensors, 4)
    outs = []
    for folder in (whole, parts):
        models = {"base": str(folder)}
        made = recipe(models, Take("base", 3), Take("base", 0))
        write_model(made, Family(models, "base"), tmp_path / f"{folder.name}-out", sync=False)
        outs.append(load_model(tmp_path / f"{folder.name}-out"))
    assert outs[0] == outs[1]
