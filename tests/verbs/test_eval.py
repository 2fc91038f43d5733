"""`gptailor eval` gives the same scores as `lm_eval --model hf` and a search with equal options."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptailor import cli, verbs
from gptailor.errors import ModelError, TaskError, UsageError
from gptailor.run.archive import Archive
from tests.evaluation.own_tasks import CHOICE, rows, write_task
from tests.evaluation.test_equals_lm_eval import lm_eval_results

TEMPLATE = (
    "{% for m in messages %}{{ 'w80 ' if m['role'] == 'user' else 'w81 ' if m['role'] == "
    "'assistant' else 'w82 ' }}{{ m['content'] }}{{ ' w83 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w81 ' }}{% endif %}"
)
NAMES = ("t_lambada", "t_group", "t_generate", "t_differing", "t_rolling")


@pytest.fixture(scope="module")
def chat_model(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose chat template marks the speaker."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(models["red"], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--limit", "4"], {"limit": 4}),
        (
            ["--limit", "0.3", "--num-fewshot", "2", "--system-instruction", "w70 w71"],
            {"limit": 0.3, "num_fewshot": 2, "system_instruction": "w70 w71"},
        ),
        (
            ["--apply-chat-template", "--num-fewshot", "2", "--system-instruction", "w70 w71"],
            {"apply_chat_template": True, "num_fewshot": 2, "system_instruction": "w70 w71"},
        ),
        (
            ["--apply-chat-template", "--no-fewshot-as-multiturn", "--num-fewshot", "1"],
            {"apply_chat_template": True, "fewshot_as_multiturn": False, "num_fewshot": 1},
        ),
    ],
)
def test_options_mean_what_they_mean_to_lm_eval(
    chat_model: str,
    tasks_dir: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    options: dict[str, Any],
) -> None:
    if "limit" not in options:
        words, options = [*words, "--limit", "3"], {**options, "limit": 3}
    names = NAMES if options["limit"] == 4 else NAMES[:3]
    out = printed(
        capsys, "eval", chat_model, "--tasks", ", ".join(names), "--include-path", tasks_dir,
        "--dtype", "float32", "--device", "cpu", "--json", *words,
    )  # fmt: skip
    found = {(score["task"], score["metric"]): score for score in json.loads(out)}
    theirs = lm_eval_results(Path(chat_model), tasks_dir, names, "float32", 8, **options)
    for task, metrics in theirs["results"].items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or isinstance(value, str):
                continue
            score = found.pop((task, key))
            assert score["value"] == pytest.approx(value, rel=1e-4), (task, key)
            assert score["num_documents"] == metrics["sample_len"]
            stderr = metrics[f"{metric}_stderr,{filter_name}"]
            if score["stderr"] is not None:
                assert score["stderr"] == pytest.approx(stderr, rel=1e-4)
            else:
                assert metric.endswith("perplexity")  # lm-eval draws samples for it
    assert not found


def test_the_table_has_every_metric(
    models: dict[str, str], tasks_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", models["red"], "--include-path", tasks_dir, "--device", "cpu"]
    lines = printed(capsys, *words, "--tasks", "t_group, t_rolling,").splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["t_group", "acc,none"],
        ["t_shared", "acc,none"],
        ["t_long", "acc,none"],
        ["t_long", "acc_norm,none"],
        ["t_rolling", "word_perplexity,none"],
    ]
    assert all("±" in line for line in lines[:4])
    [line] = printed(capsys, *words, "--tasks", "t_long", "--metric", "acc_norm").splitlines()
    assert line.startswith("t_long  acc_norm,none  0.")


def test_eval_repeats_the_scores_of_a_search(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    """A stitched folder is scored on the documents that the search chose, with its options."""
    config = {
        "models": models,
        "base": "base",
        "evaluation": {
            "tasks": ["t_group", {"task": "t_lambada", "metric": "acc", "limit": 9, "weight": 2}],
            "include_path": str(tasks_dir),
            "holdout": {"tasks": [{"task": "t_differing", "limit": 0.5}]},
            "rungs": [20],
            "dtype": "float32",
            "device": "cpu",
        },
        "space": {"dtype": "float32"},
        "search": {"evaluations": 6, "population": 4, "arms": ["dense"], "seed": 5},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(config))
    run = verbs.search(path)
    with Archive(run, readonly=True) as archive:
        rows_ = archive.evaluations()
    last = [row for row in rows_ if row.documents == "holdout"][-1].recipe
    of_last = {row.documents: row.outcome for row in rows_ if row.recipe.hash == last.hash}
    folder = verbs.stitch(run, tmp_path / "model", point=last.point, verify=False)
    scores = verbs.evaluate(folder, like=run / "config.yaml")
    expected = [*of_last["search"].scores, *of_last["holdout"].scores]
    assert [score.num_documents for score in expected] == [14, 6, 12, 32]  # the last is a text
    for score, kept in zip(scores, expected, strict=True):
        assert (score.task, score.metric, score.num_documents) == (
            kept.task, kept.metric, kept.num_documents
        )  # fmt: skip
        assert score.value == pytest.approx(kept.value)
    with pytest.raises(UsageError, match="leave metric out"):
        verbs.evaluate(folder, like=path, metric="acc")


# Errors inside an evaluation are the same in eval and in a search


def search_yaml(place: Path, models: dict[str, str], tasks: Path, schedule: str) -> Path:
    config = {
        "models": {name: models[name] for name in ("base", "red")},
        "base": "base",
        "evaluation": {"tasks": ["own"], "include_path": str(tasks), "device": "cpu"},
        "search": {"evaluations": 40, "population": 4, "arms": ["dense"], "schedule": schedule},
        "output": str(place / "run"),
    }
    (place / "search.yaml").write_text(yaml.safe_dump(config))
    return place / "search.yaml"


def ends_with(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main([str(word) for word in words])
    lines = capsys.readouterr().err.splitlines()
    return code, next(line for line in lines if line.startswith("gptailor: "))


@pytest.mark.parametrize("schedule", ["generational", "asynchronous"])
def test_code_of_a_task_that_fails_on_real_answers(
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    schedule: str,
) -> None:
    code = (
        "def judge(doc, results):\n"
        "    return {'acc': {-1.2345678: 1.0}[results[0][0]]}  # what a dry run answers, only\n"
    )
    write_task(tmp_path / "tasks", "own", rows(), code, **CHOICE, process_results="!judge")
    path = search_yaml(tmp_path, models, tmp_path / "tasks", schedule)
    assert verbs.check(path) == []
    eval_words = ("eval", models["red"], "--tasks", "own", "--include-path", tmp_path / "tasks")
    code_of_eval, said = ends_with(capsys, *eval_words)
    assert code_of_eval == 2
    assert said.startswith("gptailor: The task own can't judge an answer: KeyError: -")
    assert f"({tmp_path}/tasks/own_code.py, line 8)" in said
    code_of_search, said_by_search = ends_with(capsys, "search", path)
    assert code_of_search == 2
    assert said_by_search.startswith("gptailor: The task own can't judge an answer: KeyError: -")
    with Archive(tmp_path / "run", readonly=True) as archive:
        ended = archive.evaluations()
    assert 2 <= len(ended) <= 3  # the arms, and no generation after them
    assert {e.outcome.status for e in ended} == {"failed"}
    assert ends_with(capsys, "search", path, "--resume") == (2, said_by_search)


def test_a_model_without_numbers(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(models["red"], tmp_path / "nan")
    path = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][:] = math.nan
    save_file(tensors, path, {"format": "pt"})
    write_task(tmp_path / "tasks", "own", rows(), **CHOICE)
    words = ("eval", tmp_path / "nan", "--tasks", "own", "--include-path", tmp_path / "tasks")
    code, said = ends_with(capsys, *words)
    assert code == 3
    assert "The model's log-likelihoods are not numbers: its weights hold NaN" in said
    nan = {"base": str(tmp_path / "nan"), "red": str(tmp_path / "nan")}
    path = search_yaml(tmp_path, nan, tmp_path / "tasks", "generational")
    assert ends_with(capsys, "search", path) == (3, said)


def test_a_bug_of_ours_is_not_blamed_on_the_model_or_the_task(
    models: dict[str, str], tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptailor.evaluation.lm import ResidentLM

    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(ResidentLM, "_answers", broken)
    with pytest.raises(RuntimeError, match="ZeroDivisionError: no luck"):
        verbs.evaluate(models["red"], ["t_shared"], include_path=str(tasks_dir), device="cpu")
    assert not issubclass(RuntimeError, (ModelError, TaskError))
