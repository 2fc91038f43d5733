"""float32 tensors in a bfloat16 model stay float32, in the files and in the forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptailor.evaluation.family import open_family
from gptailor.evaluation.resident import ResidentModel
from gptailor.recipe import Layer, Merge, Recipe, Take
from gptailor.stitching.write import write_model
from tests.conftest import save_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
GLM: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"


def saved(
    place: Path, model_type: str, changes: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A random model as transformers saves it, with the tensors that it keeps in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(sum(place.name.encode()))
    config = AutoConfig.for_model(model_type, **SIZES, **changes)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    for tensor in model.state_dict().values():
        if tensor.ndim > 1 or not bool(tensor.min() == 1):
            torch.nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(place)
    if dtype is not torch.float32:
        AutoModelForCausalLM.from_pretrained(place, dtype=dtype).save_pretrained(place)
    save_tokenizer(place)
    return place


def written(models: dict[str, str], out: Path, *layers: Layer, dtype: str = "bfloat16") -> Path:
    recipe = Recipe(models, "base", layers, "base", "base", dtype)
    write_model(recipe, open_family(models, "base"), out, sync=False)
    return out


def dtypes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.dtype]:
    return {name: t.dtype for name, t in tensors.items() if t.dtype is not torch.bfloat16}


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("glm")
    return {name: str(saved(root / name, "glm4_moe", GLM)) for name in ("base", "red")}


def test_taken_tensors_keep_their_type(glm: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = load_file(Path(glm["red"]) / "model.safetensors")
    assert dtypes(source) == {BIAS.format(i): torch.float32 for i in (1, 2, 3)}
    assert not torch.equal(source[BIAS.format(2)], source[BIAS.format(2)].bfloat16().float())
    out = written(glm, tmp_path / "out", Take("base", 0), Take("red", 2))
    found = load_file(out / "model.safetensors")
    assert dtypes(found) == {BIAS.format(1): torch.float32}
    assert torch.equal(found[BIAS.format(1)], source[BIAS.format(2)])
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert torch.equal(loaded[BIAS.format(1)], source[BIAS.format(2)])


def test_a_merge_of_float32_tensors_is_float32(glm: dict[str, str], tmp_path: Path) -> None:
    merge = Merge("linear", 2, (("base", 0.5), ("red", 0.5)), (("normalize", 0.0),))
    out = written(glm, tmp_path / "out", Take("base", 0), merge)
    found = load_file(out / "model.safetensors")
    assert dtypes(found) == {BIAS.format(1): torch.float32}
    one, two = (load_file(Path(f) / "model.safetensors")[BIAS.format(2)] for f in glm.values())
    assert torch.equal(found[BIAS.format(1)], 0.5 * one + 0.5 * two)


def test_a_type_other_than_the_models_applies_to_all_tensors(
    glm: dict[str, str], tmp_path: Path
) -> None:
    for dtype in ("float16", "float32"):
        out = written(glm, tmp_path / dtype, Take("base", 0), Take("red", 2), dtype=dtype)
        found = load_file(out / "model.safetensors")
        assert {t.dtype for t in found.values()} == {getattr(torch, dtype)}
    dense = saved(tmp_path / "dense", "glm4_moe", GLM, torch.float32)
    out = written({"base": str(dense)}, tmp_path / "cast", Take("base", 0), Take("base", 2))
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_models_of_two_types(glm: dict[str, str], tmp_path: Path) -> None:
    """A model that is float32 throughout does not ask for float32 in a merge."""
    wide = saved(tmp_path / "wide", "glm4_moe", GLM, torch.float32)
    models = {"base": glm["base"], "wide": str(wide)}
    merge = Merge("linear", 2, (("base", 0.5), ("wide", 0.5)), (("normalize", 0.0),))
    out = written(models, tmp_path / "out", Take("base", 1), merge, Take("wide", 3))
    assert dtypes(load_file(out / "model.safetensors")) == {BIAS.format(0): torch.float32}


FORWARD: list[tuple[str, dict[str, Any], str, str]] = [
    # architectures whose files have the types that transformers computes with
    ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "bfloat16", "float16"),
    ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "float16", "auto"),
    ("flint", {"mlp_only_layers": [0, 1, 2, 3]}, "bfloat16", "auto"),
    ("flint", {"mlp_only_layers": [0, 1, 2, 3]}, "float32", "bfloat16"),
]


@pytest.mark.parametrize("candidate_bytes", [None, 1 << 30])
@pytest.mark.parametrize(("kind", "changes", "dtype", "forward"), FORWARD)
def test_the_forward_pass_has_the_types_of_the_folder(
    kind: str, changes: dict[str, Any], dtype: str, forward: str, candidate_bytes: int | None,
    tmp_path: Path,
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM

    own = getattr(torch, dtype)
    models = {n: str(saved(tmp_path / n, kind, changes, own)) for n in ("base", "red")}
    merge = Merge("linear", 1, (("base", 0.5), ("red", 0.5)), (("normalize", 0.0),))
    layers = (Take("red", 0), merge, Take("base", 3))
    recipe = Recipe(models, "base", layers, "base", "red", dtype)
    family = open_family(models, "base")
    write_model(recipe, family, tmp_path / "out", sync=False)
    kinds = forward if forward == "auto" else getattr(torch, forward)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=kinds).eval()
    kept = [n for n, t in stock.state_dict().items() if t.dtype is torch.float32]
    assert 0 < len(kept) < len(stock.state_dict())
    resident = ResidentModel(family, dtype=forward, device="cpu", candidate_bytes=candidate_bytes)
    mine = resident.assemble(recipe)
    state = mine.state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(state[name], tensor), name
        assert state[name].dtype == tensor.dtype, name
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(mine(input_ids=ids).logits, stock(input_ids=ids).logits)
