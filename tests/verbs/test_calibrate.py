"""From a text to a model stitched with fisher and regmean, as a user does it, and what can fail.

The family is the demo's; its statistics come from running it on questions from its tasks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from gptailor import cli
from gptailor.config import EvaluationConfig, parse_config
from gptailor.demo import PATH
from gptailor.errors import ModelError, ResourceError, UsageError
from gptailor.evaluation import calibrate
from gptailor.evaluation.evaluator import Evaluator
from gptailor.evaluation.resident import ResidentModel
from gptailor.merging import reference
from gptailor.models.calibration import (
    Calibration,
    Statistics,
    statistics_path,
    weights_digest,
    writing,
)
from gptailor.models.checkpoint import Checkpoint
from gptailor.models.family import Family
from gptailor.recipe import Merge, Recipe, read_recipe
from gptailor.run.archive import Archive
from tests.calibrations import save_statistics
from tests.conftest import save_tokenizer
from tests.evaluation.own_tasks import tasks_of
from tests.models.tiny import Array, floats, load_model, load_tensors, save_family

NAMES = ("base", "sort", "clock")
LAYERS = [
    {"merge": "fisher", "layer": 0, "weights": {"sort": 1, "clock": 0.5}},
    {"merge": "regmean", "layer": 1, "weights": {"base": 0.2, "sort": 1, "clock": 1}},
    {
        "take": "sort", "layer": 2,
        "modules": {"mlp": {
            "merge": "regmean", "weights": {"sort": 1, "clock": 1}, "reduce_non_diagonal_ratio": 1,
        }},
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, a text, models, and the calibration folder that `gptailor calibrate` makes."""
    place = tmp_path_factory.mktemp("calibrated")
    for name in NAMES:
        shutil.copytree(PATH / "models" / name, place / "models" / name)
    lines = []
    for task in ("sort", "clock"):
        for line in (PATH / "tasks" / f"demo_{task}.jsonl").read_text().splitlines()[:20]:
            question = json.loads(line)
            lines.append(f"{question['context']} {question['choices'][question['gold']]}")
    (place / "text.txt").write_text("\n".join(lines))
    write(place / "recipe.yaml")
    before = {p: p.read_bytes() for p in (place / "models").rglob("*") if p.is_file()}
    assert run("calibrate", place / "recipe.yaml", "--text", place / "text.txt") == 0
    assert before == {p: p.read_bytes() for p in (place / "models").rglob("*") if p.is_file()}
    return place


def write(path: Path, *layers: dict[str, Any], **changes: Any) -> Path:
    data = {
        "schema": "gptailor/recipe/1",
        "models": {name: f"./models/{name}" for name in NAMES},
        "base": "base",
        "calibration": "./calibration",
        "dtype": "float32",
        "layers": list(layers) or LAYERS,
    } | changes
    path.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    return path


def run(*words: object) -> int:
    return cli.main(list(map(str, words)))


def stitched(recipe: Path, out: Path) -> dict[str, Array]:
    assert run("stitch", recipe, out, "--no-verify", "--no-sync") == 0
    return {name: floats(entry) for name, entry in load_model(out).items()}


def statistics(place: Path, method: str, model: str) -> dict[str, Array]:
    path = place / "calibration" / f"{model}.{method}.safetensors"
    return {name: floats(entry) for name, entry in load_tensors(path).items()}


def weights(place: Path, model: str) -> dict[str, Array]:
    return {n: floats(e) for n, e in load_model(place / "models" / model).items()}


def test_what_a_calibration_holds(place: Path) -> None:
    assert {p.name for p in (place / "calibration").iterdir()} == {
        "sort.fisher.safetensors", "clock.fisher.safetensors",
        "base.regmean.safetensors", "sort.regmean.safetensors", "clock.regmean.safetensors",
    }  # fmt: skip
    own = weights(place, "sort")
    fisher = statistics(place, "fisher", "sort")
    assert {n: f.shape for n, f in fisher.items()} == {n: w.shape for n, w in own.items()}
    values = np.concatenate([f.ravel() for f in fisher.values()])
    assert values.min() >= 0
    assert values.mean() == pytest.approx(1, abs=2e-3)  # relative to the mean, in bfloat16
    gram = statistics(place, "regmean", "sort")
    matrices = {n for n, w in own.items() if w.ndim == 2 and "embed" not in n}
    assert set(gram) == matrices
    for name, g in gram.items():
        assert g.shape == (own[name].shape[1],) * 2
        np.testing.assert_allclose(g, g.T, rtol=1e-5, atol=1e-6)
        assert np.linalg.eigvalsh(g).min() > -1e-4 * g.max()
    for method in ("fisher", "regmean"):
        known = Statistics(place / "calibration", method, "sort").metadata
        assert known["weights"] == weights_digest(Checkpoint(place / "models" / "sort").tensors)
        assert (known["sequences"], known["dtype"]) == ("40", "float32")
        assert int(known["tokens"]) > 160  # more than the inputs of any layer


