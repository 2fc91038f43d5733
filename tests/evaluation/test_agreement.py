"""Configs are compared by meaning, and each field here is also tried on stock transformers.

Two folders hold the same weights, and their configs differ in one field. If stock transformers
computes different logits, the pair is refused; if the logits are equal, there is a note at most.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptailor import verbs
from gptailor.errors import ModelError
from gptailor.evaluation.family import open_family
from gptailor.models.family import Family
from gptailor.recipe import Recipe, Take
from gptailor.stitching.plan import make_plan
from tests.conftest import save_tokenizer

NUM_LAYERS = 4
_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
_SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
_YARN = {"rope_type": "yarn", "original_max_position_embeddings": 32, "rope_theta": 100.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "dynamic": ("llama", _SIZES | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "linear": ("llama", _SIZES | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "yarn": ("llama", _SIZES | {"rope_parameters": _YARN | {"factor": None}}),
    "yarn2": ("llama", _SIZES | {"rope_parameters": _YARN | {"factor": 2.0}}),
    "mistral": ("mistral", _SIZES | {"sliding_window": 12}),
    "gemma2": ("gemma2", _SIZES | {"sliding_window": 8}),
    "gemma3": ("gemma3_text", _SIZES | {"sliding_window": 8, "sliding_window_pattern": 3}),
    "qwen2": ("qwen2", _SIZES),
    "windows": ("qwen2", _SIZES | _SLIDING),
    "qwen3": ("qwen3", _SIZES),
    "qwen3_moe": ("qwen3_moe", _SIZES | _EXPERTS),
    "granite": ("granite", _SIZES),
    "smollm3": ("smollm3", _SIZES),
    "roberta": ("roberta", _SIZES | {"is_decoder": True}),
    "modernbert": ("modernbert-decoder", _SIZES | {"local_attention": 16}),
    "gpt2": (
        "gpt2",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    ),
}

Change = dict[str, Any] | Callable[[dict[str, Any]], object]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder for each kind of model, created on first use."""
    root = tmp_path_factory.mktemp("kinds")

    def made(kind: str) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = root / kind
        if not folder.exists():
            torch.manual_seed(0)
            model_type, values = KINDS[kind]
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(folder)
            save_tokenizer(folder)
        return folder

    return made


def changed(folder: Path, place: Path, change: Change) -> Path:
    """A folder with the same weights and tokenizer, but another config."""
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    if callable(change):
        change(config)
    else:
        config.update(change)
    (place / "config.json").unlink()
    (place / "config.json").write_text(json.dumps(config))
    return place


def logits(folder: Path) -> torch.Tensor:
    """The logits of a text, and of two more tokens that are read with the cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[(7 * i * i + 3) % 89 + 4 for i in range(52)]])
    with torch.no_grad():
        first = model(input_ids=ids[:, :50], use_cache=True)
        then = model(input_ids=ids[:, 50:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, then.logits], 1)


def pair(base: Path, other: Path) -> dict[str, str]:
    return {"base": str(base), "other": str(other)}


def put(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """Sets a value deep in a config."""

    def change(config: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        config[last] = value

    return change


def without(*keys: str) -> Callable[[dict[str, Any]], object]:
    return lambda config: [config.pop(key, None) for key in keys]


def old_rope(config: dict[str, Any]) -> None:
    """The form used before transformers 5."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None


