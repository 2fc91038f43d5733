"""`check` and `search` agree: what a search refuses, `check` refuses with the same sentence.

Each row of BROKEN breaks one thing in a search that works. Add a row for anything else that a
search is found to refuse. Faults that only the weights reveal, such as NaN, are left out because
`check` does not read weights.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from gptailor import verbs
from gptailor.errors import GptailorError, UsageError
from gptailor.evaluation import forward_dtype
from tests.evaluation.own_tasks import (
    ACC,
    CHOICE,
    GENERATE,
    rows,
    words,
    write_group,
    write_task,
)

Break = Callable[[Path, dict[str, Any]], None]
"""Changes the files in a folder, or the configuration."""

BROKEN: dict[str, tuple[Break, str]] = {}
"""Name → the change, and part of the sentence."""


def breaks(sentence: str) -> Callable[[Break], Break]:
    """Adds a row."""

    def add(change: Break) -> Break:
        BROKEN[change.__name__] = (change, sentence)
        return change

    return add


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


# Models


@breaks("The model folder .*/gone does not exist")
def a_model_that_is_not_there(place: Path, config: dict[str, Any]) -> None:
    config["models"]["red"] = str(place / "gone")


@breaks("model.safetensors is truncated")
def truncated_weights(place: Path, config: dict[str, Any]) -> None:
    path = place / "red" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@breaks("a family needs the same depth")
def another_depth(place: Path, config: dict[str, Any]) -> None:
    path = place / "red" / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if ".layers.5." not in name}
    save_file(kept, path)
    edit(place / "red" / "config.json", num_hidden_layers=5)


@breaks("has another vocabulary")
def another_vocabulary(place: Path, config: dict[str, Any]) -> None:
    path = place / "red" / "tokenizer.json"
    path.write_text(path.read_text().replace("w07", "x07"))


@breaks("The base .* has no tokenizer")
def a_base_without_tokenizer(place: Path, config: dict[str, Any]) -> None:
    for path in place.glob("*/tokenizer*"):
        path.unlink()


@breaks("The tokenizer of .* can't be loaded")
def a_tokenizer_that_can_not_be_loaded(place: Path, config: dict[str, Any]) -> None:
    for path in place.glob("*/tokenizer.json"):
        edit(path, decoder={"type": "Nonsense"})


@breaks("transformers can't load .*: ")
def an_architecture_that_transformers_does_not_know(place: Path, config: dict[str, Any]) -> None:
    for path in place.glob("*/config.json"):
        edit(path, model_type="nonsense", architectures=["NonsenseForCausalLM"])


@breaks("config.json needs .* of shape")
def a_config_of_another_size(place: Path, config: dict[str, Any]) -> None:
    for path in place.glob("*/config.json"):
        edit(path, intermediate_size=96)


@breaks("holds an adapter")
def an_adapter_beside_the_model(place: Path, config: dict[str, Any]) -> None:
    (place / "base" / "adapter_config.json").write_text("{}")


@breaks("has neither a BOS nor an EOS token")
def a_tokenizer_without_a_first_token(place: Path, config: dict[str, Any]) -> None:
    for path in place.glob("*/tokenizer_config.json"):
        edit(path, bos_token=None, eos_token=None)


@breaks("does not keep .*experts.* as it is in the file.*which a search can't do yet")
def experts_that_transformers_fuses(place: Path, config: dict[str, Any]) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    small = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = MixtralForCausalLM(small)
    for name in ("base", "red"):
        (place / name / "model.safetensors").unlink()
        model.save_pretrained(place / name)


# The space and the output


@breaks("space.layers")
def more_layers_than_there_are(place: Path, config: dict[str, Any]) -> None:
    config["space"] = {"layers": {"min": 7}}


@breaks("has no statistics of base for regmean")
def a_method_without_its_statistics(place: Path, config: dict[str, Any]) -> None:
    config["space"] = {"merge": {"methods": ["regmean"]}}
    config["calibration"] = str(place / "nothing")


@breaks("already holds a run: continue it with --resume")
def an_output_with_a_run(place: Path, config: dict[str, Any]) -> None:
    (place / "run").mkdir()
    (place / "run" / "archive.db").write_text("a run")


@breaks("can't be made: .*/run is not a folder")
def a_file_where_the_output_belongs(place: Path, config: dict[str, Any]) -> None:
    (place / "run").write_text("precious")


@breaks("can't be made: .*/file is not a folder")
def a_file_above_the_output(place: Path, config: dict[str, Any]) -> None:
    (place / "file").write_text("precious")
    config["output"] = str(place / "file" / "runs" / "mine")


@breaks("The run folder /proc/.* can't be written")
def an_output_that_can_not_be_written(place: Path, config: dict[str, Any]) -> None:
    config["output"] = "/proc/runs/mine"


# Tasks


@breaks("unknown task 't_sharde' in evaluation.tasks: did you mean 't_shared'")
def a_task_that_there_is_not(place: Path, config: dict[str, Any]) -> None:
    config["evaluation"]["tasks"] = ["t_sharde"]


@breaks("unknown metric 'acc_nrom' in the task t_long: did you mean 'acc_norm'")
def a_metric_that_the_task_does_not_have(place: Path, config: dict[str, Any]) -> None:
    config["evaluation"]["tasks"] = [{"task": "t_long", "metric": "acc_nrom"}]


@breaks("is better when it is lower")
def a_metric_that_is_better_when_it_is_lower(place: Path, config: dict[str, Any]) -> None:
    config["evaluation"]["tasks"] = ["t_rolling"]


@breaks("unknown metric 'acc_norm' in the task t_group")
def a_metric_that_the_group_does_not_aggregate(place: Path, config: dict[str, Any]) -> None:
    config["evaluation"]["tasks"] = [{"task": "t_group", "metric": "acc_norm"}]


@breaks("The task mixed has no metric that is a number in all of its tasks")
def a_group_without_a_metric(place: Path, config: dict[str, Any]) -> None:
    write_group(place / "tasks", "mixed", ["t_shared", "t_generate"])
    config["evaluation"]["tasks"] = ["mixed"]


@breaks("The task t_long is named twice")
def groups_that_overlap(place: Path, config: dict[str, Any]) -> None:
    write_group(place / "tasks", "other", ["t_long", "t_differing"], {"metric": "acc"})
    config["evaluation"]["tasks"] = ["t_group", "other"]


@breaks("The text .*/gone.txt can't be read: No such file or directory")
def a_text_that_is_not_there(place: Path, config: dict[str, Any]) -> None:
    text = {"task": "language", "text": "gone.txt", "weight": 0}
    config["evaluation"]["holdout"] = {"tasks": ["t_long", text]}


@breaks("The task t_long is part of the search, so it is no holdout")
def a_holdout_inside_of_a_group_of_the_search(place: Path, config: dict[str, Any]) -> None:
    config["evaluation"] |= {"tasks": ["t_group"], "holdout": {"tasks": ["t_long"]}}


@breaks("The task own can't be loaded: No such file or directory: .*/own.json")
def data_that_are_missing(place: Path, config: dict[str, Any]) -> None:
    write_task(place / "tasks", "own", rows(), **CHOICE)
    (place / "tasks" / "own.json").unlink()
    config["evaluation"]["tasks"] = ["own"]


@breaks("The task own can't be loaded: .*It is not in the cache, and HF_HUB_OFFLINE is set")
def data_that_only_the_hub_has(place: Path, config: dict[str, Any]) -> None:
    data = {"dataset_path": "nobody/nothing", "test_split": "test", "task": "own", **CHOICE}
    (place / "tasks" / "own.yaml").write_text(yaml.safe_dump(data))
    config["evaluation"]["tasks"] = ["own"]


@breaks("apply_chat_template: the tokenizer in .*/base has no chat template")
def a_chat_without_a_template(place: Path, config: dict[str, Any]) -> None:
    config["evaluation"]["apply_chat_template"] = True


@breaks("apply_chat_template: the tokenizer in .*/base has several chat templates")
def several_chat_templates(place: Path, config: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = {"one": "{{ messages }}", "two": "{{ messages }}"}
    tokenizer.save_pretrained(place / "base")
    config["evaluation"]["apply_chat_template"] = True


@breaks("The task t_shared can't make its requests: TemplateError: No chat today")
def a_template_that_refuses(place: Path, config: dict[str, Any]) -> None:
    template = "{{ raise_exception('No chat today') }}"
    (place / "base" / "chat_template.jinja").write_text(template)
    config["evaluation"]["apply_chat_template"] = True


@breaks("The task own can't be scored: document 39: the answer .* has 65 tokens")
def an_answer_that_is_too_long(place: Path, config: dict[str, Any]) -> None:
    write_task(place / "tasks", "own", rows(40, options=["w01", words(65)]), **CHOICE)
    config["evaluation"]["tasks"] = ["own"]


@breaks("The task own can't be scored: document 39: the answer ' ' has no token")
def an_answer_without_a_token(place: Path, config: dict[str, Any]) -> None:
    write_task(place / "tasks", "own", rows(40, options=["w01", ""]), **CHOICE)
    config["evaluation"]["tasks"] = ["own"]


@breaks("The task own can't be scored: document 0.*: 64 new tokens are requested")
def a_prompt_that_leaves_no_room(place: Path, config: dict[str, Any]) -> None:
    settings = {"until": ["w06"], "max_gen_toks": 64}
    write_task(place / "tasks", "own", rows(), **{**GENERATE, "generation_kwargs": settings})
    config["evaluation"]["tasks"] = ["own"]


@breaks("The task own can't be scored: document 3: the prompt '' has no token")
def a_prompt_without_a_token(place: Path, config: dict[str, Any]) -> None:
    write_task(place / "tasks", "own", rows(q=""), **GENERATE)
    config["evaluation"] |= {"holdout": {"tasks": ["own"]}}


@breaks("The task own can't make its requests: KeyError: 'w02'")
def code_that_fails_on_a_document(place: Path, config: dict[str, Any]) -> None:
    code = "def text(doc):\n    return {'w00': 'w01', 'w01': 'w02'}[doc['q'][:3]]\n"
    write_task(place / "tasks", "own", rows(3), code, **{**CHOICE, "doc_to_text": "!text"})
    config["evaluation"]["tasks"] = ["own"]


@breaks("The task own can't judge an answer: No module named 'nosuchmodule'")
def code_that_can_not_judge(place: Path, config: dict[str, Any]) -> None:
    code = "def judge(doc, results):\n    import nosuchmodule\n"
    write_task(place / "tasks", "own", rows(), code, **CHOICE, process_results="!judge")
    config["evaluation"]["tasks"] = ["own"]


@breaks("unknown metric 'promised' in the task own")
def a_metric_that_is_promised_only(place: Path, config: dict[str, Any]) -> None:
    code = "def judge(doc, results):\n    return {'acc': 1.0}\n"
    promised = {**CHOICE, "metric_list": [ACC, {**ACC, "metric": "promised"}]}
    write_task(place / "tasks", "own", rows(), code, **promised, process_results="!judge")
    config["evaluation"]["tasks"] = [{"task": "own", "metric": "promised"}]


@pytest.fixture
def place(models: dict[str, str], tasks_dir: Path, tmp_path: Path) -> Path:
    """A folder with models and tasks that may be broken."""
    for name in ("base", "red"):
        shutil.copytree(models[name], tmp_path / name)
    shutil.copytree(tasks_dir, tmp_path / "tasks")
    return tmp_path


def good(place: Path) -> dict[str, Any]:
    return {
        "models": {name: str(place / name) for name in ("base", "red")},
        "base": "base",
        "evaluation": {
            "tasks": ["t_shared"], "include_path": str(place / "tasks"), "device": "cpu"
        },
        "search": {"evaluations": 4, "population": 4, "arms": ["dense"]},
        "output": str(place / "run"),
    }  # fmt: skip


def write(place: Path, config: dict[str, Any]) -> Path:
    path = place / "search.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def state(place: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}


LONG = "a_task_that_there_is_not"
"""This row reads the names of all tasks of lm-eval, to find a similar one."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name == LONG else ()) for name in BROKEN],
)
def test_check_refuses_what_a_search_refuses(name: str, place: Path) -> None:
    change, sentence = BROKEN[name]
    config = good(place)
    change(place, config)
    path = write(place, config)
    before = state(place)
    with pytest.raises(GptailorError, match=sentence) as caught:
        verbs.search(path)
    assert verbs.check(path) == [str(caught.value)]
    assert state(place) == before


