"""Layers found from tensor names, and configs that stay true when layers are cut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.errors import ModelError, UsageError
from gptailor.models.architecture import (
    Architecture,
    cut_config,
    find_architecture,
    implied_lists,
    per_layer_lists,
    role_of,
    text_config,
    untied,
)
from gptailor.models.checkpoint import TensorInfo
from gptailor.models.scales import check_scales
from tests.models.tiny import LAYER_SHAPES


def found(sizes: dict[str, int]) -> Architecture:
    tensors = {n: TensorInfo(n, "BF16", (k,), Path("x"), 0, 2 * k) for n, k in sizes.items()}
    return find_architecture(tensors, "the model")


def stack(prefix: str, suffixes: list[str], num_layers: int = 3, size: int = 100) -> dict[str, int]:
    return {f"{prefix}{i}.{suffix}": size for i in range(num_layers) for suffix in suffixes}


LLAMA = list(LAYER_SHAPES)
GPT2 = [
    f"{part}.{kind}"
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
]
NEOX = [
    "attention.query_key_value.weight", "attention.dense.weight", "attention.dense.bias",
    "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias",
]  # fmt: skip


def test_llama() -> None:
    ends = {"model.embed_tokens.weight": 9000, "model.norm.weight": 4, "lm_head.weight": 9000}
    architecture = found(stack("model.layers.", LLAMA) | ends)
    assert architecture.prefix == "model.layers."
    assert architecture.num_layers == 3
    assert architecture.embeddings == ("model.embed_tokens.weight",)
    assert architecture.head == ("model.norm.weight", "lm_head.weight")
    assert architecture.layers[2]["mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight"
    assert architecture.name(7, "x.bias") == "model.layers.7.x.bias"
    writers = architecture.residual_writers(0)
    assert set(writers) == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2(prefix: str) -> None:
    ends = {f"{prefix}{n}": 50 for n in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}
    architecture = found(ends | stack(f"{prefix}h.", GPT2, 12))
    assert architecture.prefix == f"{prefix}h."
    assert architecture.num_layers == 12
    assert architecture.embeddings == (f"{prefix}wte.weight", f"{prefix}wpe.weight")
    assert architecture.head == (f"{prefix}ln_f.weight", f"{prefix}ln_f.bias")
    assert set(architecture.residual_writers(3)) == {
        f"{part}.c_proj.{kind}" for part in ("attn", "mlp") for kind in ("weight", "bias")
    }


def test_gpt_neox() -> None:
    ends = dict.fromkeys(("gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.weight"), 1)
    architecture = found(ends | {"embed_out.weight": 1} | stack("gpt_neox.layers.", NEOX))
    assert architecture.prefix == "gpt_neox.layers."
    assert architecture.embeddings == ("gpt_neox.embed_in.weight",)
    assert architecture.head == ("gpt_neox.final_layer_norm.weight", "embed_out.weight")
    assert len(architecture.residual_writers(0)) == 4


@pytest.mark.parametrize("num_layers", [1, 3])
def test_experts_are_not_layers(num_layers: int) -> None:
    experts = [f"mlp.experts.{e}.{p}.weight" for e in range(8) for p in ("w1", "down_proj")]
    architecture = found(stack("model.layers.", experts, num_layers))
    assert architecture.prefix == "model.layers."
    assert architecture.num_layers == num_layers
    assert set(architecture.layers[0]) == set(experts)
    with pytest.raises(UsageError, match="can't be folded"):
        architecture.residual_writers(0)


def test_norms_after_a_projection_forbid_scales() -> None:
    gemma = [*LLAMA, "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"]
    with pytest.raises(UsageError, match=r"model\.layers\.1"):
        found(stack("model.layers.", gemma)).residual_writers(1)


@pytest.mark.parametrize(
    "part", ["self_attn.dense_bias", "mlp.experts.down_proj", "mlp.odd.weight"]
)
def test_parts_that_write_to_an_unknown_place_forbid_scales(part: str) -> None:
    with pytest.raises(UsageError, match="scale can't be folded"):
        found(stack("model.layers.", [*LLAMA, part])).residual_writers(1)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "openai-gpt"},
        {"model_type": "opt", "do_layer_norm_before": False},
        {"model_type": "bloom", "apply_residual_connection_post_layernorm": True},
        {},
    ],
)
def test_scales_need_norms_in_front_of_each_reader(config: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="scale can't be folded"):
        check_scales(config, "m")


def test_scales_can_be_folded_into_known_types() -> None:
    check_scales({"model_type": "opt", "do_layer_norm_before": True}, "m")
    check_scales({"model_type": "fuyu", "text_config": {"model_type": "persimmon"}}, "m")


def test_a_smaller_stack_beside_the_layers_stays_whole() -> None:
    vision = stack("vision.encoder.layers.", ["w"], 30, size=1)
    architecture = found(stack("language.layers.", LLAMA) | vision)
    assert architecture.prefix == "language.layers."
    assert set(architecture.head) == set(vision)


def test_missing_layers() -> None:
    sizes = stack("model.layers.", LLAMA, 5)
    lacking = {n: k for n, k in sizes.items() if not n.startswith("model.layers.2.")}
    with pytest.raises(ModelError, match=r"the model lacks the layer model\.layers\.2, but has "):
        found(lacking)
    with pytest.raises(ModelError, match="no numbered layers"):
        found({"embed.weight": 3, "head.weight": 3})
    with pytest.raises(ModelError, match="no numbered layers"):
        found({})


def test_strange_numbers_are_names() -> None:
    """Numbers that are not written as we would write them do not become layers."""
    good = stack("model.layers.", LLAMA)
    for number in ("00", "01", "٣", "9" * 5000, "-1", "1e3"):
        name = f"model.layers.{number}.self_attn.q_proj.weight"
        architecture = found(good | {name: 100})
        assert architecture.num_layers == 3
        assert architecture.head == (name,)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("transformer.wte.weight", "embeddings"),
        ("wpe.weight", "embeddings"),
        ("tok_embeddings.weight", "embeddings"),
        ("gpt_neox.embed_in.weight", "embeddings"),
        ("model.rotary_emb.inv_freq", "embeddings"),
        ("embed_out.weight", "head"),
        ("lm_head.weight", "head"),
        ("output.weight", "head"),
        ("model.norm.weight", "head"),
        ("transformer.ln_f.bias", "head"),
    ],
)
def test_roles(name: str, role: str) -> None:
    assert role_of(name) == role


# Configs


def config(**keys: Any) -> dict[str, Any]:
    return {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 8, **keys}


KINDS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


def test_cut_lists_and_counts() -> None:
    cut = cut_config(
        config(layer_types=KINDS, no_rope_layers=[1, 0, 1, 1], mlp_only_layers=[0, 3]), (0, 3)
    )
    assert cut["num_hidden_layers"] == 2
    assert cut["layer_types"] == ["full_attention", "sliding_attention"]
    assert cut["no_rope_layers"] == [1, 1]
    assert cut["mlp_only_layers"] == [0, 1]
    assert cut["hidden_size"] == 8


def test_index_lists_are_renumbered_even_when_they_name_all_layers() -> None:
    for key in ("moe_layers", "mlp_only_layers", "full_attn_idxs"):
        assert cut_config(config(**{key: [0, 1, 2, 3]}), (0, 2, 3))[key] == [0, 1, 2]
        assert cut_config(config(**{key: [1, 3]}), (1, 2))[key] == [0]


def test_layers_may_be_repeated_and_change_places() -> None:
    cut = cut_config(config(layer_types=KINDS), (1, 0, 1, 1, 2))
    assert cut["num_hidden_layers"] == 5
    assert cut["layer_types"] == [KINDS[i] for i in (1, 0, 1, 1, 2)]


def test_prefix_counts() -> None:
    moe = config(first_k_dense_replace=2)
    assert cut_config(moe, (0, 2, 3))["first_k_dense_replace"] == 1
    assert cut_config(moe, (2, 3))["first_k_dense_replace"] == 0
    assert cut_config(config(num_dense_layers=2), (1, 2, 3))["num_dense_layers"] == 1


def test_max_window_layers() -> None:
    qwen = config(max_window_layers=3, use_sliding_window=False)
    assert cut_config(qwen, (0, 1, 3))["max_window_layers"] == 2
    assert cut_config(qwen, (3, 0))["max_window_layers"] == 1  # without effect
    sliding = qwen | {"use_sliding_window": True}
    assert cut_config(sliding, (0, 3))["max_window_layers"] == 1
    assert cut_config(sliding | {"layer_types": KINDS}, (3, 0))["num_hidden_layers"] == 2


def test_nested_text_config() -> None:
    whole = {
        "model_type": "x",
        "text_config": config(layer_types=KINDS),
        "vision_config": {"num_hidden_layers": 4, "layer_types": KINDS},
    }
    cut = cut_config(whole, (2,))
    assert cut["text_config"]["num_hidden_layers"] == 1
    assert cut["text_config"]["layer_types"] == ["full_attention"]
    assert cut["vision_config"] == whole["vision_config"]
    assert text_config(config(text_config={"num_hidden_layers": 9}))["num_hidden_layers"] == 4


@pytest.mark.parametrize("key", ["n_layer", "num_layers", "n_layers"])
def test_other_names_of_the_count(key: str) -> None:
    cut = cut_config({key: 4, "layer_types": KINDS}, (1, 2))
    assert cut == {key: 2, "layer_types": KINDS[1:3]}


def test_lists_that_only_happen_to_have_the_same_length() -> None:
    keys: dict[str, list[int] | list[str]] = {
        "eos_token_id": [1, 2, 3, 4],
        "suppress_token_ids": [1, 2, 3, 4],
    }
    keys |= {"architectures": ["a", "b", "c", "d"]}
    assert per_layer_lists(config(**keys), 4) == {}
    cut = cut_config(config(**keys), (0,))
    assert {key: cut[key] for key in keys} == keys


def test_config_without_a_count() -> None:
    for broken in ({}, {"num_hidden_layers": "4"}, {"num_hidden_layers": None}):
        with pytest.raises(ModelError, match="has no layer count"):
            cut_config(broken, (0,))


def test_suffix_counts() -> None:
    shared = config(num_kv_shared_layers=2, moe_layer_end_index=2)
    cut = cut_config(shared, (0, 2, 3))
    assert (cut["num_kv_shared_layers"], cut["moe_layer_end_index"]) == (2, 1)
    cut = cut_config(shared | {"moe_layer_end_index": -1}, (0, 3))  # the last one
    assert (cut["num_kv_shared_layers"], cut["moe_layer_end_index"]) == (1, -1)


def test_letters_repeated_patterns_and_tables_by_layer() -> None:
    whole = config(
        hybrid_override_pattern="ME*M",
        block_types=["recurrent", "attention"],
        per_layer_config={"1": {"head_dim": 4}, "3": {"head_dim": 8}},
        id2label={"0": "yes", "1": "no"},
    )
    cut = cut_config(whole, (0, 2, 3))
    assert cut["hybrid_override_pattern"] == "M*M"
    assert cut["block_types"] == ["recurrent", "recurrent", "attention"]
    assert cut["per_layer_config"] == {"2": {"head_dim": 8}}
    assert cut["id2label"] == whole["id2label"]


def test_lists_that_a_class_fills_in_are_written_out() -> None:
    gemma = config(model_type="gemma2", sliding_window=4096)
    resolved = {**gemma, "layer_types": KINDS, "moe_layers": [1, 3], "eos_token_id": [1, 2, 3, 4]}
    implied = implied_lists(gemma, resolved, 4)
    assert implied == {"layer_types": KINDS, "moe_layers": [1, 3]}
    assert implied_lists(resolved, resolved, 4) == {}
    cut = cut_config(gemma, (0, 2, 3), implied)
    assert cut["layer_types"] == [KINDS[0], KINDS[2], KINDS[3]]
    assert cut["moe_layers"] == [2]
    assert "layer_types" not in cut_config(gemma, (0, 2, 3))


def test_a_config_that_contradicts_its_files_is_untied() -> None:
    nested = {"tie_word_embeddings": True, "text_config": config(tie_word_embeddings=True)}
    assert untied(nested)["text_config"]["tie_word_embeddings"] is False
    assert untied(config()) == config(tie_word_embeddings=False)


_values = st.none() | st.booleans() | st.integers(0, 9) | st.text(max_size=3)
_extras = st.dictionaries(
    st.sampled_from(
        [
            "layer_types",
            "no_rope_layers",
            "mlp_only_layers",
            "eos_token_id",
            "rope_scaling",
            "x",
            "max_window_layers",
            "first_k_dense_replace",
            "sliding_window_pattern",
            "moe_layers",
        ]
    ),
    _values | st.lists(st.integers(0, 3), min_size=4, max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(extras=_extras, num_layers=st.integers(1, 6))
def test_the_identity_changes_nothing(extras: dict[str, Any], num_layers: int) -> None:
    for key in ("max_window_layers", "first_k_dense_replace"):
        if type(extras.get(key)) is int:
            extras[key] = min(extras[key], num_layers)
        elif key in extras:
            del extras[key]
    for key in ("mlp_only_layers", "moe_layers"):
        if isinstance(extras.get(key), list):
            extras[key] = sorted(i for i in set(extras[key]) if i < num_layers)
    whole = {"num_hidden_layers": num_layers, **extras}
    before = copy.deepcopy(whole)
    assert cut_config(whole, range(num_layers)) == before
    assert whole == before


@settings(max_examples=200, deadline=None)
@given(data=st.data(), num_layers=st.integers(1, 8))
def test_a_cut_of_a_cut_is_a_cut(data: st.DataObject, num_layers: int) -> None:
    whole = {
        "num_hidden_layers": num_layers,
        "layer_types": [f"kind{i % 3}" for i in range(num_layers)],
        "mlp_only_layers": list(range(0, num_layers, 2)),
    }
    first = data.draw(st.lists(st.integers(0, num_layers - 1), min_size=1, max_size=9))
    second = data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1, max_size=9))
    twice = cut_config(cut_config(whole, first), second)
    assert twice == cut_config(whole, [first[i] for i in second])
    assert len(twice["layer_types"]) == twice["num_hidden_layers"] == len(second)


# Configs of transformers: each layer's kind must survive the cut

KEPT = (0, 1, 3, 5, 6, 7, 10, 11)
SHORT = {"num_hidden_layers": 12, "n_layer": 12, "num_layers": 12}
TYPES = [
    "llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next", "gemma",
    "gemma2", "gemma3_text", "gemma3n_text", "cohere2", "llama4_text", "smollm3", "gpt_oss",
    "olmo2", "olmo3", "deepseek_v3", "glm4_moe", "exaone4", "phi3", "granite", "gpt2", "gpt_neox",
    "lfm2", "modernbert-decoder", "starcoder2", "falcon", "minimax",
]  # fmt: skip
KIND_KEYS = ("layer_types", "no_rope_layers", "mlp_layer_types", "activation_sparsity_pattern")


def kinds(config: Any) -> list[tuple[Any, ...]]:
    """The kind of each layer in a transformers config."""
    data = config.to_dict()
    count = config.num_hidden_layers
    columns = [data[k] for k in KIND_KEYS if isinstance(data.get(k), list)]
    assert all(len(column) == count for column in columns)
    for key in ("moe_layers", "mlp_only_layers", "full_attn_idxs"):
        if isinstance(data.get(key), list):
            columns.append([i in data[key] for i in range(count)])
    dense = data.get("first_k_dense_replace")
    columns.append([dense is not None and i < dense for i in range(count)])
    return list(zip(*columns, strict=True))


def shortened(model_type: str) -> Any:
    """A config of twelve layers, with the keys that depend on their number."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    default = cls()
    data = default.to_dict()
    keys: dict[str, int | list[float]] = {key: 12 for key in SHORT if key in data}
    keys |= {"num_kv_shared_layers": 0} if data.get("num_kv_shared_layers") else {}
    if model_type in ("gemma3n_text",):
        keys["activation_sparsity_pattern"] = [0.9] * 3 + [0.0] * 9
    return cls(**keys)