def test_a_stitched_model_is_what_the_formulas_say(place: Path, tmp_path: Path) -> None:
    out = stitched(place / "recipe.yaml", tmp_path / "out")
    own = {model: weights(place, model) for model in NAMES}
    stats = {
        (method, model): statistics(place, method, model)
        for method, model in [("fisher", "sort"), ("fisher", "clock"),
                              *(("regmean", m) for m in NAMES)]
    }  # fmt: skip
    cases: list[tuple[int, str, dict[str, float], dict[str, float]]] = [
        (0, "fisher", {"sort": 1, "clock": 0.5}, {}),
        (1, "regmean", {"base": 0.2, "sort": 1, "clock": 1}, {}),
        (2, "regmean", {"sort": 1, "clock": 1}, {"reduce_non_diagonal_ratio": 1}),
    ]
    for layer, method, sources, parameters in cases:
        for name in (n for n in out if n.startswith(f"model.layers.{layer}.")):
            x = [own[m][name] for m in sources]
            if layer == 2 and ".mlp." not in name:
                np.testing.assert_array_equal(out[name], x[0])
                continue
            if method == "regmean" and x[0].ndim == 1:
                wanted = reference.merge("linear", x, weights=list(sources.values()))
            else:
                wanted = reference.merge(
                    method, x, weights=list(sources.values()), parameters=parameters,
                    statistics=[stats[method, m][name] for m in sources],
                )  # fmt: skip
                assert np.abs(wanted - np.mean(x, axis=0)).max() > 1e-3  # it is not the average
            np.testing.assert_allclose(out[name], wanted, rtol=1e-5, atol=1e-6)


def test_outputs_on_the_text_are_nearer_than_those_of_the_average(
    place: Path, tmp_path: Path
) -> None:
    sources = {"sort": 1, "clock": 1}
    entry = {"layer": 3, "weights": sources}
    outs = {
        ratio: stitched(
            write(place / f"r{ratio}.yaml",
                  {"merge": "regmean", **entry, "reduce_non_diagonal_ratio": ratio}),
            tmp_path / f"out{ratio}",
        )
        for ratio in (1.0, 0.9)
    }  # fmt: skip
    outs[-1] = stitched(write(place / "m.yaml", {"merge": "linear", **entry}), tmp_path / "mean")
    gram = {m: statistics(place, "regmean", m) for m in sources}
    own = {m: weights(place, m) for m in sources}
    for suffix in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.3.{suffix}.weight"
        errors = []
        for ratio in (1.0, 0.9, -1):  # ‖(W − y) X‖² of both models
            y = outs[ratio][f"model.layers.0.{suffix}.weight"]
            steps = {m: own[m][name] - y for m in sources}
            errors.append(sum(np.sum(s @ gram[m][name] * s) for m, s in steps.items()))
        assert errors == sorted(errors)
        assert errors[0] < 0.9 * errors[2], suffix


def test_the_stitched_model_names_its_statistics(place: Path, tmp_path: Path) -> None:
    assert run("stitch", place / "recipe.yaml", tmp_path / "out", "--no-sync") == 0  # and it runs
    kept = read_recipe(tmp_path / "out" / "gptailor_recipe.yaml")
    found = read_recipe(place / "recipe.yaml").with_statistics_found()
    assert kept == found
    assert kept.hash == found.hash
    assert Recipe.from_dict(kept.to_dict()) == Recipe.from_yaml(kept.to_yaml()) == kept
    assert kept.calibration is not None
    assert {(m, n) for m, n, _ in kept.calibration.digests} == set(kept.used_statistics)
    again = stitched(tmp_path / "out" / "gptailor_recipe.yaml", tmp_path / "again")
    first = load_model(tmp_path / "out")
    assert again.keys() == first.keys()
    assert load_model(tmp_path / "again") == first