def test_check_finds_nothing_where_a_search_runs(place: Path) -> None:
    path = write(place, good(place))
    before = state(place)
    assert verbs.check(path) == []
    assert verbs.check(path, fast=True) == []
    assert state(place) == before
    verbs.search(path)
    [problem] = verbs.check(path)
    assert "already holds a run: continue it with --resume" in problem
    assert verbs.check(path, resume=True) == []
    config = good(place)
    config["search"]["evaluations"] = 5
    assert verbs.check(write(place, config), resume=True) == []
    config["search"]["seed"] = 3
    path = write(place, config)
    with pytest.raises(UsageError, match=r"configuration: search\.seed was 0, but is 3") as caught:
        verbs.search(path, resume=True)
    assert verbs.check(path, resume=True) == [str(caught.value)]


def test_a_gpu_that_is_missing_here_is_not_a_problem(place: Path) -> None:
    config = good(place)
    config["evaluation"]["device"] = "cuda:77"
    path, said = write(place, config), list[str]()
    assert verbs.check(path, note=said.append) == []
    with pytest.raises(UsageError, match="can't be used") as caught:
        verbs.search(path)
    assert f"Not on this machine: {caught.value}" in said


def test_check_reports_all_problems_at_once(place: Path) -> None:
    config = good(place)
    truncated_weights(place, config)
    a_file_where_the_output_belongs(place, config)
    (place / "base" / "tokenizer.json").unlink()
    found = verbs.check(write(place, config))
    for part, problem in zip(("not a folder", "has no tokenizer", "truncated"), found, strict=True):
        assert part in problem


