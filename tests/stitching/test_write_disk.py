"""On disk: holes stay holes, blocks are shared where possible, changed sources are errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptailor.errors import ModelError
from gptailor.models.family import Family
from gptailor.recipe import Merge, Recipe, Take
from gptailor.stitching.write import write_model
from tests.models.tiny import (
    LAYER_SHAPES,
    free_bytes,
    load_model,
    mounted,
    run_python,
    save_family,
    save_model,
    save_tokenizer,
)

MERGE = Merge("linear", 1, (("red", 0.3), ("base", 0.9)), (("normalize", 1.0),))


def recipe(models: dict[str, str], *layers: Any) -> Recipe:
    return Recipe(models, "base", layers, "base", "base")


# Holes


def big_model(folder: Path, hidden: int, num_layers: int, holes: bool, meta: str = "") -> Path:
    """A Llama with a large `ffn`, whose weights are random bytes or a hole in the file."""
    ffn = 2 * hidden
    save_model(folder, 1)
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [20, hidden]}
    for i in range(num_layers):
        for suffix, small in LAYER_SHAPES.items():
            sizes = [{16: hidden, 24: ffn}[n] for n in small]
            shapes[f"model.layers.{i}.{suffix}"] = sizes
    shapes["model.norm.weight"] = [hidden]
    header: dict[str, Any] = {"__metadata__": {"format": "pt" + meta}}
    position = 0
    for name, shape in shapes.items():
        n_bytes = 2 * int(np.prod(shape))
        offsets = [position, position + n_bytes]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        position += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(len(str(folder)) + num_layers)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if not holes:
            file.write(rng.integers(0, 120, position, np.uint8).tobytes())
        file.truncate(8 + len(text) + position)
        os.fsync(file.fileno())
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    return folder


def allocated(folder: Path) -> int:
    return sum(512 * path.stat().st_blocks for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
def test_holes_stay_holes(io: str, tmp_path: Path) -> None:
    names = ("base", "red")
    models = {n: str(big_model(tmp_path / n, 512, 4, holes=True)) for n in names}
    red = tmp_path / "red" / "model.safetensors"
    with red.open("r+b") as file:  # an island at an odd offset
        file.seek(9_000_001)
        file.write(b"island")
    if allocated(tmp_path / "base") > 1 << 20:
        pytest.skip("this file system has no holes")
    out = tmp_path / "out"
    made = recipe(models, Take("red", 0), Take("red", 1), Take("base", 1), Take("red", 3))
    plan = write_model(made, Family(models, "base", io), out)
    assert plan.n_bytes > 16 << 20
    assert allocated(out) < 1 << 20
    found = load_model(out)
    for i, (name, layer) in enumerate([("red", 0), ("red", 1), ("base", 1), ("red", 3)]):
        source = load_model(tmp_path / name)
        for suffix in LAYER_SHAPES:
            wanted = source[f"model.layers.{layer}.{suffix}"]
            assert found[f"model.layers.{i}.{suffix}"] == wanted
    assert sum(entry[2].count(b"island") for entry in found.values()) == 1


# Files that change during a stitch

CHANGED = """
import os, sys
from gptailor.errors import GptailorError
from gptailor.models.family import Family
from gptailor.recipe import read_recipe
from gptailor.stitching import write
io, recipe, out, path, action, moment = sys.argv[1:]
made = read_recipe(recipe)
family = Family(made.models, made.base, io)
def change():
    if action == "truncate":
        os.truncate(path, os.path.getsize(path) // 2)
    elif action == "write":
        with open(path, "r+b") as file:
            file.seek(-5, 2)
            file.write(b"12345")
        os.utime(path)
    else:
        with open(path, "rb") as file, open(path + "~", "wb") as new:
            new.write(file.read())
        os.replace(path + "~", path)
def early(*args):  # after the header was read, before the weights are
    change()
    return copies(*args)
def late(*args, **kwargs):
    shards(*args, **kwargs)
    change()
def middle(*args):
    tensor(*args)
    change()
copies, shards, tensor = write._Sources, write.write_shards, write.ComputedTensor.write
if moment == "early":
    write._Sources = early
elif moment == "middle":
    write.ComputedTensor.write = middle
else:
    write.write_shards = late
try:
    write.write_model(made, family, out)
    print("written")
except GptailorError as error:
    print(type(error).__name__, error)
print(os.path.exists(out))
"""


@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
@pytest.mark.parametrize("moment", ["early", "middle", "late"])
@pytest.mark.parametrize("action", ["truncate", "write", "replace"])
def test_a_source_that_changes_during_a_stitch(
    action: str, moment: str, io: str, tmp_path: Path
) -> None:
    models = save_family(tmp_path / "in", ["base", "red"])
    made = recipe(models, Take("red", 0), MERGE, Take("red", 2))
    (tmp_path / "r.yaml").write_text(made.to_yaml())
    path = tmp_path / "in" / "red" / "model.safetensors"
    os.utime(path, ns=(10**18, 10**18))
    arguments = (io, tmp_path / "r.yaml", tmp_path / "out", path, action, moment)
    done = run_python(CHANGED, *arguments)
    assert done.returncode == 0, done.stderr
    told, exists = done.stdout.splitlines()
    assert re.match(rf"ModelError {re.escape(str(path))} (changed|became shorter) after", told)
    assert exists == "False"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "r.yaml"]


# Reflinks

TOOLS = {"xfs": ("mkfs.xfs", "xfsprogs"), "btrfs": ("mkfs.btrfs", "btrfs-progs")}


@contextmanager
def disk(folder: Path, kind: str, size: int) -> Iterator[Path]:
    """A mounted image with that file system; skips the test where it can't be made."""
    tool, package = TOOLS[kind]
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool}: apt-get install {package}")
    folder.mkdir()
    memory = Path("/dev/shm")
    image = (memory if os.access(memory, os.W_OK) else folder.parent) / f"gptailor-{os.getpid()}"
    try:
        with image.open("wb") as file:
            file.truncate(size)
        subprocess.run([tool, "-q", str(image)], check=True)
        with mounted(folder, "-o", "loop", str(image)):
            yield folder
    finally:
        image.unlink(missing_ok=True)