def test_the_resident_model_equals_the_written_one(place: Path, tmp_path: Path) -> None:
    recipe = read_recipe(place / "recipe.yaml").with_statistics_found()
    own = stitched(place / "recipe.yaml", tmp_path / "out")
    resident = ResidentModel(Family(recipe.models, "base"), dtype="float32", device="cpu")
    state = resident.assemble(recipe).state_dict()
    for name, values in own.items():
        np.testing.assert_array_equal(state[name].numpy(), values)
    other = replace(recipe, layers=recipe.layers[::-1], _cache={})
    resident.assemble(other)
    assert len(resident.pools[0].merged) == 3  # reused
    with pytest.raises(UsageError, match="needs calibration data"):
        resident.assemble(replace(recipe, calibration=None, _cache={}))


def test_the_same_text_gives_the_same_bytes(place: Path, tmp_path: Path) -> None:
    words = ["calibrate", place / "recipe.yaml", "--text", place / "text.txt", "--tokens", 60]
    for out, options in (("a", ()), ("b", ()), ("c", ("--method", "fisher", "--seed", 1))):
        assert run(*words, *options, "--out", tmp_path / out, "--json") == 0
    files = {p.name for p in (tmp_path / "c").iterdir()}
    assert files == {"sort.fisher.safetensors", "clock.fisher.safetensors"}
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
        if path.name in files:
            assert (tmp_path / "c" / path.name).read_bytes() != path.read_bytes()
    few, all_of_it, other = (
        Statistics(f, "fisher", "sort")
        for f in (tmp_path / "a", place / "calibration", tmp_path / "c")
    )
    assert few.metadata["tokens"] == "60"
    assert len({few.digest, all_of_it.digest, other.digest}) == 3


# Hashes


def test_a_hash_names_the_statistics_if_they_are_used(place: Path, tmp_path: Path) -> None:
    found = read_recipe(place / "recipe.yaml").with_statistics_found()
    assert found.calibration is not None
    shutil.copytree(place / "calibration", tmp_path / "elsewhere")
    moved = replace(found.calibration, folder=str(tmp_path / "elsewhere"))
    assert replace(found, calibration=moved, _cache={}).hash == found.hash
    (method, model, _), *rest = found.calibration.digests
    for other in (
        replace(found.calibration, digests=((method, model, "0" * 16), *rest)),
        None,
    ):
        assert replace(found, calibration=other, _cache={}).hash != found.hash
    taken = replace(found, layers=(found.layers[2].at("self_attn"),), _cache={})
    assert taken.canonical().calibration is None
    assert taken.hash == replace(taken, calibration=None, _cache={}).hash
    assert taken.used_statistics == ()
    one = Merge("fisher", 0, (("sort", 0.5),))
    assert replace(taken, layers=(one,), _cache={}).used_statistics == ()


def test_only_the_proportion_of_weights_counts(place: Path) -> None:
    found = read_recipe(place / "recipe.yaml").with_statistics_found()

    def digest(**named: float) -> str:
        layers = (Merge("fisher", 0, tuple(named.items())),)
        return replace(found, layers=layers, _cache={}).hash

    assert digest(sort=1.0, clock=0.5) == digest(clock=1.0, sort=2.0)
    assert digest(sort=1.0, clock=0.5) == digest(sort=1.0, clock=0.5, base=0.0)
    assert digest(sort=1.0, clock=0.5) != digest(sort=0.5, clock=1.0)


# Other models