@pytest.mark.parametrize(
    ("flags", "dtype", "words"),
    [
        ("avx2", "bfloat16", "no instructions for bfloat16, so they take several times as long"),
        ("avx2", "float16", "slow at float16, as every CPU is, so they take several times as long"),
        ("avx2 avx512_bf16", "float16", "several times as long as in float32"),
        ("avx2 avx512_bf16", "bfloat16", ""),
        ("avx2", "auto", ""),
        ("avx2", "float32", ""),
    ],
)
def test_a_type_that_is_slow_here_is_noted(
    flags: str, dtype: str, words: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not a problem, because the search runs."""
    monkeypatch.setattr(forward_dtype, "cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    config = good(place)
    config["evaluation"] |= {"dtype": dtype, "device": "cpu"}
    said: list[str] = []
    assert verbs.check(write(place, config), fast=True, note=said.append) == []
    assert [words in text for text in said] == ([True] if words else [])


def test_fast_skips_the_tasks_data(place: Path) -> None:
    config = good(place)
    data_that_are_missing(place, config)
    path = write(place, config)
    assert verbs.check(path, fast=True) == []


def test_a_long_answer_is_found_among_many_documents(place: Path) -> None:
    documents = [*rows(1, options=["w01", words(65)]), *rows(2500)]
    write_task(place / "tasks", "own", documents, **CHOICE)
    config = good(place)
    config["evaluation"]["tasks"] = ["own"]
    [problem] = verbs.check(write(place, config))
    assert "document 0: the answer" in problem


def test_the_other_verbs_give_the_same_error(place: Path) -> None:
    config = good(place)
    an_answer_that_is_too_long(place, config)
    path = write(place, config)
    [problem] = verbs.check(path)
    for verb in (lambda: verbs.plan(path), lambda: verbs.prefetch(path)):
        with pytest.raises(UsageError, match=re.escape(problem)):
            verb()
    with pytest.raises(UsageError, match=re.escape(problem)):
        verbs.evaluate(place / "red", ["own"], include_path=str(place / "tasks"), device="cpu")
