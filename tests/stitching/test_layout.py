"""Shards hold every tensor once, stay below the limit, are reproducible and can be loaded."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptailor.errors import UsageError
from gptailor.models.checkpoint import Checkpoint, TensorInfo
from gptailor.models.family import Family
from gptailor.recipe import Merge, Recipe, Take
from gptailor.stitching.layout import BLOCK, Shard, lay_out, parse_size
from gptailor.stitching.plan import OutTensor, Source
from gptailor.stitching.write import write_model
from tests.models.tiny import load_model, save_family


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5 kb", 1500),
        ("123", 123), ("7B", 7), ("1tb", 10**12), (" 10KiB ", 10240),
    ],
)  # fmt: skip
def test_sizes(text: str, n_bytes: int) -> None:
    if text == "7B":
        with pytest.raises(UsageError):
            parse_size(text)
        return
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-5GB", "0", "0.1", "5 G B", "5GBs", "1e9", "nan", "५GX"]
)
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a file size: write it like 5GB"):
        parse_size(text)


def random_tensors(seed: int, scale: int, unit: int = 1) -> list[OutTensor]:
    """Copies from three files, often adjacent, with merged tensors in between.

    Their sizes in elements are 0, `unit`, or a larger multiple of it.
    """
    rng = random.Random(seed)
    merge = Merge("linear", 0, (("a", 1.0),))
    places = {f"/m/{name}": 8 * rng.randrange(1000) for name in "abc"}
    tensors = []
    path = "/m/a"
    for i in range(60):
        if rng.random() < 0.3:
            path = rng.choice(list(places))
        if rng.random() < 0.15:
            places[path] += 8 * rng.randrange(3000)
        n = rng.choice([0, unit, 8, 576, 2048, scale, scale + unit])
        info = TensorInfo(f"t{i}", "BF16", (n,), Path(path), places[path], 2 * n)
        places[path] += 2 * n
        is_merged = merge if rng.random() < 0.2 else None
        tensors.append(OutTensor(f"t{i}", "BF16", (n,), (Source("m", info),), is_merged))
    return tensors


def check(shards: list[Shard], tensors: list[OutTensor], max_bytes: int) -> None:
    assert sorted(t.name for s in shards for t in s.tensors) == sorted(t.name for t in tensors)
    for shard in shards:
        size = sum(t.n_bytes for t in shard.tensors)
        assert size <= max_bytes or sum(t.n_bytes > 0 for t in shard.tensors) == 1
        n_header = int.from_bytes(shard.header[:8], "little")
        assert shard.offsets[0] == len(shard.header) == 8 + n_header
        assert shard.offsets[0] % 8 == 0
        entries = json.loads(shard.header[8:])
        for tensor, offset in zip(shard.tensors, shard.offsets, strict=False):
            begin, end = entries[tensor.name]["data_offsets"]
            assert (begin + len(shard.header), end - begin) == (offset, tensor.n_bytes)
        assert shard.n_bytes == len(shard.header) + size
    names = [s.name for s in shards]
    n = len(names)
    expected = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    assert names == (["model.safetensors"] if n == 1 else expected)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("max_bytes", [1, 100_000, 10**9])
def test_every_tensor_is_in_exactly_one_shard(seed: int, max_bytes: int) -> None:
    tensors = random_tensors(seed, 30_000)
    shards = lay_out(tensors, max_bytes)
    check(shards, tensors, max_bytes)
    assert [t.name for s in shards for t in s.tensors] == [t.name for t in tensors]
    if max_bytes == 10**9:
        assert len(shards) == 1


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("max_bytes", [1 << 20, 60 << 20, 10**12])
def test_where_blocks_can_be_shared_large_runs_stay_aligned(seed: int, max_bytes: int) -> None:
    tensors = random_tensors(seed, 12 << 20, unit=4)
    shards = lay_out(tensors, max_bytes, lambda path: path.name != "c")
    check(shards, tensors, max_bytes)
    assert shards == lay_out(tensors, max_bytes, lambda path: path.name != "c")
    for shard in shards:
        for part in shard.copies:
            if part.n_bytes >= 16 << 20 and part.path.name != "c":
                assert (part.offset - part.out_offset) % BLOCK == 0, part


def recipe(models: dict[str, str], *layers: Any) -> Recipe:
    return Recipe(models, "base", layers, "base", "base")


MERGE = Merge("linear", 2, (("red", 0.3), ("green", 0.9)), (("normalize", 1.0),))


@pytest.mark.parametrize("limit", ["1", "1KB", "3KB", "1MB"])
def test_shards_hold_the_same_tensors(limit: str, tmp_path: Path) -> None:
    models = save_family(tmp_path / "in", shards=2)
    made = recipe(models, Take("red", 1), MERGE, Take("green", 3), replace(MERGE, src_layer=0))
    plan = write_model(made, Family(models, "base"), tmp_path / "one", sync=False)
    whole = load_model(tmp_path / "one")
    listings = []
    for number, io in enumerate(("mmap", "pread", "direct")):
        out = tmp_path / f"out{number}"
        family = Family(models, "base", io)
        write_model(made, family, out, sync=False, max_shard_size=limit, threads=number + 1)
        assert load_model(out) == whole
        assert Checkpoint(out).tensors.keys() == whole.keys()
        listings.append({p.name: p.read_bytes() for p in out.iterdir() if p.suffix != ".md"})
    assert listings[0] == listings[1] == listings[2]
    files = sorted(name for name in listings[0] if name.endswith(".safetensors"))
    assert (len(files) == 1) == (limit == "1MB")
    if limit == "1":
        assert len(files) == len(whole)
    if len(files) > 1:
        index = json.loads(listings[0]["model.safetensors.index.json"])
        assert index["metadata"]["total_size"] == plan.n_bytes
        assert sorted(set(index["weight_map"].values())) == files
    else:
        assert "model.safetensors.index.json" not in listings[0]


def test_transformers_loads_shards(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    models = save_family(tmp_path / "in")
    made = recipe(models, Take("red", 1), MERGE)
    write_model(made, Family(models, "base"), tmp_path / "out", sync=False, max_shard_size="2KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info.get(k) for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    for name, entry in load_model(tmp_path / "out").items():
        assert state[name].view(torch.int16).numpy().tobytes() == entry[2], name


def test_an_invalid_size_leaves_nothing(tmp_path: Path) -> None:
    models = save_family(tmp_path / "in")
    with pytest.raises(UsageError, match="'many' is not a file size"):
        write_model(
            recipe(models, Take("red", 1)), Family(models, "base"), tmp_path / "out",
            max_shard_size="many",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
