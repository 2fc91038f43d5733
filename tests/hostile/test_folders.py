"""Model folders with links, FIFOs and devices for files, and with names that lead elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import gptailor
from gptailor import verbs
from gptailor.errors import GptailorError, ModelError
from gptailor.models.candidate import Candidate
from gptailor.models.checkpoint import Checkpoint, read_header
from gptailor.models.family import Family
from gptailor.recipe import Recipe, Take
from tests.models.tiny import save_family, save_index, save_model

SECRET = "a line of a file that is nobody's business"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_family(tmp_path, num_layers=2)
    return tmp_path


def stitched(place: Path) -> Path:
    recipe = Recipe({"base": str(place / "base")}, "base", (Take("base", 1),), "base", "base")
    (place / "recipe.yaml").write_text(recipe.to_yaml())
    return verbs.stitch(place / "recipe.yaml", place / "out", verify=False, sync=False)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "LICENSE",
        "model.safetensors.index.json",
    ],
)
def test_a_fifo_hangs_nobody(place: Path, name: str) -> None:
    (place / "base" / name).unlink(missing_ok=True)
    if "index" in name:
        (place / "base" / "model.safetensors").unlink()
    os.mkfifo(place / "base" / name)
    if name == "LICENSE":
        assert not (stitched(place) / name).exists()
        return
    with pytest.raises(ModelError):
        stitched(place)
    assert not (place / "out").exists()


@pytest.mark.timeout(20)
def test_a_fifo_as_shard(place: Path) -> None:
    os.mkfifo(place / "base" / "x.safetensors")
    with pytest.raises(ModelError, match="is not a regular file"):
        read_header(place / "base" / "x.safetensors")
    (place / "base" / "model.safetensors").unlink()
    save_index(place / "base", {"a": "x.safetensors"})
    with pytest.raises(ModelError, match=r"x\.safetensors"):
        Checkpoint(place / "base")


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "nowhere", ".", "model.safetensors"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_to_something_other_than_a_file(place: Path, name: str, target: str) -> None:
    (place / "base" / name).unlink()
    (place / "base" / name).symlink_to(target)
    with pytest.raises(ModelError):
        stitched(place)
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"]
)
def test_a_link_carries_no_secret_into_the_result(place: Path, name: str) -> None:
    (place / "id_rsa").write_text(SECRET)
    (place / "base" / name).unlink(missing_ok=True)
    (place / "base" / name).symlink_to("../id_rsa")
    with pytest.raises(
        ModelError, match=rf"{name} is a link to .*id_rsa, a file with another name"
    ):
        stitched(place)
    assert not (place / "out").exists()


def test_ordinary_links(place: Path) -> None:
    """To a file of the same name, and like those of the Hugging Face cache."""
    (place / "elsewhere").mkdir()
    (place / "base" / "tokenizer.json").rename(place / "elsewhere" / "tokenizer.json")
    (place / "base" / "tokenizer.json").symlink_to("../elsewhere/tokenizer.json")
    assert (stitched(place) / "tokenizer.json").is_file()

    cache = place / "cache"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    for i, path in enumerate(sorted((place / "red").iterdir())):
        path.rename(cache / "blobs" / f"{i:040x}")
        (cache / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{i:040x}")
    models = {"base": str(cache / "snapshots" / "abc")}
    recipe = Recipe(models, "base", (Take("base", 0),), "base", "base")
    (place / "recipe.yaml").write_text(recipe.to_yaml())
    out = verbs.stitch(place / "recipe.yaml", place / "out2", verify=False, sync=False)
    assert not any(path.is_symlink() for path in out.iterdir())


BAD_SHARDS: list[Any] = [
    "../base/model.safetensors", "/etc/passwd", "a/b.safetensors", "a\0b.safetensors", "\x1b[2J",
    "\n", "..", ".", "", "é" * 200, "x" * 255, "\ud800", "~", "$HOME", "model-00001.bin", "x.pt",
    3, None, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("shard", BAD_SHARDS)
def test_names_of_shards(place: Path, shard: Any) -> None:
    (place / "base" / "model.safetensors").rename(place / "base" / "good.safetensors")
    names = dict.fromkeys(read_header(place / "base" / "good.safetensors"), "good.safetensors")
    save_index(place / "base", names)
    Checkpoint(place / "base")
    for weight_map in (names | {"x": shard}, dict.fromkeys(names, shard)):
        save_index(place / "base", weight_map)
        with pytest.raises(ModelError) as caught:
            Checkpoint(place / "base")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["model-00001-of-00001.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl"])
def test_an_index_of_pickles(place: Path, name: str) -> None:
    folder = place / "base"
    (folder / "model.safetensors").rename(folder / name)
    save_index(folder, {"model.norm.weight": name})
    with pytest.raises(ModelError, match=r"a pickle that could run code and is never loaded"):
        Checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=rf"holds only {name}, a pickle"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["a\nb", "\x1b]0;x\x07", "\u202e", "x" * 501, "\ud800", "\x7f"])
def test_names_of_tensors(place: Path, name: str) -> None:
    header = {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}
    raw = json.dumps(header).encode()
    path = place / "base" / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ModelError, match="is not a valid tensor name") as caught:
        Candidate("base", place / "base")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_messages_are_one_line_that_a_terminal_can_show() -> None:
    error = GptailorError("a\nb \x1b[2J \ud800 " + "x" * 10_000)
    assert str(error).isprintable()
    assert str(error).startswith("a b")
    assert len(str(error)) <= 2000
    assert str(GptailorError("as it is: é, λ")) == "as it is: é, λ"


def test_no_code_loads_pickles_or_trusts_remote_code() -> None:
    root = Path(gptailor.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "import pickle" not in text, path
        assert "trust_remote_code=True" not in text, path
        if path.name != "loading.py":
            assert ".from_pretrained(" not in text.replace("`from_pretrained", ""), path


def test_good_families_still_open(place: Path) -> None:
    assert Family({n: str(place / n) for n in ("base", "red", "green")}, "base").num_layers == 2
    assert Candidate("x", save_model(place / "s", num_layers=2, shards=3)).num_layers == 2


@pytest.mark.parametrize("ref", ["x" * 300, "~nobody-of-that-name/x", "a\0b", "./" + "y/" * 3000])
def test_references_that_are_impossible_paths(place: Path, ref: str) -> None:
    text = json.dumps({"schema": "gptailor/recipe/1", "models": {"a": ref}, "base": "a",
                       "layers": [{"take": "a", "layer": 0}]})  # fmt: skip
    (place / "recipe.yaml").write_text(text)
    with pytest.raises(GptailorError):
        verbs.stitch(place / "recipe.yaml", place / "out")
    text = json.dumps({"merge_method": "linear", "models": [{"model": ref}]})
    (place / "recipe.yaml").write_text(text)
    with pytest.raises(GptailorError):
        verbs.stitch(place / "recipe.yaml", place / "out")