OTHER_MODELS: list[tuple[str, str, Change]] = [
    ("llama", "rope_parameters.rope_theta", put("rope_parameters.rope_theta", 500.0)),
    (
        "llama",
        "rope_parameters.factor",
        put("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    ),
    ("llama", "rms_norm_eps", {"rms_norm_eps": 1e-2}),
    ("llama", "hidden_act", {"hidden_act": "gelu"}),
    ("llama", "head_dim", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}),
    ("llama", "sliding_window", {"sliding_window": 8}),  # not Llama's, but its cache's
    ("llama", "layer_types", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}),
    ("dynamic", "max_position_embeddings", {"max_position_embeddings": 32}),
    ("yarn", "max_position_embeddings", {"max_position_embeddings": 128}),
    ("linear", "rope_parameters.factor", put("rope_parameters.factor", 4.0)),
    ("mistral", "sliding_window", {"sliding_window": 6}),
    ("mistral", "sliding_window", {"sliding_window": None}),
    ("mistral", "model_type", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
    ("gemma2", "attn_logit_softcapping", {"attn_logit_softcapping": 0.5}),
    ("gemma2", "final_logit_softcapping", {"final_logit_softcapping": 2.0}),
    ("gemma2", "query_pre_attn_scalar", {"query_pre_attn_scalar": 16}),
    ("gemma2", "layer_types[1]", put("layer_types", ["sliding_attention"] * NUM_LAYERS)),
    (
        "gemma3",
        "rope_parameters.sliding_attention.rope_theta",
        put("rope_parameters.sliding_attention.rope_theta", 50.0),
    ),
    ("windows", "sliding_window", {"sliding_window": 4}),
    (
        "windows",
        "layer_types[1]",
        put("layer_types", ["full_attention"] + ["sliding_attention"] * 3),
    ),
    ("qwen3_moe", "num_experts_per_tok", {"num_experts_per_tok": 3}),
    ("qwen3_moe", "norm_topk_prob", {"norm_topk_prob": True}),
    ("granite", "embedding_multiplier", {"embedding_multiplier": 3.0}),
    ("granite", "residual_multiplier", {"residual_multiplier": 0.5}),
    ("granite", "logits_scaling", {"logits_scaling": 4.0}),
    ("granite", "attention_multiplier", {"attention_multiplier": 0.1}),
    ("smollm3", "no_rope_layers[0]", put("no_rope_layers", [0, 1, 1, 1])),
    ("roberta", "pad_token_id", {"pad_token_id": 5}),
    ("modernbert", "classifier_activation", {"classifier_activation": "relu"}),
    ("gpt2", "layer_norm_epsilon", {"layer_norm_epsilon": 1e-1}),
    ("gpt2", "scale_attn_weights", {"scale_attn_weights": False}),
]


@pytest.mark.parametrize(
    ("kind", "key", "change"), OTHER_MODELS, ids=[f"{k}-{key}" for k, key, _ in OTHER_MODELS]
)
def test_configs_that_compute_something_else_are_refused(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str, key: str, change: Change
) -> None:
    base = folder_of(kind)
    other = changed(base, tmp_path / "other", change)
    assert not torch.equal(logits(base), logits(other))
    for one, two in ((base, other), (other, base)):
        with pytest.raises(ModelError) as caught:
            open_family(pair(one, two), "base")
        text = str(caught.value)
        assert f"{two}: config.json has " in text
        assert f" {key} " in text
        assert f"than with {one}: leave it out." in text
    values = [json.loads((f / "config.json").read_text()).get(key) for f in (other, base)]
    if None not in values:  # both values are named
        assert f"{key} {values[0]!r} (the base: {values[1]!r})" in str(_error(base, other))


def _error(base: Path, other: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        open_family(pair(base, other), "base")
    return caught.value


SAME_MODELS: list[tuple[str, str, Change]] = [
    ("llama", "max_position_embeddings", {"max_position_embeddings": 4096}),
    ("linear", "max_position_embeddings", {"max_position_embeddings": 4096}),
    ("yarn2", "max_position_embeddings", {"max_position_embeddings": 4096}),
    ("llama", "dtype", {"dtype": "bfloat16"}),
    ("llama", "eos_token_id", {"eos_token_id": [2, 3]}),
    ("llama", "pad_token_id", {"pad_token_id": None}),
    ("llama", "use_cache", {"use_cache": False}),
    ("llama", "initializer_range", {"initializer_range": 0.5}),
    ("llama", "attention_dropout", {"attention_dropout": 0.5}),
    ("llama", "pretraining_tp", {"pretraining_tp": 2}),
    ("llama", "output_hidden_states", {"output_hidden_states": True}),
    ("llama", "output_attentions", {"output_attentions": True}),
    ("llama", "problem_type", {"problem_type": "regression"}),
    ("llama", "id2label.1", {"id2label": {"0": "good", "1": "bad"}}),
    ("llama", "architectures", {"architectures": ["LlamaModel", "LlamaForCausalLM"]}),
    ("llama", "unsloth_version", {"unsloth_version": "2025.1"}),
    ("llama", "rope_interleaved", {"rope_interleaved": False}),
    ("llama", "sliding_window", {"sliding_window": None}),
    ("llama", "layer_types", {"layer_types": ["full_attention"] * NUM_LAYERS}),
    ("qwen2", "max_window_layers", {"max_window_layers": 1}),
    ("qwen3_moe", "output_router_logits", {"output_router_logits": True}),
    ("qwen3_moe", "router_aux_loss_coef", {"router_aux_loss_coef": 0.5}),
    ("gpt2", "resid_pdrop", {"resid_pdrop": 0.5}),
    ("gpt2", "embd_pdrop", {"embd_pdrop": 0.5}),
    ("gpt2", "summary_type", {"summary_type": "mean"}),
    ("gpt2", "n_ctx", {"n_ctx": 2048}),
]


@pytest.mark.parametrize(
    ("kind", "key", "change"), SAME_MODELS, ids=[f"{k}-{key}" for k, key, _ in SAME_MODELS]
)
def test_configs_that_compute_the_same_are_accepted(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str, key: str, change: Change
) -> None:
    base = folder_of(kind)
    other = changed(base, tmp_path / "other", change)
    assert torch.equal(logits(base), logits(other))
    family = open_family(pair(base, other), "base")
    if not family.notes:  # only one file has the field, so transformers need not be asked
        assert key.partition(".")[0] not in json.loads((base / "config.json").read_text())
        return
    (note,) = family.notes
    assert note.startswith("other: its ")
    assert key in note
    if key == "max_position_embeddings":
        assert "is 4096, but the base's 64 applies, in the result and as the context" in note


SAME_WORDS: list[tuple[str, str, Change]] = [
    ("qwen2", "layer_types", without("layer_types")),
    ("qwen3", "layer_types", without("layer_types")),
    ("gemma2", "layer_types", without("layer_types")),
    ("gemma3", "layer_types", without("layer_types")),
    ("windows", "layer_types", without("layer_types")),
    ("smollm3", "layer lists", without("layer_types", "no_rope_layers")),
    ("llama", "rope", old_rope),
    ("linear", "rope", old_rope),
    ("dynamic", "rope", old_rope),
    ("llama", "dtype", lambda c: c.update(torch_dtype=c.pop("dtype"))),
    ("llama", "defaults left out", without("attention_bias", "mlp_bias", "hidden_act")),
    ("llama", "defaults written", {"attention_dropout": 0.0, "rope_scaling": None}),
    ("llama", "float32", {"rms_norm_eps": 9.999999974752427e-07}),
    ("mistral", "float marker", {"attention_dropout": {"__float__": "NaN"}}),
    ("gpt2", "version", {"transformers_version": "4.1.0", "_name_or_path": "gpt2"}),
]


@pytest.mark.parametrize(
    ("kind", "what", "change"), SAME_WORDS, ids=[f"{k}-{what}" for k, what, _ in SAME_WORDS]
)
def test_other_spellings_of_the_same_config(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str, what: str, change: Change
) -> None:
    base = folder_of(kind)
    if what == "float marker":
        base = changed(base, tmp_path / "base", {"attention_dropout": float("nan")})
    other = changed(base, tmp_path / "other", change)
    for one, two in ((base, other), (other, base)):
        assert not open_family(pair(one, two), "base").notes


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_an_older_config_of_the_base(
    folder_of: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """The most common case: a newer transformers saved the finetune than the base."""
    from transformers import AutoModelForCausalLM

    new = folder_of(kind)
    old = changed(new, tmp_path / "old", without("layer_types"))
    models = pair(old, new)
    recipe = Recipe(models, "base", (Take("base", 0), Take("other", 2)), "base", "base", "float32")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    out = verbs.stitch(tmp_path / "recipe.yaml", tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32).eval()
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[0], whole.model.layers[2]])
    whole.config.layer_types = [whole.config.layer_types[0], whole.config.layer_types[2]]
    whole.config.num_hidden_layers = 2
    stitched = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(4, 54)[None]
    with torch.no_grad():
        found = [model(input_ids=ids, use_cache=False).logits for model in (stitched, whole)]
    assert torch.equal(*found)


def test_equal_files_need_no_transformers(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from tests.models.tiny import run_python

    base = folder_of("llama")
    other = changed(base, tmp_path / "other", {"use_cache": False, "eos_token_id": 5})
    done = run_python(
        "import sys\n"
        "from gptailor.evaluation.family import open_family\n"
        "family = open_family({'base': sys.argv[1], 'other': sys.argv[2]}, 'base')\n"
        "print(family.notes, 'transformers' in sys.modules, 'torch' in sys.modules)",
        base,
        other,
    )
    note = "other: its config.json differs in eos_token_id, use_cache from the base, which"
    assert done.stdout.startswith(f"('{note}"), done.stderr
    assert done.stdout.endswith("False False\n")


def test_no_plan_is_made_before_transformers_has_decided(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = folder_of("llama")
    other = changed(base, tmp_path / "other", {"rms_norm_eps": 1e-2})
    family = Family(pair(base, other), "base")
    recipe = Recipe(family.refs, "base", (Take("other", 0),), "base", "base", "float32")
    with pytest.raises(ModelError, match=r"rms_norm_eps 0\.01 \(the base: 1e-06\), and only trans"):
        make_plan(recipe, family)


def test_every_verb_compares_configs(
    folder_of: Callable[[str], Path], tmp_path: Path, tasks_dir: Path
) -> None:
    base = folder_of("llama")
    other = changed(base, tmp_path / "other", {"rms_norm_eps": 1e-2})
    models = pair(base, other)
    recipe = Recipe(models, "base", (Take("other", 0), Take("base", 1)), "base", "base", "float32")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    config = {
        "models": models,
        "base": "base",
        "evaluation": {"tasks": ["t_shared"], "include_path": str(tasks_dir), "device": "cpu"},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "search.yaml").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("w01 w02 w03\n")
    (tmp_path / "merge.yaml").write_text(
        "merge_method: linear\ndtype: float32\nmodels:\n"
        f"- {{model: {base}, parameters: {{weight: 0.5}}}}\n"
        f"- {{model: {other}, parameters: {{weight: 0.5}}}}\n"
    )
    out = tmp_path / "out"
    calls: list[Callable[[], object]] = [
        lambda: verbs.stitch(tmp_path / "recipe.yaml", out),
        lambda: verbs.stitch(tmp_path / "recipe.yaml", out, verify=False),
        lambda: verbs.stitch(tmp_path / "merge.yaml", out),
        lambda: verbs.evaluate(tmp_path / "recipe.yaml", ["t_shared"], include_path=str(tasks_dir)),
        lambda: verbs.calibrate(
            tmp_path / "recipe.yaml", tmp_path / "text.txt", out, methods=["fisher"]
        ),
        lambda: verbs.plan(tmp_path / "search.yaml"),
        lambda: verbs.prefetch(tmp_path / "search.yaml"),
        lambda: verbs.search(tmp_path / "search.yaml"),
    ]
    sentence = r"other: config.json has rms_norm_eps 0\.01 \(the base: 1e-06\), so the same tensors"
    for call in calls:
        with pytest.raises(ModelError, match=sentence):
            call()
    (problem,) = verbs.check(tmp_path / "search.yaml")
    assert "rms_norm_eps 0.01" in problem
    assert not out.exists()
    assert not (tmp_path / "run" / "archive.db").exists()


def test_an_unknown_architecture(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Equal configs are accepted; differences can't be judged."""
    base = changed(folder_of("llama"), tmp_path / "base", {"model_type": "nobodys"})
    same = changed(base, tmp_path / "same", {"use_cache": False})
    open_family(pair(base, same), "base")
    other = changed(base, tmp_path / "other", {"swish_beta": 2})
    text = str(_error(base, other))
    assert f"{other}: config.json differs from that of {base}, and gptailor can't tell" in text
    assert "does not know its architecture" in text


def test_many_differences_are_reported_in_one_sentence(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = folder_of("llama")
    many = {"rms_norm_eps": 1e-2, "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True}
    other = changed(base, tmp_path / "other", many)
    text = str(_error(base, other))
    assert "attention_bias True (the base: False), hidden_act 'gelu' (the base: 'silu')" in text
    assert "and 1 more, so the same tensors" in text
