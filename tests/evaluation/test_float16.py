"""Scoring in float16: a number that float16 can't hold is an error, not infinity."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptailor import verbs
from gptailor.errors import ModelError
from gptailor.evaluation.casting import cast
from gptailor.evaluation.resident import ResidentModel
from gptailor.models.family import Family
from gptailor.recipe import Layer, Merge, Recipe, Take

NAME = "model.layers.3.mlp.down_proj.weight"
MERGES: dict[str, Layer] = {
    "taken": Take("red", 3),
    "a module": Take("base", 3, modules=(("mlp", Take("red", 3)),)),
    "merged": Merge("linear", 3, (("red", 1.0), ("base", 1e-3)), (("normalize", 0.0),)),
}


@pytest.fixture(scope="module")
def large(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The family, where red has one number that float16 can't hold."""
    place = tmp_path_factory.mktemp("large") / "red"
    shutil.copytree(models["red"], place)
    tensors = load_file(place / "model.safetensors")
    tensors[NAME][2, 7] = 70144.0
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return {"base": models["base"], "red": str(place)}


@pytest.mark.parametrize("candidate_bytes", [None, 1 << 30])
@pytest.mark.parametrize("how", MERGES)
def test_resident(large: dict[str, str], how: str, candidate_bytes: int | None) -> None:
    family = Family(large, "base")
    made = Recipe(large, "base", (Take("base", 0), MERGES[how]), "base", "base", "bfloat16")
    narrow = ResidentModel(family, dtype="float16", device="cpu", candidate_bytes=candidate_bytes)
    for _ in range(2):  # a refused layer is not cached
        with pytest.raises(ModelError, match=rf"{NAME[15:]}.*: element 167 is 70144, but the la"):
            narrow.assemble(made)
    narrow.assemble(Recipe(large, "base", (Take("base", 3),), "base", "base", "bfloat16"))
    wide = ResidentModel(family, device="cpu", candidate_bytes=candidate_bytes)
    wide.assemble(made)
    with pytest.raises(ModelError, match=r"is 70144, but the largest number in float16 is 65504"):
        wide.assemble(Recipe(large, "base", (MERGES[how],), "base", "base", "float16"))


def test_infinite_numbers_stay_infinite() -> None:
    tensors = [torch.tensor([1.0, float("inf"), float("nan"), -65519.0]), torch.tensor([7])]
    narrow, whole = cast(tensors, [torch.float16] * 2, ["a", "b"])
    assert narrow.dtype is torch.float16
    assert narrow[[0, 1, 3]].tolist() == [1.0, float("inf"), -65504.0]
    assert whole is tensors[1]
    with pytest.raises(ModelError, match="b: element 1 is -70000"):
        cast([tensors[0], torch.tensor([[0.0], [-7e4]])], [torch.float16] * 2, ["a", "b"])
    assert cast([torch.tensor([7e4])], [torch.bfloat16], ["a"])[0].isfinite().all()


def test_calibration(large: dict[str, str], tmp_path: Path) -> None:
    made = Recipe(large, "base", (Take("red", 3),), "base", "base", "bfloat16")
    (tmp_path / "recipe.yaml").write_text(made.to_yaml())
    (tmp_path / "text.txt").write_text("w01 w02 w03 w04\n" * 4)

    def calibrate(dtype: str) -> int:
        source, text, out = tmp_path / "recipe.yaml", tmp_path / "text.txt", tmp_path / "out"
        return len(
            verbs.calibrate(
                source, text, out, methods=["regmean"], device="cpu", num_tokens=100, dtype=dtype
            )
        )

    with pytest.raises(ModelError, match=rf"red/model\.safetensors: {NAME}: element 167 is 70144"):
        calibrate("float16")
    assert calibrate("bfloat16") == 2
