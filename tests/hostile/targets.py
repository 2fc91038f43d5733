"""Fuzz targets: each takes bytes, gives them to our code as a file, and judges the outcome.

Either a value comes back that keeps its promises, or a GptailorError of the documented kind with a
message of one short line that a terminal can show. In any other case, the target raises.
Used by `test_replay.py` (a few seconds) and by `tools/fuzz.py` (hours, coverage-guided).
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptailor.config import parse_config
from gptailor.errors import GptailorError, ModelError, UsageError
from gptailor.evaluation.outcome import Cost, Evaluation, Outcome, Score
from gptailor.evaluation.similarity import Similarity
from gptailor.execution.slurm.status import look_at
from gptailor.mergekit import to_recipe
from gptailor.mergekit.parse import parse_mergekit
from gptailor.models.architecture import cut_config, find_architecture, text_config
from gptailor.models.calibration import SCHEMA, Statistics, statistics_path
from gptailor.models.candidate import Candidate
from gptailor.models.checkpoint import DTYPE_BITS, Checkpoint, TensorInfo, read_header
from gptailor.models.compatibility import check_fits
from gptailor.models.family import Family
from gptailor.recipe import Recipe
from gptailor.report import load_report
from gptailor.report.export import front_csv, front_dict, to_json
from gptailor.run.archive import Archive
from gptailor.run.island_folder import island_folder
from gptailor.run.journal import read_journal
from gptailor.run.journal_entry import Begun, Closed, Entry, Measured
from gptailor.run.journal_line import from_line, to_line
from gptailor.run.layout import JOURNAL
from gptailor.search.island_peers import IslandPeers
from gptailor.search.population import genome_of
from gptailor.search.space import SearchSpace
from gptailor.stitching.plan import make_plan
from gptailor.strict_yaml import load_yaml
from tests.hostile.mutate import (
    Mutator,
    mutate_header,
    mutate_json,
    mutate_json_lines,
    mutate_lines,
)
from tests.models.tiny import VOCAB, file_bytes, llama_config, save_family, save_model, save_tensors

MAX_MESSAGE = 2000

_SCRATCH = tempfile.TemporaryDirectory(
    prefix="gptailor-hostile-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
)
PLACE = Path(_SCRATCH.name)
A, B = "a.safetensors", "b.safetensors"


@dataclass(frozen=True)
class Target:
    """Something to fuzz.

    Attributes:
        run: judges one input; raises if something is wrong.
        mutate: changes an input in a way that suits its format.
        seeds: good inputs to start from.
    """

    run: Callable[[bytes], None]
    mutate: Mutator
    seeds: Callable[[], list[bytes]]


@contextmanager
def only(*kinds: type[GptailorError]) -> Iterator[None]:
    """Lets errors of these kinds pass if their message is one good line."""
    try:
        yield
    except kinds as error:
        check_message(str(error))


def check_message(text: str) -> None:
    assert text.isprintable(), f"a terminal can't show {text!r:.300}"
    assert 10 < len(text) <= MAX_MESSAGE, f"{len(text)} characters: {text!r:.300}"


def check_tensors(tensors: dict[str, TensorInfo]) -> None:
    """Every tensor lies wholly within its file, and shares no byte with another."""
    ends: dict[Path, int] = {}
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].path, item[1].offset)):
        assert name == t.name
        assert name.isprintable()
        assert t.dtype in DTYPE_BITS
        assert all(type(n) is int and n >= 0 for n in t.shape)
        assert t.n_bytes == t.n_elements * DTYPE_BITS[t.dtype] // 8
        assert ends.get(t.path, 8) <= t.offset <= t.offset + t.n_bytes <= t.path.stat().st_size
        ends[t.path] = t.offset + t.n_bytes


def header(data: bytes) -> None:
    path = PLACE / "header.safetensors"
    path.write_bytes(data)
    with only(ModelError):
        tensors = read_header(path)
        check_tensors(tensors)
        with only(ModelError):
            find_architecture(tensors, path)


def header_seeds() -> list[bytes]:
    entry = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
    second = {"dtype": "F32", "shape": [], "data_offsets": [12, 16]}
    empty = {"dtype": "I64", "shape": [0, 5], "data_offsets": [12, 12]}
    names = {"model.layers.0.x.weight": entry, "model.layers.1.x.weight": second}
    return [
        file_bytes({}),
        file_bytes({"__metadata__": {"format": "pt"}, "a": entry, "b": second}, bytes(16)),
        file_bytes({"a": entry, "e": empty, "b": second}, bytes(16)),
        file_bytes(names, bytes(16)),
    ]


def statistics(data: bytes) -> None:
    """Statistics of a model, for fisher and regmean."""
    path = statistics_path(PLACE, "fisher", "x")
    path.write_bytes(data)
    with only(ModelError, UsageError):
        found = Statistics(PLACE, "fisher", "x")
        check_tensors(found.tensors)
        assert re.fullmatch("[0-9a-f]{16}", found.digest)


def statistics_seeds() -> list[bytes]:
    metadata = {"schema": SCHEMA, "method": "fisher", "weights": "ab", "text": "é"}
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return [file_bytes({"__metadata__": metadata, "a": entry}, bytes(8))]


_INDEX: dict[str, Path] = {}


def index(data: bytes) -> None:
    """An index beside two good shards, a FIFO, a folder and a dangling link."""
    folder = _INDEX.get("folder")
    if folder is None:
        folder = _INDEX["folder"] = PLACE / "index"
        folder.mkdir()
        save_tensors(folder / A, {"x": ("F32", (2,), bytes(8)), "y": ("BF16", (), bytes(2))})
        save_tensors(folder / B, {"z": ("U8", (3,), bytes(3))})
        os.mkfifo(folder / "fifo.safetensors")
        (folder / "folder.safetensors").mkdir()
        (folder / "link.safetensors").symlink_to("nowhere")
        (folder / "zero.safetensors").symlink_to("/dev/zero")
    (folder / "model.safetensors.index.json").write_bytes(data)
    with only(ModelError):
        checkpoint = Checkpoint(folder)
        check_tensors(checkpoint.tensors)
        assert {path.parent for path in checkpoint.files} <= {folder}
        assert set(checkpoint.tensors) == {"x", "y", "z"} or len(checkpoint.files) < 2


def index_seeds() -> list[bytes]:
    good = {"x": A, "y": A, "z": B}
    files = ["fifo.safetensors", "folder.safetensors", "link.safetensors", "zero.safetensors"]
    files += ["pytorch_model.bin", "none.safetensors", "x" * 240]
    return [
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}).encode()
        for weights in [good, {"z": B}, *({"z": B, "w": file} for file in files)]
    ]


def config(data: bytes) -> None:
    """A config.json beside good weights: read, and reduced to fewer layers like in a stitch."""
    folder = _small("config")
    (folder / "config.json").write_bytes(data)
    with only(ModelError, UsageError):
        candidate = Candidate("x", folder)
        assert candidate.num_layers == 2
        for src_layers in ([0], [0, 1], [1, 1, 0]):
            with only(ModelError, UsageError):
                result = cut_config(candidate.config, src_layers)
                json.loads(json.dumps(result, ensure_ascii=False).encode())
                text = text_config(result)
                assert any(text[key] == len(src_layers) for key in text if "layer" in key)
        good = _good()
        for pair in ((candidate, good), (good, candidate)):
            with only(ModelError, UsageError):
                check_fits(*pair)


_GOOD: list[Candidate] = []


def _good() -> Candidate:
    if not _GOOD:
        _GOOD.append(Candidate("good", _small("good")))
    return _GOOD[0]


def _small(name: str) -> Path:
    """A model folder with one tensor per layer, which makes it quick to read."""
    folder = PLACE / name
    if not folder.exists():
        save_model(folder, num_layers=2)
        names = ["model.embed_tokens.weight", "model.layers.0.x.weight", "model.layers.1.x.weight"]
        tensors = {n: ("BF16", (VOCAB, 1), bytes(2 * VOCAB)) for n in names}
        save_tensors(folder / "model.safetensors", tensors)
    return folder


def config_seeds() -> list[bytes]:
    plain = llama_config(2)
    kinds = ["full_attention", "sliding_attention"]
    more: list[dict[str, Any]] = [
        {"layer_types": kinds, "max_window_layers": 1, "use_sliding_window": True},
        {"mlp_only_layers": [0], "first_k_dense_replace": 1, "num_experts": 4},
        {"model_type": "gemma3", "text_config": {**plain, "layer_types": kinds}, "num_layers": 2},
        {"sliding_window_pattern": 2, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}},
    ]
    nested = {"model_type": "gemma3", "text_config": plain, "vision_config": {"num_layers": 3}}
    return [json.dumps(plain | extra).encode() for extra in [{}, *more]] + [
        json.dumps(nested).encode()
    ]


def tokenizer(data: bytes) -> None:
    """A tokenizer.json, compared with a good one in both directions."""
    folder = _small("tokenizer")
    (folder / "tokenizer.json").write_bytes(data)
    good = _good()
    candidate = copy.copy(good)
    candidate.folder = folder
    for pair in ((candidate, good), (good, candidate)):
        with only(ModelError):
            check_fits(*pair)


def tokenizer_seeds() -> list[bytes]:
    good = (_good().folder / "tokenizer.json").read_bytes()
    tree = json.loads(good)
    tree["added_tokens"] = [{"id": 3, "content": "<x>"}, {"id": 2**40, "content": "<y>"}]
    unigram = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}
    return [good, json.dumps(tree).encode(), json.dumps(unigram).encode()]


def names(data: bytes) -> None:
    """Names of tensors, one per line, in which layers are searched for."""
    lines = data.decode("utf-8", "replace").split("\n")
    tensors = {
        name: TensorInfo(name, "U8", (i % 7,), PLACE, 8, i % 7)
        for i, name in enumerate(lines)
        if name.isprintable() and len(name) <= 500
    }
    with only(ModelError):
        found = find_architecture(tensors, "the model")
        inside = [name for layer in found.layers for name in layer.values()]
        assert len(found.layers) == found.num_layers
        assert sorted([*inside, *found.embeddings, *found.head]) == sorted(tensors)
        for i, layer in enumerate(found.layers):
            assert layer
            assert all(found.name(i, suffix) == name for suffix, name in layer.items())


def names_seeds() -> list[bytes]:
    llama = [f"model.layers.{i}.{x}.weight" for i in range(3) for x in ("q_proj", "mlp.experts.1")]
    return [
        "\n".join(["model.embed_tokens.weight", *llama, "lm_head.weight"]).encode(),
        b"h.0.a\nh.1.a\nwte.weight\nh.1.b\n0.1.2.3",
    ]


_FAMILY: list[Family] = []


def _family() -> Family:
    """base, red and green."""
    if not _FAMILY:
        _FAMILY.append(Family(save_family(PLACE / "family", num_layers=3), "base"))
    return _FAMILY[0]


def recipe(data: bytes) -> None:
    """A recipe: read, simplified, hashed, written, read again, and resolved to tensors."""
    with only(UsageError):
        found = Recipe.from_yaml(data.decode("utf-8", "replace"))
        found.with_models_relative_to(PLACE)
        again = Recipe.from_yaml(found.to_yaml())
        assert again == found
        assert again.hash == found.hash
        assert re.fullmatch("[0-9a-f]{64}", found.hash)
        if set(found.models) <= set(_family().candidates):
            with only(UsageError, ModelError):
                plan = make_plan(found, _family())
                assert len({t.name for t in plan.tensors}) == len(plan.tensors)


def recipe_seeds() -> list[bytes]:
    head = (
        b"schema: gptailor/recipe/1\nmodels: {base: a, red: b, green: ./c}\nbase: base\n"
        b"dtype: bfloat16\nembeddings: base\nhead: base\nlayers:\n"
    )
    return [
        head + b"  - {take: red, layer: 0}\n  - {take: base, layer: 2, scale: 0.97}\n",
        head + b"  - {merge: linear, layer: 1, weights: {red: 0.5, green: 0.5}}\n",
        head + b"  - {merge: slerp, layer: 1, models: [red, green], t: 0.3}\n",
        head
        + b"  - {merge: ties, layer: 1, weights: {red: 1, green: -0.5}, density: 0.5, lambda: 1}\n",
        b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c {<<: {k: *b}}\nd: [*c, *c]\n",
    ]


def mergekit(data: bytes) -> None:
    """A mergekit YAML: read, turned into a recipe for a family of those names, and resolved."""
    with only(UsageError):
        data_ = load_yaml(data.decode("utf-8", "replace"), "merge.yaml")
        if not isinstance(data_, dict):
            return
        found = parse_mergekit(data_, PLACE / "merge.yaml", "text")
        assert found.base in found.models
        if set(found.models) <= set(_family().candidates):
            with only(UsageError, ModelError):
                make_plan(to_recipe(found, _family()), _family())


def mergekit_seeds() -> list[bytes]:
    return [
        b"merge_method: ties\nbase_model: ./base\nmodels:\n  - model: ./red\n    parameters:\n"
        b"      weight: 0.5\n      density: [0.1, 0.9]\n  - model: green\n    parameters:\n"
        b"      weight:\n        - {filter: mlp, value: [0, 1]}\n        - value: 0.5\n"
        b"parameters: {normalize: true, int8_mask: true}\ndtype: float32\nout_dtype: bfloat16\n",
        b"merge_method: passthrough\nslices:\n  - sources: [{model: base, layer_range: [0, 2]}]\n"
        b"  - sources:\n    - model: {model: {path: red, revision: main}}\n"
        b"      layer_range: [1, 3]\n"
        b"      parameters: {scale: [{filter: o_proj, value: 0}, {value: 1}]}\n",
        b"merge_method: slerp\nbase_model: base\ntokenizer_source: base\nslices:\n"
        b"- sources: [{model: base, layer_range: [0, 3]}, {model: red, layer_range: [0, 3]}]\n"
        b"parameters: {t: [{filter: self_attn, value: [0, 0.5, 1]}, {value: 0.5}]}\n",
    ]


def search_config(data: bytes) -> None:
    with only(UsageError):
        parse_config(load_yaml(data.decode("utf-8", "replace"), "search.yaml"), "search.yaml")


def search_config_seeds() -> list[bytes]:
    return [
        b"models: {base: ./a, red: ./b}\nbase: base\nspace:\n  layers: {min: 3}\n"
        b"  merge: {methods: [linear, ties], lambdas: [0.3, 1.0]}\nevaluation:\n"
        b"  tasks: [reasoning, {task: reading, metric: acc_norm, weight: 2}]\n  rungs: [60]\n"
        b"search: {population: 24, evaluations: 60, seed: 0}\noutput: runs/mine\n"
    ]


_MODELS = {"base": "a", "red": "b"}
_SEARCHED = parse_config(
    {
        "models": _MODELS,
        "base": "base",
        "space": {"repair": False},  # as in recorded journals
        "evaluation": {"tasks": ["t"]},
    },
    "search.yaml",
)
_ISLAND: list[Archive] = []


def _island() -> Archive:
    """The archive of island 0."""
    if not _ISLAND:
        _ISLAND.append(Archive(island_folder(PLACE / "run", 0)))
        family = {"num_layers": 4, "models": _MODELS, "parameters": {"base": 9, "red": 9}}
        metas = {"config": _SEARCHED.model_dump_json(), "fingerprint": "f", "documents": "d"}
        for key, value in {**metas, "family": json.dumps(family)}.items():
            _ISLAND[0].set_meta(key, value)
    return _ISLAND[0]


def journal(data: bytes) -> None:
    """The journal of island 1: read whole, read by island 0, and reported."""
    mine = _island()
    path = island_folder(PLACE / "run", 1) / JOURNAL
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    (mine.folder / JOURNAL).unlink(missing_ok=True)
    with only(UsageError):
        _, entries = read_journal(path)
        for number, entry in enumerate(entries, start=1):
            again = from_line(to_line(entry)[:-1], path, number)
            assert to_line(again) == to_line(entry)
    with only(UsageError):
        with IslandPeers(PLACE / "run", 0, 2, mine) as others:
            space = SearchSpace(_SEARCHED.space, _MODELS, "base", 4)
            for evaluation in others.refresh():
                genome = genome_of(space, evaluation.recipe)
                assert genome is None or genome.shape == (space.shape[0] * space.shape[1],)
        report = load_report(PLACE / "run")
        to_json(front_dict(report)).encode()
        front_csv(report).encode()
        look_at(PLACE / "run")


def journal_seeds() -> list[bytes]:
    header = IslandPeers(PLACE / "run", 0, 2, _island()).header
    recipes = [
        line.replace(b"models: {base: a, red: b, green: ./c}", b"models: {base: a, red: b}")
        for line in recipe_seeds()[:1]
    ]
    found = [Recipe.from_yaml(text.decode()) for text in recipes]
    values = (1.0, 0.0, 0.5)
    scores = (
        Score("t", "acc,none", 0.5, 0.1, 3, 1.0, values, ((1, 0.5), (2, 0.5)), 0.25),
        Score("u", "ppl", 3.0, None, 1, 2.0),
    )
    rows = [
        Evaluation(0, made, documents, outcome, 5, ("dense:red",), 1.7e9)
        for made in found
        for documents, outcome in (
            ("search", Outcome("ok", 0.5, scores, "", Cost(1.0, 0.5, 0.25, 10, 100))),
            ("holdout", Outcome("failed", None, (), "Traceback\nError: x", Cost())),
        )
    ]
    measured = Measured("red", Similarity((0.5,) * 4, ((0.1,) * 5,) * 5))
    entries: list[Entry] = [header, *rows, measured, Begun((("a" * 64, "search"),)), Closed()]
    lines = [to_line(entry) for entry in entries]
    return [b"".join(lines), b"".join(lines[:2]), b"".join(lines)[:-9], lines[0]]


TARGETS: dict[str, Target] = {
    "header": Target(header, mutate_header, header_seeds),
    "statistics": Target(statistics, mutate_header, statistics_seeds),
    "index": Target(index, mutate_json, index_seeds),
    "config": Target(config, mutate_json, config_seeds),
    "tokenizer": Target(tokenizer, mutate_json, tokenizer_seeds),
    "names": Target(names, mutate_lines, names_seeds),
    "recipe": Target(recipe, mutate_lines, recipe_seeds),
    "mergekit": Target(mergekit, mutate_lines, mergekit_seeds),
    "search_config": Target(search_config, mutate_lines, search_config_seeds),
    "journal": Target(journal, mutate_json_lines, journal_seeds),
}


def random_inputs(target: Target, seed: int, count: int) -> Iterator[bytes]:
    """Mutations of mutations of the seeds."""
    rng = random.Random(seed)
    pool = target.seeds()
    for _ in range(count):
        data = rng.choice(pool)
        for _ in range(rng.choice([1, 1, 2, 3, 8])):
            data = target.mutate(rng, data)
        data = data[:100_000]
        yield data
        if rng.random() < 0.05:
            pool.append(data)