def save_other_llama(folder: Path, seed: int, tied: bool) -> Path:
    """A Llama with two layers and biases, in float16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        tie_word_embeddings=tied, initializer_range=0.1, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.float16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_biases_heads_and_half_precision(tmp_path: Path, tied: bool) -> None:
    models = {
        n: str(save_other_llama(tmp_path / n, i, tied)) for i, n in enumerate(("base", "red"))
    }
    (tmp_path / "t.txt").write_text(" ".join(f"w{i % 90:02d}" for i in range(300)))
    sources = {"base": 1, "red": 1}
    fisher, regmean = ({"merge": m, "weights": sources} for m in ("fisher", "regmean"))
    recipe = write(
        tmp_path / "r.yaml", {**fisher, "layer": 0}, {**regmean, "layer": 1},
        models=models, embeddings=fisher, head=regmean,
    )  # fmt: skip
    assert run("calibrate", recipe, "--text", tmp_path / "t.txt", "--dtype", "bfloat16") == 0
    gram = Statistics(tmp_path / "calibration", "regmean", "red")
    assert gram.metadata["sequences"] == "19"  # of 16 tokens, the most that the model reads
    assert ("lm_head.weight" in gram.tensors) != tied
    out = stitched(recipe, tmp_path / "out")
    own = {n: {k: floats(e) for k, e in load_model(Path(models[n])).items()} for n in sources}

    def wanted(method: str, name: str) -> Array:
        files = [tmp_path / "calibration" / f"{n}.{method}.safetensors" for n in sources]
        stats = [floats(load_tensors(f)[name]) for f in files]
        return reference.merge(method, [own[n][name] for n in sources], statistics=stats)

    for name, method in (
        ("model.embed_tokens.weight", "fisher"),
        ("model.layers.0.self_attn.q_proj.bias", "fisher"),
        ("model.layers.1.self_attn.q_proj.weight", "regmean"),
        *([] if tied else [("lm_head.weight", "regmean")]),
    ):
        np.testing.assert_allclose(out[name], wanted(method, name), rtol=1e-5, atol=1e-6)
    for name in ("model.layers.1.self_attn.q_proj.bias", "model.norm.weight"):
        np.testing.assert_allclose(out[name], (own["base"][name] + own["red"][name]) / 2, atol=1e-7)


# Searches


def search_config(place: Path, **changes: Any) -> dict[str, Any]:
    return {
        "models": {name: str(place / "models" / name) for name in NAMES},
        "base": "base",
        "calibration": str(place / "calibration"),
        "space": {"layers": {"min": 8}, "merge": {"methods": ["regmean", "linear"]}},
        "evaluation": {
            "tasks": ["demo_sort"], "include_path": str(PATH / "tasks"), "rungs": [20],
            "device": "cpu",
        },
        "search": {"population": 4, "evaluations": 8, "arms": ["dense"]},
        "output": str(place / "run"),
    } | changes  # fmt: skip


def test_a_search_uses_the_statistics(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = search_config(place, output=str(tmp_path / "run"))
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
    assert run("check", tmp_path / "search.yaml") == 0
    assert run("search", tmp_path / "search.yaml") == 0
    with Archive(tmp_path / "run", readonly=True) as archive:
        evaluations = archive.evaluations("search")
    merged = [e for e in evaluations if e.recipe.canonical().calibration is not None]
    assert merged
    assert all(e.outcome.status == "ok" for e in evaluations)
    assert all(e.recipe.calibration and e.recipe.calibration.digests for e in merged)
    words = ["stitch", tmp_path / "run", "--point", merged[0].recipe.point, tmp_path / "model"]
    assert run(*words, "--no-verify") == 0
    capsys.readouterr()
    other = ["calibration=elsewhere", f"output={tmp_path / 'other'}"]
    assert run("search", tmp_path / "search.yaml", *other) == 2
    assert "has no statistics of base for regmean" in capsys.readouterr().err
    del config["calibration"]
    with pytest.raises(UsageError, match=r"names regmean, which needs calibration data"):
        parse_config(config, "search.yaml")


def test_calibrate_takes_a_search_yaml(place: Path, tmp_path: Path) -> None:
    config = search_config(place, calibration="cal")
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
    words = ["calibrate", tmp_path / "search.yaml", "--text", place / "text.txt", "--tokens", 200]
    assert run(*words) == 0
    files = {p.name for p in (tmp_path / "cal").iterdir()}
    assert files == {f"{name}.regmean.safetensors" for name in NAMES}


def test_an_evaluation_that_lacks_statistics_is_infeasible(place: Path) -> None:
    recipe = read_recipe(place / "recipe.yaml")
    tasks = EvaluationConfig(
        tasks=tasks_of("demo_sort"), include_path=str(PATH / "tasks"), rungs=(5,), device="cpu"
    )
    evaluator = Evaluator(Family(recipe.models, "base"), tasks)
    outcome = evaluator.evaluate(replace(recipe, calibration=None, _cache={}))
    assert outcome.status == "infeasible"
    assert "needs calibration data" in outcome.reason


# What users do wrong


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tiny family, statistics made by hand, and a recipe that uses both kinds."""
    save_family(tmp_path / "models", NAMES)
    models = {name: str(tmp_path / "models" / name) for name in NAMES}
    for method in ("fisher", "regmean"):
        save_statistics(tmp_path / "calibration", method, models)
    write(tmp_path / "recipe.yaml", *LAYERS[:2])
    return tmp_path


