"""What transformers makes of a folder and of a cut of it, compared with stock transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptailor.errors import ModelError, ResourceError, UsageError
from gptailor.evaluation.lazy_reader import LazyReader
from gptailor.evaluation.resident import ResidentModel
from gptailor.evaluation.signature import carry_over, compare_layer, signature
from gptailor.evaluation.smoke import smoke_test
from gptailor.evaluation.structure import Structure
from gptailor.models.candidate import Candidate
from gptailor.models.checkpoint import Checkpoint
from gptailor.models.family import Family
from gptailor.recipe import Recipe, Take
from gptailor.stitching.write import write_model
from tests.models.real import SMALL_GPT2, loaded, logits_of, save_real


def opened(folder: Path) -> Family:
    return Family({"base": str(folder)}, "base", reader=LazyReader())


def recipe(folder: Path, *src_layers: int) -> Recipe:
    layers = tuple(Take("base", i) for i in src_layers)
    return Recipe({"base": str(folder)}, "base", layers, "base", "base", "float32")


def structure(folder: Path) -> Structure:
    config = json.loads((folder / "config.json").read_text())
    return Structure(folder, config, Checkpoint(folder).tensors)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


LFM2_MOE: dict[str, Any] = {
    "num_dense_layers": 2,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
}


def test_layers_that_a_count_makes_dense(tmp_path: Path) -> None:
    """Layers 1, 2 and 3 with one dense layer left: nothing is initialised at random."""
    folder = save_real(tmp_path / "m", "lfm2_moe", **LFM2_MOE)
    out = tmp_path / "out"
    write_model(recipe(folder, 1, 2, 3), opened(folder), out, test=smoke_test)
    cut, whole = loaded(out), loaded(folder)
    assert cut.config.num_dense_layers == 1
    for layer, src in zip(cut.model.layers, (1, 2, 3), strict=True):
        for name, parameter in whole.model.layers[src].named_parameters():
            assert torch.equal(layer.get_parameter(name), parameter)


def test_a_cut_that_no_config_can_describe_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    folder = save_real(tmp_path / "m", "lfm2_moe", **LFM2_MOE)
    with pytest.raises(UsageError, match="layer 0 of the result would not be what layer 2 is"):
        write_model(recipe(folder, 2, 1), opened(folder), tmp_path / "out")
    with pytest.raises(UsageError, match=r"it would not run: .*Attention"):
        write_model(recipe(folder, 0), opened(folder), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_rules_without_a_config_key_are_found_from_the_layers(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
    }
    keys |= {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    folder = save_real(tmp_path / "m", "jamba", **keys)
    found = structure(folder)
    assert found.cut((0, 1, 2)).config["num_hidden_layers"] == 3  # the rule still gives the same
    with pytest.raises(UsageError, match="JambaAttentionDecoderLayer"):
        found.cut((1, 2, 3))


@pytest.mark.parametrize("model_type", ["gemma2", "qwen3"])
def test_lists_that_older_files_lack_are_written_out(model_type: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"sliding_window": 4, "max_window_layers": 2}
    keys["use_sliding_window"] = True
    new = save_real(tmp_path / "new", model_type, **keys)
    old = save_real(tmp_path / "old", model_type, without=("layer_types",), **keys)
    for folder in (new, old):
        write_model(recipe(folder, 1, 2, 3), opened(folder), tmp_path / f"{folder.name}-out")
    kinds = json.loads((new / "config.json").read_text())["layer_types"]
    assert len(set(kinds)) == 2
    models = [loaded(tmp_path / f"{name}-out") for name in ("new", "old")]
    assert [model.config.layer_types for model in models] == [kinds[1:]] * 2
    assert torch.equal(logits_of(models[0]), logits_of(models[1]))


def test_constants_that_depend_on_the_index_are_those_of_the_stitched_model(tmp_path: Path) -> None:
    folder = save_real(
        tmp_path / "m", "gpt2", small=SMALL_GPT2, scale_attn_by_inverse_layer_idx=True
    )
    family = opened(folder)
    resident = ResidentModel(family, dtype="float32", device="cpu")
    for number, layers in enumerate([(1, 3), (3,), (0, 1, 2, 3), (3, 3, 1)]):
        out = tmp_path / f"out{number}"
        plan = write_model(recipe(folder, *layers), family, out, sync=False)
        assert bool(plan.notes) is (layers != (0, 1, 2, 3))
        assert torch.equal(
            logits_of(resident.assemble(recipe(folder, *layers))), logits_of(loaded(out))
        )
    assert "attn.scaling" in family.base.cut_config((1, 3))[1][0]


def test_a_kind_is_not_a_constant() -> None:
    """A float with a few recurring values tells kinds apart; one that is always new does not."""

    def layer(**values: Any) -> torch.nn.Module:
        module = torch.nn.Linear(2, 2, device="meta")
        for name, value in values.items():
            setattr(module, name, value)
        return module

    bases = [1e4, 1e6, 1e4, 1e6]
    whole = [signature(layer(base=b, scale=1 / (i + 1), number=i)) for i, b in enumerate(bases)]
    cut = [signature(layer(base=1e4, scale=1.0, number=0))]
    moved = compare_layer(whole, cut, (2,), 0)
    assert moved.constants == {("", "scale"): 1.0, ("", "number"): 0}
    assert moved.problems == []
    assert compare_layer(whole, cut, (3,), 0).problems == [
        "its base is 10000.0 instead of 1000000.0"
    ]
    for name, value in (("scale", "wide"), ("number", 7), ("more", None)):
        other = [signature(layer(**{"base": 1e4, "scale": 1.0, "number": 0, name: value}))]
        assert len(compare_layer(whole, other, (2,), 0).problems) == 1


def test_constants_are_restored() -> None:
    module = torch.nn.BatchNorm1d(2)
    before = carry_over(module, {("", "eps"): 0.5, ("gone", "x"): 1})
    assert (module.eps, before) == (0.5, {("", "eps"): 1e-5})
    carry_over(module, before)
    assert module.eps == 1e-5


def test_weights_that_a_model_writes_to_are_not_shared(tmp_path: Path) -> None:
    small = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "rescale_every": 2}
    folder = save_real(tmp_path / "m", "rwkv", small=small, attention_hidden_size=32)
    with pytest.raises(ModelError, match="writes into its own weights"):
        ResidentModel(opened(folder), dtype="float32", device="cpu")
    write_model(recipe(folder, 0, 2), opened(folder), tmp_path / "out", test=smoke_test)


def test_scores_that_depend_on_chance_are_not_compared(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"is_decoder": True, "axial_pos_embds": False, "num_buckets": 4}
    keys |= {"attn_layers": ["local", "lsh"] * 2, "attention_head_size": 8}
    folder = save_real(tmp_path / "m", "reformer", **keys)
    with pytest.raises(ModelError, match=r"draws random numbers \(aten::randn"):
        ResidentModel(opened(folder), dtype="float32", device="cpu")


def test_modules_that_a_model_replaces_are_not_shared(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"is_decoder": True, "attention_type": "block_sparse", "block_size": 4}
    folder = save_real(tmp_path / "m", "big_bird", num_random_blocks=1, **keys)
    with pytest.raises(ModelError, match="replaces its own modules"):
        ResidentModel(opened(folder), dtype="float32", device="cpu")


def test_the_stack_is_the_one_whose_depth_the_config_gives(tmp_path: Path) -> None:
    """A vision tower of equal depth and more bytes stays whole."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"model_type": "llama", "vocab_size": 96, "hidden_size": 16, "intermediate_size": 16}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 64}
    vision |= {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision)
    folder = tmp_path / "m"
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    try:
        candidate = Candidate("m", folder, reader=LazyReader())
    except ModelError as error:  # not a causal language model
        assert str(folder) in str(error)
    else:
        assert "vision" not in candidate.architecture.prefix


