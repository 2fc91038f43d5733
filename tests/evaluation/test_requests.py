"""Requests that a model can't answer are refused when they are built, with task and document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gptailor.config import EvaluationConfig
from gptailor.errors import ModelError, UsageError
from gptailor.evaluation.lm import ResidentLM
from gptailor.evaluation.loading import load_shell
from gptailor.evaluation.requests import Asked, check_requests
from gptailor.evaluation.workload import open_workloads
from gptailor.models.checkpoint import Checkpoint
from tests.evaluation.own_tasks import ACC, CHOICE, GENERATE, rows, words, write_task
from tests.models.real import save_real

MAX_LENGTH = 64
SETTINGS = {"until": ["w06"], "max_gen_toks": 4, "do_sample": False}


@pytest.fixture(scope="module")
def lm(models: dict[str, str]) -> ResidentLM:
    """What `check` uses: the tokenizer, and a model without weights."""
    folder = Path(models["red"])
    shell = load_shell(folder, Checkpoint(folder).tensors).eval()
    return ResidentLM(shell, AutoTokenizer.from_pretrained(folder), 4)


@pytest.fixture(scope="module")
def both(models: dict[str, str]) -> tuple[ResidentLM, HFLM]:
    """The same model behind our interface and behind lm-eval's."""
    tokenizer = AutoTokenizer.from_pretrained(models["red"])
    model = AutoModelForCausalLM.from_pretrained(models["red"], dtype=torch.float32).eval()
    return ResidentLM(model, tokenizer, 4), HFLM(pretrained=model, tokenizer=tokenizer)


def refused(lm: ResidentLM, tasks: Path, name: str, **config: Any) -> str:
    data = {"tasks": [name], "include_path": str(tasks), **config}
    with pytest.raises(UsageError) as caught:
        open_workloads(EvaluationConfig.model_validate(data), lm, seed=0)
    assert caught.value.exit_code == 2
    return str(caught.value)


def instance(kind: Any, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, ("own", 0, 1))


ANSWERS: list[tuple[str, str, str]] = [
    ("w01", f" {words(65)}", r"the answer .* has 65 tokens, but the model reads 64 at most"),
    ("w01", f" {words(66)}", r"the answer .* has 66 tokens, but the model reads 64 at most"),
    ("w01", "", r"the answer '' has no token"),
    ("w01", "  ", r"the answer '  ' has no token"),
    ("", " ", r"the answer ' ' has no token"),
    ("", "<s>", r"the answer '<s>' has no token"),
    ("   ", " w01", r"the context '   ' of the answer ' w01' has no token"),
]
PROMPTS: list[tuple[str, dict[str, Any], str]] = [
    ("", {}, r"the prompt '' has no token"),
    ("w01", {"max_gen_toks": 64}, r"64 new tokens are requested, but the model reads 64 in all"),
    ("w01", {"max_gen_toks": None}, r"256 new tokens are requested"),
    ("w01", {"max_gen_toks": None, "max_new_tokens": 65}, r"65 new tokens are requested"),
    ("w01", {"max_gen_toks": 0}, r"0 new tokens are requested"),
    ("w01", {"max_gen_toks": "six"}, r"generation_kwargs .* are wrong: invalid literal"),
    (words(5), {"max_length": 5}, r"the prompt has 5 tokens, but max_length .* is 5"),
    ("w01", {"top_kk": 5}, r"unknown option 'top_kk' in its generation_kwargs: did you mean"),
    ("w01", {"do_sample": True}, r"needs a temperature above 0"),
]


@pytest.mark.parametrize(("context", "answer", "sentence"), ANSWERS)
def test_answers_that_lm_eval_can_not_score_are_refused(
    both: tuple[ResidentLM, HFLM], context: str, answer: str, sentence: str
) -> None:
    asked = instance("loglikelihood", context, answer)
    with pytest.raises((AssertionError, IndexError)):
        both[1].loglikelihood([asked], disable_tqdm=True)
    with pytest.raises(UsageError, match=sentence) as caught:
        check_requests([Asked("own", 6, asked)], both[0])
    assert str(caught.value).startswith("The task own can't be scored: document 6: ")


@pytest.mark.parametrize(("prompt", "settings", "sentence"), PROMPTS)
def test_texts_that_transformers_can_not_generate_are_refused(
    both: tuple[ResidentLM, HFLM], prompt: str, settings: dict[str, Any], sentence: str
) -> None:
    asked = instance("generate_until", prompt, {**SETTINGS, **settings})
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        both[1].generate_until([asked], disable_tqdm=True)
    with pytest.raises(UsageError, match=sentence):
        check_requests([Asked("own", 0, asked)], both[0])


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("w01 w02", f" {words(62)}"),  # all that the model reads, and the token that follows
        ("w01 w02", f" {words(63)}"),  # the first token of the context is cut off
        ("w01 w02", f" {words(64)}"),  # one token of the context is left
        (words(200), f" {words(7)}"),
        ("", f"{words(64)}"),  # the context is the prefix token
        ("", "<s> w01"),  # the answer itself begins with it
        ("w01 ", "w02"),
    ],
)
def test_requests_that_fit_are_scored_as_by_lm_eval(
    both: tuple[ResidentLM, HFLM], context: str, answer: str
) -> None:
    asked = instance("loglikelihood", context, answer)
    check_requests([Asked("own", 0, asked)], both[0])
    [(mine, mine_greedy)] = both[0].loglikelihood([asked])
    [(theirs, greedy)] = both[1].loglikelihood([asked], disable_tqdm=True)
    assert mine == pytest.approx(theirs, abs=1e-3)
    assert mine_greedy == greedy


