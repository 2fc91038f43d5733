"""Model folders that come with code: no verb runs any of it, and errors say what is wrong.

With the real transformers, and Python files that would leave a mark.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptailor import verbs
from gptailor.errors import GptailorError, ModelError
from gptailor.evaluation.loading import load_model, load_tokenizer
from gptailor.evaluation.smoke import smoke_test
from gptailor.models.checkpoint import Checkpoint
from gptailor.recipe import Recipe, Take

EVIL = """
import pathlib
pathlib.Path({mark!r}).write_text("it ran")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
from transformers import PreTrainedTokenizerFast as Tokenizer
generate = None
"""
AUTO_MAP = {
    "AutoConfig": "modeling_evil.Config",
    "AutoModel": "modeling_evil.Model",
    "AutoModelForCausalLM": "modeling_evil.Model",
    "AutoTokenizer": ["modeling_evil.Tokenizer", "modeling_evil.Tokenizer"],
}


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def evil(models: dict[str, str], tmp_path: Path, mark: Path) -> Path:
    """A good model whose config names code beside it."""
    folder = tmp_path / "evil"
    shutil.copytree(models["base"], folder)
    code = EVIL.format(mark=str(mark))
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
        (folder / name).write_text(code)
    for name in ("generate.py", "__init__.py"):
        (folder / "custom_generate").mkdir(exist_ok=True)
        (folder / "custom_generate" / name).write_text(code)
    change(folder / "config.json", auto_map=AUTO_MAP)
    change(folder / "tokenizer_config.json", auto_map=AUTO_MAP)
    return folder


def change(path: Path, **keys: Any) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | keys))


def of_unknown_kind(folder: Path) -> Path:
    """Makes it a model that transformers can't load without the code."""
    change(folder / "config.json", model_type="evil", architectures=["EvilForCausalLM"])
    change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    return folder


def outcome(run: Callable[[], object]) -> str:
    try:
        run()
    except GptailorError as error:
        return str(error)
    return "ok"


def search_yaml(place: Path, evil: Path, tasks_dir: Path) -> Path:
    data = {
        "models": {"base": str(evil), "other": str(evil)},
        "base": "base",
        "evaluation": {
            "tasks": ["t_shared"], "device": "cpu", "include_path": str(tasks_dir), "rungs": [8]
        },
        "search": {"evaluations": 4, "population": 4, "arms": ["dense"]},
        "output": str(place / "run"),
    }  # fmt: skip
    (place / "search.yaml").write_text(yaml.safe_dump(data))
    return place / "search.yaml"


def recipe_yaml(place: Path, evil: Path) -> Path:
    recipe = Recipe({"base": str(evil)}, "base", (Take("base", 1), Take("base", 3)), "base", "base")
    (place / "recipe.yaml").write_text(recipe.to_yaml())
    return place / "recipe.yaml"


@pytest.mark.parametrize("known", [True, False])
def test_no_verb_runs_it(
    known: bool, evil: Path, mark: Path, tmp_path: Path, tasks_dir: Path
) -> None:
    """transformers' own classes load a model of a known type; any other is refused."""
    if not known:
        of_unknown_kind(evil)
    config = search_yaml(tmp_path, evil, tasks_dir)
    recipe = recipe_yaml(tmp_path, evil)
    include = str(tasks_dir)
    results = {
        "check": outcome(lambda: verbs.check(config)),
        "stitch": outcome(lambda: verbs.stitch(recipe, tmp_path / "out", sync=False)),
        "eval": outcome(
            lambda: verbs.evaluate(str(evil), ["t_shared"], include_path=include, device="cpu")
        ),
        "search": outcome(lambda: verbs.search(config)),
    }
    assert not mark.exists()
    assert not list(tmp_path.rglob("out/*.py"))
    if known:
        assert set(results.values()) == {"ok"}, results
    else:
        assert "gptailor never runs such code" in verbs.check(config)[0]
        assert results.pop("check") == "ok"  # it returns problems instead of raising
        for text in results.values():
            assert "gptailor never runs such code" in text


def test_other_files_are_not_followed(evil: Path, mark: Path, models: dict[str, str]) -> None:
    def load() -> Any:
        return load_model(evil, Checkpoint(evil).tensors, "auto")

    load()
    config = json.loads((evil / "config.json").read_text())
    change(evil / "config.json", attn_implementation="evil/kernel")
    assert "code from the hub, which is never run" in outcome(load)
    (evil / "config.json").write_text(json.dumps(config))
    change(evil / "adapter_config.json", base_model_name_or_path=models["red"], peft_type="LORA")
    assert "holds an adapter" in outcome(load)
    (evil / "adapter_config.json").unlink()
    (evil / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch it-ran'\ntR.")
    load()
    assert not mark.exists()


TOO_LARGE: list[dict[str, Any]] = [
    {"hidden_size": 10**12},
    {"head_dim": 10**11},
    {"vocab_size": 10**13},
    {"intermediate_size": 2**62},
    {"intermediate_size": -1},
    {"num_attention_heads": 0},
    {"hidden_size": "x"},
    {"hidden_act": "evil"},
    {"rope_parameters": 3},
    {"quantization_config": {"quant_method": "evil"}},
    {"dtype": "os.system"},
    {"architectures": 7},
    {"model_type": ["llama"]},
    {"model_type": "t5"},
]


@pytest.mark.parametrize("keys", TOO_LARGE, ids=str)
def test_configs_that_do_not_fit_the_weights(keys: dict[str, Any], evil: Path) -> None:
    change(evil / "config.json", **keys)
    checkpoint = Checkpoint(evil)
    text = outcome(lambda: load_model(evil, checkpoint.tensors, "auto"))
    assert (text == "ok") == ({*keys} <= {"quantization_config", "architectures"}), text
    assert text.isprintable()


BAD_TOKENIZERS: list[tuple[str, str]] = [
    ("tokenizer.json", '{"model": {"vocab": {}}}'),
    ("tokenizer.json", '{"version": "1.0", "model": {"type": "Evil"}}'),
    ("tokenizer.json", "[" * 100_000),
    ("tokenizer.json", "\0"),
    ("tokenizer_config.json", '{"tokenizer_class": 7}'),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
]


@pytest.mark.parametrize(("name", "text"), BAD_TOKENIZERS)
def test_tokenizers(name: str, text: str, evil: Path, mark: Path) -> None:
    (evil / name).write_text(text)
    found = outcome(lambda: load_tokenizer(evil))
    assert found == "ok" or "can't be loaded" in found
    assert found.isprintable()
    assert not mark.exists()


def test_a_generation_config_that_asks_for_too_much(evil: Path, mark: Path) -> None:
    (evil / "generation_config.json").write_text(
        json.dumps({"num_beams": 10**9, "num_return_sequences": 10**9, "custom_generate": "."})
    )
    outcome(lambda: smoke_test(evil))
    assert not mark.exists()


def test_a_template_cannot_leave_its_sandbox(evil: Path, mark: Path) -> None:
    template = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    )
    (evil / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(evil)
    with pytest.raises(Exception, match=r"unsafe|undefined"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert not mark.exists()


def test_a_panic_is_explained(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in the tokenizers library surfaces as a BaseException from Rust."""
    import transformers

    panic = type("PanicException", (BaseException,), {})

    def fail(*_: object, **__: object) -> None:
        raise panic("index out of bounds")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ModelError, match="can't be loaded: index out of bounds"):
        load_tokenizer(evil)