# Files: tensors that transformers ignores, and ones that it would invent


def test_a_missing_head_is_not_invented(tmp_path: Path) -> None:
    folder = save_real(tmp_path / "m", "llama")
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lacks lm_head.weight, .* not tied"):
        opened(folder)
    folder = save_real(tmp_path / "q", "qwen3")
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lacks lm_head.weight, .* not tied"):
        opened(folder)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("says", "head", "tied", "written"),
    [
        (True, "none", True, None),
        (True, "equal", True, None),
        (True, "other", False, False),
        (False, "equal", False, None),
        (False, "other", False, None),
    ],
)
def test_ties(
    model_type: str, says: bool, head: str, tied: bool, written: bool | None, tmp_path: Path
) -> None:
    """Config and files decide, and every loader gets the same model."""
    folder = save_real(tmp_path / "m", model_type, raw={"tie_word_embeddings": says})

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if head == "none":
            del tensors["lm_head.weight"]
        elif head == "equal":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change(folder, edit)
    family = opened(folder)
    assert family.base.is_tied is tied
    resident = ResidentModel(family, dtype="float32", device="cpu")
    resident.model.tie_weights()  # as lm-eval does with the models it gets
    logits = logits_of(resident.assemble(recipe(folder, 0, 2)))
    write_model(recipe(folder, 0, 2), family, tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert torch.equal(logits, logits_of(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (says if written is None else written)
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tied
    model.tie_weights()
    assert torch.equal(logits, logits_of(model))


def test_tensors_that_transformers_ignores_are_left_out_with_one_note(tmp_path: Path) -> None:
    folder = save_real(tmp_path / "m", "gpt2", small=SMALL_GPT2)
    other = save_real(tmp_path / "n", "gpt2", small=SMALL_GPT2, seed=1)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for i in range(4):
            tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8)
            tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    change(folder, edit)
    family = Family({"base": str(folder), "other": str(other)}, "base", reader=LazyReader())
    assert len(family.base.reading.notes) == 1
    assert "8" not in family.architecture.layers[0] and len(family.architecture.layers[0]) == 12
    resident = ResidentModel(family, dtype="float32", device="cpu")
    write_model(recipe(folder, 0, 2), family, tmp_path / "out", test=smoke_test)
    assert torch.equal(
        logits_of(resident.assemble(recipe(folder, 0, 2))), logits_of(loaded(tmp_path / "out"))
    )


def test_layers_beyond_the_stack(tmp_path: Path) -> None:
    """Those of a multi-token-prediction head are ignored; ordinary ones contradict the config."""
    folder = save_real(tmp_path / "m", "qwen3")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.4.eh_proj.weight"] = torch.ones(32, 64)
        tensors["model.layers.4.input_layernorm.weight"] = torch.ones(32)

    change(folder, add)
    family = opened(folder)
    assert family.num_layers == 4
    write_model(recipe(folder, 0, 3), family, tmp_path / "out", test=smoke_test)
    short = save_real(
        tmp_path / "n", "qwen3", raw={"num_hidden_layers": 3}, without=("layer_types",)
    )
    with pytest.raises(ModelError, match="says 3 layers, but the weights have 4"):
        opened(short)


def test_a_result_that_does_not_run_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    folder = save_real(tmp_path / "m", "llama")

    def fails(place: Path) -> None:
        assert (place / "model.safetensors").is_file()
        raise ModelError("it does not run.")

    out = tmp_path / "out"
    with pytest.raises(ModelError, match="does not run"):
        write_model(recipe(folder, 0, 2), opened(folder), out, test=fails)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    write_model(recipe(folder, 0, 2), opened(folder), out, test=smoke_test)
    assert out.is_dir()


def test_a_type_that_transformers_lacks_is_read_by_tensor_names_with_a_note(tmp_path: Path) -> None:
    folder = save_real(tmp_path / "m", "qwen3", raw={"model_type": "nobodys"})
    family = opened(folder)
    assert "nothing can be compared" in family.notes[0]
    write_model(recipe(folder, 0, 3), family, tmp_path / "out")
    cut = json.loads((tmp_path / "out" / "config.json").read_text())
    assert cut["layer_types"] == ["full_attention"] * 2
    with pytest.raises(ModelError, match="does not know its architecture"):
        write_model(recipe(folder, 0, 3), family, tmp_path / "tested", test=smoke_test)

    def tower(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {f"vision.blocks.{i}.fc.weight": torch.ones(64, 64) for i in range(4)}

    change(folder, tower)
    with pytest.raises(
        ModelError, match=r"which of model\.layers\. and vision\.blocks\. are its layers"
    ):
        opened(folder)


def test_a_leftover_quantization_is_not_applied(tmp_path: Path) -> None:
    left = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    folder = save_real(tmp_path / "m", "qwen3", raw=left)
    family = opened(folder)
    resident = ResidentModel(family, dtype="float32", device="cpu")
    write_model(recipe(folder, 0, 3), family, tmp_path / "out", test=smoke_test)
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    logits = logits_of(resident.assemble(recipe(folder, 0, 3)))
    assert torch.equal(logits, logits_of(loaded(tmp_path / "out")))


def test_layers_that_share_weights_must_come_from_one_model(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_mem_blocks": 1, "mamba_d_state": 4, "mamba_ngroups": 1}
    sizes |= {"n_mamba_heads": 4, "mamba_headdim": 16, "use_mamba_kernels": False}
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    folders = [
        save_real(tmp_path / name, "zamba2", seed=seed, layers_block_type=kinds, **sizes)
        for seed, name in enumerate(("base", "other"))
    ]
    models = {"base": str(folders[0]), "other": str(folders[1])}
    family = Family(models, "base", reader=LazyReader())
    assert family.base.reading.shared

    def made(*names: str) -> Recipe:
        layers = tuple(Take(name, i) for i, name in enumerate(names))
        return Recipe(models, "base", layers, "base", "base", "float32")

    with pytest.raises(UsageError, match="share weights"):
        write_model(made("base", "other", "base", "base"), family, tmp_path / "mixed")
    write_model(made(*["other"] * 4), family, tmp_path / "whole", test=smoke_test)
    layers = tuple(Take("base", i) for i in (1, 2, 3))  # its tables indexed by layer are renumbered
    cut = Recipe(models, "base", layers, "base", "base", "float32")
    write_model(cut, family, tmp_path / "cut", test=smoke_test)


def test_a_result_that_can_not_be_tested_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptailor import verbs
    from gptailor.evaluation import device_memory

    folder = save_real(tmp_path / "m", "llama")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(folder, 0, 2).to_yaml())
    monkeypatch.setattr(device_memory, "available_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match="use --no-verify"):
        verbs.stitch(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    verbs.stitch(path, tmp_path / "out", verify=False)


def test_a_decoder_of_a_type_that_also_translates_is_causal(tmp_path: Path) -> None:
    from gptailor.evaluation.lm import ResidentLM
    from gptailor.evaluation.loading import load_shell, load_tokenizer

    small = {"vocab_size": 130, "d_model": 32, "decoder_layers": 4, "decoder_ffn_dim": 48}
    small |= {"decoder_attention_heads": 4, "max_position_embeddings": 64, "is_decoder": True}
    folder = save_real(tmp_path / "m", "bart", small=small, is_encoder_decoder=False)
    lm = ResidentLM(load_shell(folder, None), load_tokenizer(folder), 2)
    assert lm.backend == "causal"
