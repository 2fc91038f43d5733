"""What is read for a repair: sequences, what counts of them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.config import EvaluationConfig
from gptailor.errors import UsageError
from gptailor.evaluation.documents import choose_after, choose_documents
from gptailor.evaluation.lm import ResidentLM
from gptailor.evaluation.repair.reading import (
    BATCH_TOKENS,
    TEXT_LENGTH,
    Reading,
    open_calibration_tasks,
    read_calibration,
)
from gptailor.evaluation.workload import Workload
from gptailor.recipe.repair import CalibrationDocuments, CalibrationTask
from tests.evaluation.own_tasks import CHOICE, GENERATE, rows, tasks_of, words, write_task
from tests.evaluation.repair.tiny import lm_of, tiny

CPU = torch.device("cpu")
LONGEST = 128


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> ResidentLM:
    return lm_of(tiny("llama"), tmp_path_factory.mktemp("model"))


def documents(folder: Path | None, *tasks: str, **changes: Any) -> CalibrationDocuments:
    named = tuple(CalibrationTask(task) for task in tasks)
    path = None if folder is None else str(folder)
    return CalibrationDocuments(named, **{"include_path": path, "documents": 10**6, **changes})


def scored(lm: ResidentLM, folder: Path, *tasks: str, **options: Any) -> Workload:
    config = EvaluationConfig(tasks=tasks_of(*tasks), include_path=str(folder), device="cpu")
    return Workload(config.tasks, config, lm, **{"comparable": False, **options})


def rows_of(reading: Reading, group: str) -> list[tuple[tuple[int, ...], list[bool]]]:
    """The sequences without padding, and which of their tokens count."""
    found = []
    for batch in reading.batches:
        if batch.group == group:
            for tokens, counts in zip(batch.input_BT, batch.counts_BT, strict=True):
                length = int(counts.nonzero()[-1]) + 1
                assert tokens[length:].eq(0).all()
                found.append((tuple(tokens[:length].tolist()), counts[:length].tolist()))
    return found


def prefixes(sequences: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    return {tokens[:end] for tokens in sequences for end in range(1, len(tokens) + 1)}


def asked(workload: Workload, task: str) -> Iterator[tuple[str, ...]]:
    for instance in workload.instances(task):
        yield tuple(text for text in instance.args if isinstance(text, str))


# Sequences


@pytest.mark.parametrize("task", ["t_lambada", "t_shared", "t_long", "t_differing"])
def test_all_continuations_of_all_contexts_are_read(
    lm: ResidentLM, tasks_dir: Path, task: str
) -> None:
    reading = read_calibration(documents(tasks_dir, task), lm, CPU, [])
    expected = {
        tuple(lm.tok_encode(context + continuation)[:-1])
        for context, continuation in asked(scored(lm, tasks_dir, task), task)
    }
    found = rows_of(reading, task)
    assert len(found) == len(expected)
    assert {tokens for tokens, _ in found} == expected
    assert reading.groups == (task,)


def test_pages_and_generated_answers_are_read(lm: ResidentLM, tasks_dir: Path) -> None:
    """A reference answer follows its context as in a few-shot example."""
    reading = read_calibration(documents(tasks_dir, "t_rolling", "t_generate"), lm, CPU, [])
    data = json.loads((tasks_dir / "data.json").read_text())
    pages = {tuple(lm.tok_encode(row["page"])[:LONGEST]) for row in data}
    assert any(len(page) == LONGEST for page in pages)
    assert {tokens for tokens, _ in rows_of(reading, "t_rolling")} == pages
    answers = {tuple(lm.tok_encode(f"{row['ctx']} {row['last']}")) for row in data}
    assert {tokens for tokens, _ in rows_of(reading, "t_generate")} == answers
    assert lm.tokenizer.unk_token_id not in {t for tokens in answers for t in tokens}


@pytest.mark.parametrize(
    ("target", "question", "expected"),
    [("w05", "w01 w02", "w01 w02 w05"), ("w05", "w01 w02 ", "w01 w02 w05"),
     (" w05", "w01 w02", "w01 w02 w05"), ("", "w01 w02", "w01 w02"),
     ("!several", "w01 w02", "w01 w02"), ("{{n}}", "w01 w02", "w01 w02 <unk>")],
)  # fmt: skip
def test_references_that_are_no_text_are_left_out(
    lm: ResidentLM, tmp_path: Path, target: str, question: str, expected: str
) -> None:
    code = "\ndef several(doc):\n    return ['w05', 'w06']\n"
    given = [{"q": question, "n": 1}]
    write_task(tmp_path, "t_own", given, code, **GENERATE | {"doc_to_target": target})
    workload = open_calibration_tasks(documents(tmp_path, "t_own"), lm)
    (instance,) = workload.instances("t_own")
    read = lm.tok_encode(instance.args[0] + workload.reference("t_own", instance))
    assert read == lm.tok_encode(expected)


def test_contexts_that_are_too_long_lose_their_beginning(lm: ResidentLM, tmp_path: Path) -> None:
    long = rows(2, q=words(200))
    write_task(tmp_path, "t_choice", long, **CHOICE)
    write_task(tmp_path, "t_answer", long, **GENERATE)
    reading = read_calibration(documents(tmp_path, "t_choice", "t_answer"), lm, CPU, [])
    for option in long[1]["options"]:
        tokens = lm.tok_encode(f"{words(200)} {option}")
        assert tuple(tokens[-LONGEST - 1 : -1]) in dict(rows_of(reading, "t_choice"))
    tokens = lm.tok_encode(f"{words(200)} w05")
    assert tuple(tokens[-LONGEST:]) in dict(rows_of(reading, "t_answer"))


def test_a_group_is_read_as_one(lm: ResidentLM, tasks_dir: Path) -> None:
    """Its tasks have the same teacher, so what they share is one sequence."""
    whole = read_calibration(documents(tasks_dir, "t_group"), lm, CPU, [])
    parts = read_calibration(documents(tasks_dir, "t_shared", "t_long"), lm, CPU, [])
    assert whole.groups == ("t_group",)
    assert parts.groups == ("t_shared", "t_long")
    both = dict(rows_of(parts, "t_shared")) | dict(rows_of(parts, "t_long"))
    assert dict(rows_of(whole, "t_group")).keys() == both.keys()
    assert whole.num_tokens < parts.num_tokens


def test_few_shot_examples_are_read(lm: ResidentLM, tasks_dir: Path) -> None:
    none = documents(tasks_dir, "t_lambada")
    two = replace(none, tasks=(CalibrationTask("t_lambada", 2),))
    first, second = (read_calibration(one, lm, CPU, []) for one in (none, two))
    assert second.num_tokens > first.num_tokens
    assert second.digest != first.digest
    longest = max(len(tokens) for tokens, _ in rows_of(first, "t_lambada"))
    assert max(len(tokens) for tokens, _ in rows_of(second, "t_lambada")) > longest


# What counts


@pytest.mark.parametrize("task", ["t_shared", "t_long", "t_group", "t_rolling"])
def test_a_common_beginning_counts_once(lm: ResidentLM, tasks_dir: Path, task: str) -> None:
    """Every different beginning is one state of the model."""
    reading = read_calibration(documents(tasks_dir, task), lm, CPU, [])
    found = rows_of(reading, task)
    every = prefixes({tokens for tokens, _ in found})
    counted = [
        tokens[: place + 1]
        for tokens, counts in found
        for place, does_count in enumerate(counts)
        if does_count
    ]
    assert len(counted) == len(set(counted)) == reading.num_tokens
    assert set(counted) == every


def test_a_sequence_may_begin_like_any_other(lm: ResidentLM, tmp_path: Path) -> None:
    """One of them is the whole beginning of another, two share a part of it."""
    lines = ["w01 w02", "w01 w02 w03 w04", "w01 w02 w05", "w01 w06", "w07", "w01 w02 w03"]
    (tmp_path / "text").write_text("\n".join([*lines, lines[1]]))
    given = CalibrationDocuments(text=str(tmp_path / "text"))
    reading = read_calibration(given, lm, CPU, [])
    assert {tokens for tokens, _ in rows_of(reading, "text")} == {
        tuple(lm.tok_encode(line)) for line in lines
    }
    assert reading.num_tokens == 7


def test_batches_hold_one_group_and_are_filled(lm: ResidentLM, tasks_dir: Path) -> None:
    given = documents(tasks_dir, "t_rolling", "t_long", text=str(tasks_dir / "data.json"))
    reading = read_calibration(replace(given, tokens=20_000), lm, CPU, [])
    assert reading.groups == ("t_rolling", "t_long", "text")
    groups = [batch.group for batch in reading.batches]
    assert groups == sorted(groups, key=reading.groups.index)
    for batch in reading.batches:
        assert batch.input_BT.shape == batch.counts_BT.shape
        assert batch.input_BT.numel() <= BATCH_TOKENS
        lengths = [int(counts.nonzero()[-1]) + 1 for counts in batch.counts_BT]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] == batch.input_BT.shape[1]
    assert reading.num_run == sum(batch.input_BT.numel() for batch in reading.batches)
    assert reading.num_tokens < reading.num_run


# Texts


def test_a_text_is_read_in_pieces(lm: ResidentLM, tmp_path: Path) -> None:
    tokens = lm.tok_encode(words(300))
    (tmp_path / "lines.txt").write_text(f"{words(300)}\n\n  \n{words(5, 9)}\n")
    (tmp_path / "lines.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in (words(300), words(5, 9)))
    )
    pieces = {tuple(tokens[i : i + TEXT_LENGTH]) for i in range(0, 300, TEXT_LENGTH)}
    last = tuple(lm.tok_encode(words(5, 9)))
    digests = set()
    for name in ("lines.txt", "lines.jsonl"):
        given = CalibrationDocuments(text=str(tmp_path / name))
        reading = read_calibration(given, lm, CPU, [])
        assert {tokens for tokens, _ in rows_of(reading, "text")} == {*pieces, last}
        digests.add(reading.digest)
        few = read_calibration(replace(given, tokens=200), lm, CPU, [])
        found = {len(tokens) for tokens, _ in rows_of(few, "text")}
        assert found == {TEXT_LENGTH, 200 - TEXT_LENGTH}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), (" \n\n", "is empty"), (None, "can't be read"), (b"\xff\xfe", "UTF-8")],
)
def test_texts_that_cannot_be_read(
    lm: ResidentLM, tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError, match=message):
        read_calibration(CalibrationDocuments(text=str(path)), lm, CPU, [])


# Digest


def test_the_digest_stands_for_the_tokens(lm: ResidentLM, tasks_dir: Path, tmp_path: Path) -> None:
    given = documents(tasks_dir, "t_shared", documents=12)
    digest = read_calibration(given, lm, CPU, []).digest
    assert len(digest) == 16
    assert int(digest, 16) >= 0
    again = read_calibration(replace(given, digest=digest), lm, CPU, [])
    assert again.digest == digest
    others = [
        replace(given, documents=13),
        replace(given, skip=1),
        replace(given, seed=1),
        documents(tasks_dir, "t_long", documents=12),
        documents(tasks_dir, "t_shared", "t_long", documents=24),
        documents(tasks_dir, "t_long", "t_shared", documents=24),
    ]
    assert len({digest, *(read_calibration(one, lm, CPU, []).digest for one in others)}) == 7
    for other in others:
        with pytest.raises(UsageError, match="are not those that the recipe was made with"):
            read_calibration(replace(other, digest=digest), lm, CPU, [])


# Which documents


@settings(deadline=None)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 40), min_size=1),
    st.integers(0, 120),
    st.integers(1, 120),
    st.integers(0, 3),
)
def test_documents_behind_others_are_the_next_ones(
    sizes: dict[str, int], skip: int, count: int, seed: int
) -> None:
    """As many as asked for, and at least one of each task that has one left."""
    every = {name: set(range(size)) for name, size in sizes.items()}

    def first(number: int) -> dict[str, set[int]]:
        chosen = choose_documents(sizes, number, seed)
        return {name: every[name] if found is None else found for name, found in chosen.items()}

    found = choose_after(sizes, skip, count, seed)
    before = first(skip) if skip else {name: set() for name in sizes}
    number_before, least = sum(map(len, before.values())), max(count, len(sizes))
    assert sum(map(len, found.values())) == min(least, sum(sizes.values()) - number_before)
    until = first(number_before + least)
    for name, size in sizes.items():
        assert found[name].isdisjoint(before[name])
        assert found[name] | before[name] == until[name]
        assert found[name] or len(before[name]) == size


@pytest.mark.parametrize("tasks", [("t_shared",), ("t_shared", "t_rolling"), ("t_group",)])
def test_skipped_documents_are_those_of_a_search(
    lm: ResidentLM, tasks_dir: Path, tasks: tuple[str, ...]
) -> None:
    for count in (4, 10, 20):
        search = scored(lm, tasks_dir, *tasks, num_documents=count)
        given = documents(tasks_dir, *tasks, documents=8, skip=count)
        calibration = open_calibration_tasks(given, lm)
        for task in search.task_names:
            pages = [[row["page"] for row in w.documents(task)] for w in (search, calibration)]
            assert not set(pages[0]) & set(pages[1])
        assert calibration.num_documents == min(8, 24 * len(search.task_names) - count)
        if tasks != ("t_group",):  # its tasks ask the same
            read_calibration(given, lm, CPU, [search])


def refused(given: CalibrationDocuments, lm: ResidentLM, *workloads: Workload) -> str:
    with pytest.raises(UsageError) as caught:
        read_calibration(given, lm, CPU, workloads)
    return str(caught.value)


def test_scored_documents_are_refused(lm: ResidentLM, tasks_dir: Path) -> None:
    """Also where another task asks the same, and in any of the workloads."""
    search = scored(lm, tasks_dir, "t_shared", num_documents=12)
    holdout = scored(lm, tasks_dir, "t_rolling")
    for task in ("t_shared", "t_long", "t_lambada", "t_generate"):
        text = refused(documents(tasks_dir, task), lm, search)
        assert f"A calibration document of {task} is also scored" in text
        assert "Name other documents for the calibration" in text
    assert "t_rolling is also scored" in refused(
        documents(tasks_dir, "t_differing", "t_rolling"), lm, search, holdout
    )
    read_calibration(documents(tasks_dir, "t_differing"), lm, CPU, [search, holdout])
    read_calibration(documents(tasks_dir, "t_shared", skip=12), lm, CPU, [search, holdout])


def test_scored_documents_are_refused_with_other_examples(lm: ResidentLM, tasks_dir: Path) -> None:
    given = documents(tasks_dir, "t_shared")
    given = replace(given, tasks=(CalibrationTask("t_shared", 2),))
    search = scored(lm, tasks_dir, "t_shared", num_documents=12)
    assert "t_shared is also scored" in refused(given, lm, search)
    read_calibration(replace(given, skip=12), lm, CPU, [search])


def test_scored_documents_are_refused_without_contexts(lm: ResidentLM, tmp_path: Path) -> None:
    write_task(tmp_path, "t_own", rows(4), **CHOICE | {"doc_to_text": ""})
    search = scored(lm, tmp_path, "t_own", num_documents=2)
    assert "t_own is also scored" in refused(documents(tmp_path, "t_own"), lm, search)
    read_calibration(documents(tmp_path, "t_own", skip=2), lm, CPU, [search])


def test_tasks_without_documents_left_are_refused(lm: ResidentLM, tasks_dir: Path) -> None:
    """lm-eval takes an empty choice for no choice."""
    search = scored(lm, tasks_dir, "t_shared")
    text = refused(documents(tasks_dir, "t_shared", skip=24), lm, search)
    assert "The task t_shared has no documents left besides the 24 that are scored" in text
    assert "score fewer (evaluation.rungs), or name other tasks or a text" in text
    for skip in (48, 10**9):
        text = refused(documents(tasks_dir, "t_shared", "t_long", skip=skip), lm)
        assert "The task t_shared has no documents" in text


def test_a_task_that_is_used_up_is_refused(lm: ResidentLM, tmp_path: Path) -> None:
    write_task(tmp_path, "t_few", rows(3), **CHOICE)
    write_task(tmp_path, "t_many", rows(9), **CHOICE)
    assert "t_few has no documents" in refused(documents(tmp_path, "t_few", "t_many", skip=8), lm)
    read_calibration(documents(tmp_path, "t_few", "t_many", skip=4, documents=1), lm, CPU, [])


def test_a_task_without_tokens_is_refused(lm: ResidentLM, tmp_path: Path) -> None:
    write_task(tmp_path, "t_own", rows(2, q=""), **GENERATE | {"doc_to_target": ""})
    workload = open_calibration_tasks(documents(tmp_path, "t_own", documents=2), lm)
    assert [i.args[0] for i in workload.instances("t_own")][1] == ""
    reading = read_calibration(documents(tmp_path, "t_own"), lm, CPU, [])
    assert len(rows_of(reading, "t_own")) == 1
    write_task(tmp_path / "none", "t_none", rows(1, q=""), **GENERATE | {"doc_to_target": ""})
    text = refused(documents(tmp_path / "none", "t_none"), lm)
    assert "The repair has no documents of t_none left to read" in text