@pytest.mark.parametrize("page", ["", "   ", "w01", words(64), words(65), words(200)])
def test_pages_of_every_length_are_scored_as_by_lm_eval(
    both: tuple[ResidentLM, HFLM], page: str
) -> None:
    asked = instance("loglikelihood_rolling", page)
    check_requests([Asked("own", 0, asked)], both[0])
    mine, theirs = (lm.loglikelihood_rolling([asked], disable_tqdm=True) for lm in both)
    assert mine == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [("w01", {}), (words(200), {}), (words(200), {"max_gen_toks": 63}), ("w01", {"max_length": 9})],
)
def test_prompts_that_are_cut_at_the_left_are_answered_as_by_lm_eval(
    both: tuple[ResidentLM, HFLM], prompt: str, settings: dict[str, Any]
) -> None:
    asked = instance("generate_until", prompt, {**SETTINGS, **settings})
    check_requests([Asked("own", 0, asked)], both[0])
    mine, theirs = (lm.generate_until([asked], disable_tqdm=True) for lm in both)
    assert mine == theirs


def test_all_kinds_of_tasks_name_the_document(lm: ResidentLM, tmp_path: Path) -> None:
    long = rows(7, options=["w01", words(65)], q=words(3))
    write_task(tmp_path, "choice", long, **CHOICE)
    write_task(
        tmp_path,
        "scored",
        long,
        output_type="loglikelihood",
        doc_to_text="{{q}}",
        doc_to_target=" {{options[1]}}",
        metric_list=[ACC],
    )
    write_task(tmp_path, "generated", rows(7, q=""), **GENERATE)
    for name in ("choice", "scored", "generated"):
        text = refused(lm, tmp_path, name)
        assert text.startswith(f"The task {name} can't be scored: document 6: ")


def test_few_shot_examples_do_not_make_an_answer_longer(lm: ResidentLM, tmp_path: Path) -> None:
    write_task(tmp_path, "own", rows(7), **CHOICE, fewshot_config={"sampler": "first_n"})
    tasks = [{"task": "own", "num_fewshot": 5}]
    config = EvaluationConfig.model_validate({"tasks": tasks, "include_path": str(tmp_path)})
    workload = open_workloads(config, lm, seed=0)["search"]
    [first, *_] = workload.requests()["loglikelihood"]
    assert len(lm.encoded([first])[0][1]) > MAX_LENGTH // 2


def test_documents_that_are_not_chosen_do_not_matter(lm: ResidentLM, tmp_path: Path) -> None:
    write_task(tmp_path, "own", rows(12, options=["w01", ""]), **CHOICE)
    seen = set()
    for seed in range(6):
        config = {"tasks": ["own"], "include_path": str(tmp_path), "rungs": [6]}
        try:
            open_workloads(EvaluationConfig.model_validate(config), lm, seed=seed)
            seen.add("fits")
        except UsageError as error:
            assert "document 11: the answer ' ' has no token" in str(error)
            seen.add("refused")
    assert seen == {"fits", "refused"}


def test_further_documents_of_the_same_task_are_counted(lm: ResidentLM, tmp_path: Path) -> None:
    documents = [*rows(3, options=["", ""]), *rows(2, options=["", "w01"])]
    write_task(tmp_path, "own", documents, **CHOICE)
    assert "document 2 (and 1 more): the answer" in refused(lm, tmp_path, "own")


def test_text_without_an_end(models: dict[str, str], tmp_path: Path, lm: ResidentLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["red"])
    tokenizer.eos_token = None
    other = ResidentLM(lm.model, tokenizer, 4)
    write_task(tmp_path, "generated", rows(), **GENERATE)
    write_task(tmp_path, "choice", rows(), **CHOICE)
    assert "the tokenizer has no EOS token to end it" in refused(other, tmp_path, "generated")
    config = EvaluationConfig.model_validate({"tasks": ["choice"], "include_path": str(tmp_path)})
    open_workloads(config, other, seed=0)


def test_tokens_that_the_model_has_no_embedding_for(
    models: dict[str, str], tmp_path: Path, lm: ResidentLM
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["red"])
    tokenizer.add_tokens([f"new{i}" for i in range(9)])
    other = ResidentLM(lm.model, tokenizer, 4)
    write_task(tmp_path, "own", rows(4, q="w01 new8"), **CHOICE)
    text = refused(other, tmp_path, "own")
    assert "document 3: it has the token 'new8' with the id 102, but the model has 96" in text


def test_a_model_that_names_no_context(models: dict[str, str]) -> None:
    """XLNet's config says -1, which makes lm-eval fail with an assertion."""
    config = AutoConfig.for_model("xlnet", d_model=32, n_layer=2, n_head=4, d_inner=48)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match=r"\(xlnet\) does not say how many tokens it reads"):
        ResidentLM(model, AutoTokenizer.from_pretrained(models["red"]), 4)


def test_a_model_whose_positions_begin_after_the_padding(
    models: dict[str, str], tmp_path: Path
) -> None:
    """RoBERTa has 62 of its 64 positions for tokens; lm-eval assumes 64."""
    folder = save_real(
        tmp_path / "m", "roberta", is_decoder=True, pad_token_id=1, max_position_embeddings=64
    )
    tokenizer = AutoTokenizer.from_pretrained(models["red"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lm = ResidentLM(model, tokenizer, 4)
    assert lm.max_length == 62
    long = [instance("loglikelihood", words(n), f" {words(3)}") for n in (30, 60, 80)]
    found = lm.loglikelihood(long)
    told = HFLM(pretrained=model, tokenizer=tokenizer, max_length=62)
    wanted = told.loglikelihood(long, disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in wanted], abs=1e-4)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood(long, disable_tqdm=True)