@pytest.mark.parametrize("model_type", TYPES)
def test_transformers_configs_stay_true(model_type: str) -> None:
    pytest.importorskip("transformers")
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    whole = shortened(model_type)
    expected = [kinds(whole)[src] for src in KEPT]
    cls = type(whole)
    cut = cls(**cut_config(whole.to_dict(), KEPT))
    assert cut.num_hidden_layers == len(KEPT)
    assert kinds(cut) == expected
    # older configs on the hub lack the lists
    lists = implied_lists({}, whole.to_dict(), 12)
    old = {k: v for k, v in whole.to_dict().items() if k not in lists}
    resolved = cls(**old).to_dict()
    old_cut = cut_config(old, KEPT, implied_lists(old, resolved, 12))
    assert kinds(cls(**old_cut)) == [kinds(cls(**old))[src] for src in KEPT]


@pytest.mark.parametrize("model_type", ["llama4_text", "gemma3_text", "qwen3", "smollm3", "gpt2"])
def test_transformers_models_build_from_cut_configs(model_type: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    cls = CONFIG_MAPPING[model_type]
    small = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "head_dim": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2,
             "pad_token_id": 0, "n_embd": 32, "n_head": 4}  # fmt: skip
    known = cls().to_dict()
    counts = {key: 12 for key in SHORT if key in known}
    whole = cls(**counts, **{k: v for k, v in small.items() if k in known})
    config = cls(**cut_config(whole.to_dict(), KEPT))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        dense = AutoModelForCausalLM.from_config(whole)
    shapes, dense_shapes = ({n: t.shape for n, t in m.state_dict().items()} for m in (model, dense))
    tensors = {n: TensorInfo(n, "F32", tuple(s), Path("x"), 0, 4) for n, s in dense_shapes.items()}
    architecture = find_architecture(tensors, model_type)
    for out_layer, src_layer in enumerate(KEPT):
        for suffix, name in architecture.layers[src_layer].items():
            assert shapes.pop(architecture.name(out_layer, suffix)) == dense_shapes[name]
    assert set(shapes) == {*architecture.embeddings, *architecture.head}