def flush(root: Path) -> None:
    subprocess.run(["sync", "-f", str(root)], check=True)


def shared_bytes(path: Path) -> int:
    """Bytes in extents that filefrag reports as shared."""
    words = ["filefrag", "-v", "-b1", str(path)]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    rows = [line.split(":") for line in text.splitlines() if re.match(r"\s*\d+:", line)]
    return sum(int(row[3].strip()) for row in rows if "shared" in row[-1])


@pytest.mark.system
@pytest.mark.parametrize("kind", TOOLS)
def test_blocks_are_shared(kind: str, tmp_path: Path) -> None:
    if shutil.which("filefrag") is None:
        pytest.skip("no filefrag: apt-get install e2fsprogs")
    with disk(tmp_path / "disk", kind, 512 << 20) as root:
        # headers of different lengths: tensors begin at different offsets within a block
        models = {
            n: str(big_model(root / n, 1024, 4, holes=False, meta="x" * 1000 * i))
            for i, n in enumerate(("base", "red", "blue"))
        }
        layers = [Take("red", 0), Take("red", 1), Take("blue", 2), MERGE, Take("base", 3)]
        made = recipe(models, *layers)
        flush(root)
        before = free_bytes(root)
        plan = write_model(made, Family(models, "base"), root / "out")
        flush(root)
        spent = before - free_bytes(root)
        merged = sum(t.n_bytes for t in plan.tensors if not t.is_copy)
        assert plan.n_bytes > merged + (70 << 20)
        assert spent < merged + (6 << 20)
        shared = sum(shared_bytes(p) for p in (root / "out").glob("*.safetensors"))
        assert shared > 0.99 * (plan.n_bytes - merged)
        assert len(list((root / "out").glob("*.safetensors"))) == 4
        # the same tensors as where nothing can be shared
        write_model(made, Family(models, "base"), tmp_path / "out", sync=False)
        assert load_model(root / "out") == load_model(tmp_path / "out")
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
        write_model(made, Family(models, "base", "direct"), root / "again")
        for path in (root / "out").iterdir():
            assert (
                path.name == "README.md"
                or path.read_bytes() == (root / "again" / path.name).read_bytes()
            )


@pytest.mark.system
def test_shared_blocks_need_no_room(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "xfs", 320 << 20) as root:
        models = {"base": str(big_model(root / "base", 1536, 4, holes=False))}
        flush(root)
        made = recipe(models, *(Take("base", i) for i in range(4)))
        with (root / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free_bytes(root) - (8 << 20))
        flush(root)
        plan = write_model(made, Family(models, "base"), root / "out")
        assert plan.n_bytes > 100 << 20
        assert load_model(root / "out") == load_model(root / "base")


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    models = save_family(tmp_path / "in", ["base"])
    family = Family(models, "base")
    family.base.checkpoint.tensor("model.norm.weight")
    (tmp_path / "in" / "base" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors changed after it was opened"):
        family.check_intact()