def fails(
    capsys: pytest.CaptureFixture[str], code: int, messages: tuple[str, ...], *words: object
) -> None:
    capsys.readouterr()
    assert run(*words) == code
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    for message in messages:
        assert message in text


Break = Callable[[Path], object]
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def again(method: str, **options: Any) -> Break:
    def write_again(tiny: Path) -> None:
        place = {"clock": str(tiny / "models" / "clock")}
        save_statistics(tiny / "calibration", method, place, **options)

    return write_again


def other_weights(tiny: Path) -> None:
    path = tiny / "models" / "clock" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


CALIBRATION = {"folder": "./calibration", "fisher": {"sort": "0" * 16, "clock": "1" * 16}}
BREAKS: dict[str, tuple[int, Break, tuple[str, ...]]] = {
    "no folder named": (
        2, lambda t: write(t / "recipe.yaml", *LAYERS[:2], calibration=None),
        ("merges clock by fisher, which needs calibration data", "gptailor calibrate"),
    ),
    "no such folder": (
        2, lambda t: shutil.rmtree(t / "calibration"),
        ("calibration has no statistics of clock for fisher", "gptailor calibrate"),
    ),
    "one model is missing": (
        2, lambda t: (t / "calibration" / "base.regmean.safetensors").unlink(),
        ("no statistics of base for regmean (base.regmean.safetensors)",),
    ),
    "truncated": (
        3, lambda t: os.truncate(t / "calibration" / "sort.regmean.safetensors", 5000),
        ("sort.regmean.safetensors is truncated",),
    ),
    "the other kind": (
        3,
        lambda t: shutil.copy(
            t / "calibration" / "sort.regmean.safetensors",
            t / "calibration" / "sort.fisher.safetensors",
        ),
        ("sort.fisher.safetensors holds no statistics for fisher",),
    ),
    "other weights": (
        3, other_weights,
        ("clock.fisher.safetensors does not belong to the weights of", "models/clock"),
    ),
    "another shape": (
        3, again("regmean", changes={UP: np.eye(15)}),
        (f"clock.regmean.safetensors: {UP} is F32 of the shape [15, 15], but must be", "[16, 16]"),
    ),
    "another shape of fisher": (
        3, again("fisher", changes={NORM: np.ones((16, 1))}), (NORM, "[16, 1]", "shape [16]"),
    ),
    "another dtype": (3, again("fisher", dtype="I64"), ("is I64 of the shape",)),
    "a tensor is missing": (
        3, again("fisher", changes={NORM: None}), (f"clock.fisher.safetensors lacks {NORM}",),
    ),
    "a Gram matrix is missing": (
        3, again("regmean", changes={UP: None}), (f"clock.regmean.safetensors lacks {UP}",),
    ),
    "NaN": (
        3, again("regmean", changes={UP: np.full((16, 16), np.nan)}),
        (f"clock/model.safetensors: {UP} can't be merged: a Gram matrix is NaN or infinite",),
    ),
    "too little data": (
        2,
        lambda t: [
            save_statistics(
                t / "calibration", "regmean", {n: str(t / "models" / n)},
                changes={UP: np.ones((16, 16))},
            )
            for n in NAMES
        ] + [write(t / "recipe.yaml", {**LAYERS[1], "reduce_non_diagonal_ratio": 1})],
        ("mlp.up_proj.weight can't be built: the sum of the Gram matrices is singular",),
    ),
    "not what it was made with": (
        2, lambda t: write(t / "recipe.yaml", LAYERS[0], calibration=CALIBRATION),
        ("is not the file that the recipe was made with",),
    ),
    "weights without a sum": (
        2,
        lambda t: write(t / "recipe.yaml", {**LAYERS[0], "weights": {"sort": 1, "clock": -1}}),
        ("the weights of fisher add up to zero",),
    ),
    "no folder at all": (
        2, lambda t: write(t / "recipe.yaml", LAYERS[0], calibration=3),
        ("recipe.yaml: calibration must be a mapping",),
    ),
    "an unknown kind": (
        2, lambda t: write(t / "recipe.yaml", LAYERS[0], calibration={"folder": "x", "fihser": {}}),
        ("unknown key 'fihser'", "did you mean 'fisher'?"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_statistics_that_do_not_fit(
    tiny: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run("stitch", tiny / "recipe.yaml", tiny / "fine", "--no-verify") == 0
    code, do_it, messages = BREAKS[name]
    do_it(tiny)
    words = ("stitch", tiny / "recipe.yaml", tiny / "out", "--no-verify")
    fails(capsys, code, messages, *words)
    assert not (tiny / "out").exists()


def test_what_calibrate_refuses(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = place / "recipe.yaml"
    plain = write(place / "plain.yaml", {"take": "sort", "layer": 0}, calibration=None)
    text = ("--text", place / "text.txt")
    for code, message, *words in (
        (2, "missing.txt can't be read", recipe, "--text", place / "missing.txt"),
        (2, "did you mean 'fisher'", recipe, *text, "--method", "fishre"),
        (2, "names no calibration", plain, *text, "--method", "fisher"),
        (2, "neither fisher nor regmean", plain, *text, "--out", place / "new"),
        (2, "did you mean 'float32'", recipe, *text, "--dtype", "flaot32"),
        (2, "is also an input (clock)", recipe, *text, "--out", place / "models" / "clock"),
        (2, "can't be used", recipe, *text, "--device", "cuda:77", "--out", place / "new"),
        (2, "absent.yaml can't be read", place / "absent.yaml", *text),
    ):
        fails(capsys, code, (message,), "calibrate", *words)
    assert not (place / "new").exists()


def test_no_partial_file_is_left(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = Family({"sort": str(place / "models" / "sort")}, "sort")
    sequences = calibrate.read_sequences(place / "text.txt", family.base, num_tokens=100, seq_len=8)
    assert max(map(len, sequences.tokens)) <= 8

    failures: list[BaseException] = [
        FloatingPointError("the inputs are not finite numbers"),
        OSError(28, "No space left on device"),
        MemoryError(),
        KeyboardInterrupt(),
    ]

    def broken(*_: object) -> Any:
        yield "model.layers.0.self_attn.q_proj.weight", torch.eye(48)
        raise failures.pop(0)

    monkeypatch.setattr(calibrate, "gram_matrices", broken)
    for error in (ModelError, ResourceError, ResourceError, KeyboardInterrupt):
        with pytest.raises(error):
            calibrate.calibrate_model(family.base, "regmean", sequences, tmp_path, device="cpu")
        assert list(tmp_path.iterdir()) == []


def test_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    path = statistics_path(tmp_path, "fisher", "a/b c")
    assert path.name == "a%2Fb c.fisher.safetensors"
    with pytest.raises(RuntimeError), writing(path, {}, {"x": ("F32", (2, 3))}):
        (temporary,) = tmp_path.iterdir()
        raise RuntimeError
    stale = tmp_path / f"{temporary.name.rpartition('-')[0]}-4194305"  # above the largest pid
    stale.write_bytes(b"half")
    with writing(path, {"a": "b"}, {"x": ("F32", (2, 3)), "y": ("BF16", ())}) as file:
        file.write("x", np.arange(6, dtype=np.float32).data)
        assert len(list(tmp_path.iterdir())) == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    tensors = load_tensors(path)
    assert floats(tensors["x"]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["y"] == ("BF16", (), b"\0\0")


def test_a_digest_of_weights_changes_with_any_tensor(tmp_path: Path) -> None:
    models = save_family(tmp_path, ("base", "sort"))
    digests = {weights_digest(Checkpoint(models[n]).tensors) for n in models}
    assert len(digests) == 2
    sharded = Path(models["base"])
    path = sharded / "model.safetensors"
    whole = Checkpoint(sharded)
    before = weights_digest(whole.tensors)
    for info in list(whole.tensors.values())[:3]:
        raw = bytearray(path.read_bytes())
        raw[info.offset + info.n_bytes // 2] ^= 4
        path.write_bytes(bytes(raw))
        assert weights_digest(whole.tensors) not in {before, *digests}
        raw[info.offset + info.n_bytes // 2] ^= 4
        path.write_bytes(bytes(raw))
    assert weights_digest(whole.tensors) == before


def test_a_calibration_that_was_not_looked_up(place: Path) -> None:
    calibration = Calibration(str(place / "calibration"))
    assert calibration.digest("fisher", "sort") == ""
    found = calibration.found([("fisher", "sort"), ("fisher", "clock"), ("fisher", "sort")])
    assert [entry[:2] for entry in found.digests] == [("fisher", "clock"), ("fisher", "sort")]
    assert len(found.digest("fisher", "sort")) == 16
    assert found.digest("regmean", "sort") == ""
