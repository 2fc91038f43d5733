"""The journal: only whole lines are read, whatever happened to it; other files are refused."""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gptailor.errors import ResourceError, UsageError
from gptailor.evaluation.outcome import Cost, Evaluation, Outcome, Score
from gptailor.evaluation.similarity import Similarity
from gptailor.recipe import Layer, Merge, Recipe, Take
from gptailor.run import journal as module
from gptailor.run.journal import (
    MAX_LINE_BYTES,
    Journal,
    JournalReader,
    evaluations_in,
    read_journal,
)
from gptailor.run.journal_entry import Begun, Closed, Entry, Header, Measured
from gptailor.run.journal_line import from_line, to_line
from gptailor.run.journal_schema import MAX_MODELS, MAX_REASON_CHARS
from gptailor.run.layout import JOURNAL
from tests.models.tiny import free_bytes, small_disk

MODELS = {"base": "org/base", "red": "org/red"}
FAMILY = {"num_layers": 8, "models": {"red": "/m/red"}, "parameters": {"red": 900}}
HEADER = Header(1, 3, {"search": {"seed": 0}}, "f", "d", FAMILY)


def recipe(*src_layers: int) -> Recipe:
    values = (("lambda", 0.3), ("normalize", 0.0))
    merge = Merge("task_arithmetic", 7, (("red", 0.1),), values)
    layers: list[Layer] = [*(Take("red", i) for i in src_layers), merge]
    return Recipe(MODELS, "base", tuple(layers), "base", "red", "float16")


def evaluation(*src_layers: int, reason: str = "", documents: Any = "search") -> Evaluation:
    scores = (
        Score("t é", "ppl", math.inf, None, 7, 2.0),
        Score("u", "acc", 0.5, 0.1, 9),
        Score("v", "acc", 0.5, 0.1, 3, 1.0, (0.0, 1.0, 0.5), ((1, 0.5), (2, 0.5)), 0.25),
    )
    cost = Cost(1.5, 0.25, 1.0, 107, 5000)
    outcome = Outcome("ok", 0.625, scores, "", cost)
    if reason:
        outcome = Outcome("failed", None, (), reason, cost)
    made = recipe(*src_layers)
    return Evaluation(0, made, documents, outcome, 900, ("angular:0.9@red",), 1.7e9 + 0.123456)


ENTRIES: list[Entry] = [
    HEADER,
    evaluation(0, 1),
    evaluation(0, documents="holdout"),
    evaluation(2, reason="Traceback …\n  line\n\tError: é\x1b[2J"),
    Measured("red", Similarity((0.5, 0.25), ((0.0, 0.1, 0.2),) * 3)),
    Begun(((recipe(3).hash, "search"), ("red", "similarity"))),
    Begun(()),
    Closed(),
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: type(entry).__name__)
def test_round_trip(entry: Entry) -> None:
    line = to_line(entry)
    json.loads(line, parse_constant=pytest.fail)  # JSON for every reader: infinity is null
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert from_line(line[:-1], Path("j"), 1 if entry is HEADER else 2) == entry


def test_any_outcome_can_be_written_and_read() -> None:
    """Whatever text a crash leaves, the line can be read again."""
    long = evaluation(0, reason="x" * MAX_REASON_CHARS + "\ud800the end")
    found = from_line(to_line(long)[:-1], Path("j"), 2)
    assert isinstance(found, Evaluation)
    assert found.outcome.reason.endswith("?the end")
    assert len(found.outcome.reason) == MAX_REASON_CHARS
    odd = evaluation(0)
    odd = Evaluation(0, odd.recipe, "search", Outcome("ok", math.nan, (), "", Cost()), 1, (), 0.0)
    found = from_line(to_line(odd)[:-1], Path("j"), 2)
    assert isinstance(found, Evaluation)
    assert found.outcome.accuracy is None  # like in SQLite


def test_a_score_from_before_documents_had_values() -> None:
    found = from_line(line(scores=[GOOD_SCORE]), Path("j"), 2)
    assert isinstance(found, Evaluation)
    assert found.outcome.scores == (Score("t", "m", 1.0, None, 1),)


def test_too_many_values_of_documents_are_left_out() -> None:
    """A line's length is limited, and an evaluation matters more than its documents' values."""
    values = tuple(0.1 * (i % 7) for i in range(100_000))
    scores = (Score("t", "m", 0.3, 0.1, 100_000, 1.0, values, ((1, 0.5), (99_999, 0.5)), 0.25),)
    one = evaluation(0)
    one = replace(one, outcome=replace(one.outcome, scores=scores))
    written = to_line(one)
    assert len(written) < MAX_LINE_BYTES
    found = from_line(written[:-1], Path("j"), 2)
    assert isinstance(found, Evaluation)
    assert found.outcome.scores == (replace(scores[0], values=(), leaves=()),)


def test_a_reader_follows_a_writer(tmp_path: Path) -> None:
    reader = JournalReader(tmp_path / JOURNAL)
    assert reader.read() == []
    journal = Journal(tmp_path, HEADER)
    assert reader.read() == [HEADER]
    assert reader.read() == []
    journal.append(ENTRIES[1:4])
    journal.append(ENTRIES[4:5], sync=False)
    assert reader.read() == ENTRIES[1:5]
    journal.close()
    journal.close()
    assert reader.read() == [Closed()]
    assert read_journal(tmp_path / JOURNAL) == (HEADER, [HEADER, *ENTRIES[1:5], Closed()])


def test_a_line_torn_anywhere(tmp_path: Path) -> None:
    """Wherever a line broke off, readers wait, its owner repairs it, and no line is read twice."""
    rows = [evaluation(i) for i in range(3)]
    Journal(tmp_path, HEADER, rows[:2])
    whole = (tmp_path / JOURNAL).read_bytes()
    last = to_line(rows[2])
    for cut in [*range(0, len(last), 97), len(last) - 1]:
        path = tmp_path / JOURNAL
        path.write_bytes(whole + last[:cut])
        reader = JournalReader(path)
        assert reader.read() == [HEADER, *rows[:2]]
        assert reader.read() == []
        Journal(tmp_path, HEADER, rows)
        assert reader.read() == [HEADER, rows[2]]
        assert evaluations_in(read_journal(path)[1]) == rows


@pytest.mark.parametrize("rest", [bytes(5000), b"\0\0\n\0", b"{}\n", b"half a line\n" + bytes(9)])
def test_what_a_power_cut_leaves(rest: bytes, tmp_path: Path) -> None:
    rows = [evaluation(i) for i in range(3)]
    Journal(tmp_path, HEADER, rows[:1])
    path = tmp_path / JOURNAL
    with path.open("ab") as file:
        file.write(rest)
    Journal(tmp_path, HEADER, rows, [Measured("red", Similarity((1.0,), ((0.0, 0.5),) * 2))])
    header, entries = read_journal(path)
    assert header == HEADER
    assert evaluations_in(entries) == rows
    Journal(tmp_path, HEADER, rows, [Measured("red", Similarity((1.0,), ((0.0, 0.5),) * 2))])
    assert sum(isinstance(e, Measured) for e in read_journal(path)[1]) == 1


def test_a_journal_that_was_replaced_or_shortened(tmp_path: Path) -> None:
    rows = [evaluation(i) for i in range(3)]
    Journal(tmp_path, HEADER, rows)
    path = tmp_path / JOURNAL
    reader = JournalReader(path)
    assert reader.read() == [HEADER, *rows]
    path.rename(tmp_path / "old")
    assert reader.read() == []
    Journal(tmp_path, HEADER, rows)
    assert reader.read() == [HEADER, *rows]
    os.truncate(path, len(to_line(HEADER)))
    assert reader.read() == [HEADER]


def test_a_long_journal_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 3000)
    rows = [evaluation(*range(i % 5)) for i in range(60)]
    journal = Journal(tmp_path, HEADER)
    journal.append(rows)
    reader = JournalReader(tmp_path / JOURNAL)
    assert len(reader.read()) < 10
    assert evaluations_in(read_journal(tmp_path / JOURNAL)[1]) == rows
    distinct = list({(e.recipe.hash, e.documents): e for e in rows}.values())
    Journal(tmp_path, HEADER, distinct)
    assert evaluations_in(read_journal(tmp_path / JOURNAL)[1]) == rows


def test_a_reader_beside_a_writer(tmp_path: Path) -> None:
    rows = [evaluation(*range(i % 7)) for i in range(200)]
    reader = JournalReader(tmp_path / JOURNAL)
    found: list[Entry] = []

    def read() -> None:
        while len(found) < len(rows) + 1:
            found.extend(reader.read())

    thread = threading.Thread(target=read)
    thread.start()
    journal = Journal(tmp_path, HEADER)
    for i in range(0, 200, 5):
        journal.append(rows[i : i + 5], sync=i % 50 == 0)
    thread.join(30)
    assert found == [HEADER, *rows]


def line(**changes: Any) -> bytes:
    """A good evaluation with some values changed."""
    data = json.loads(to_line(evaluation(0)))["evaluation"]
    for key, value in changes.items():
        if value is None and key == "cost":
            del data[key]
        else:
            data[key] = value
    return json.dumps({"evaluation": data}).encode()


def header(**changes: Any) -> bytes:
    """A good header with some values changed."""
    data = json.loads(to_line(HEADER))["header"]
    return json.dumps({"header": {**data, **changes}}).encode()


GOOD_SCORE = {
    "task": "t", "metric": "m", "value": 1, "stderr": None, "num_documents": 1, "weight": 1,
}  # fmt: skip


BITS = "bits:3:Aw=="


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"no", "line 2 is not valid JSON"),
        (b"[]", "line 2 is not a JSON object"),
        (b"\xff\xfe", "line 2 is not valid JSON"),
        (b'{"closed":{},"closed":{}}', "'closed' appears twice"),
        (b'{"closed":{},"begun":{"keys":[]}}', "line 2, is not a line of a journal"),
        (b'{"run":"rm -rf /"}', "line 2, is not a line of a journal"),
        (b'{"closed":[]}', r"line 2, closed is \[\]: must be an object"),
        (b'{"closed":{"a":1}}', "line 2, the key closed.a is unknown"),
        (b'{"closed":{"a":1,"b":2}}', "line 2, the key closed.a is unknown"),
        (b"[" * 5000 + b"]" * 5000, "is not"),
        (b'{"closed":' + b'{"a":' * 200 + b"1" + b"}" * 201, "nested more than"),
        (b'{"begun":{"keys":[["a"]]}}', "the key begun.keys.0.1 is missing"),
        (b'{"begun":{"keys":[["\\u001b","search"]]}}', "begun.keys.0.0 is .* can't be shown"),
        (b'{"begun":{"keys":[["a","b","c"]]}}', "begun.keys.0 is .* at most 2 items"),
        (b'{"begun":{"keys":{}}}', "begun.keys is {}: must be a list"),
        (b'{"header":{"schema":"gptailor/journal/9"}}', "schema 'gptailor/journal/9'"),
        (b'{"similarity":{"model":"x","block_influence":[1],"angular":[[1]]}}', "wrong shape"),
        (b'{"similarity":{"model":"x","block_influence":[NaN],"angular":[]}}', "fluence.0 is nan"),
        (header(config={"search": 1}), "config.search is 1: must be an object"),
        (header(config=[]), r"header.config is \[\]: must be an object"),
        (header(config={"search": {"evaluations": -1}}), "config.search.evaluations is -1"),
        (header(family={}), "the key header.family.num_layers is missing"),
        (header(family={**FAMILY, "num_layers": 10**9}), "family.num_layers is 1000000000: "),
        (header(family={**FAMILY, "parameters": {"red": "x"}}), "parameters.red is 'x'"),
        (header(family={**FAMILY, "models": {"\n": "x"}}), "models. .*can't be shown"),
        (header(family={**FAMILY, "models": {"x" * 1001: "x"}}), "at most 1000 char"),
        (header(fingerprint="x" * 1001), "header.fingerprint is .* at most 1000 char"),
        (header(island=1 << 62), "header.island is 4611686018427387904"),
        (header(island=-1), "island is -1"),
        (line(cost=None), "the key evaluation.cost is missing"),
        (line(extra=1), "the key evaluation.extra is unknown"),
        (line(accuracy=math.inf), "accuracy is inf"),
        (line(accuracy=True), "accuracy is True"),
        (line(accuracy="1"), "accuracy is '1'"),
        (line(status="crashed"), "status is 'crashed'"),
        (line(status="failed"), "accuracy is 0.625: only the status 'ok'"),
        (line(status={}), "status is {}"),
        (line(documents="other"), "documents is 'other'"),
        (line(documents=[]), r"documents is \[\]"),
        (line(parameters=-1), "parameters is -1"),
        (line(parameters=10**30), "parameters is 1000"),
        (line(parameters=1.5), "parameters is 1.5"),
        (line(finished_at=math.nan), "finished_at is nan"),
        (line(finished_at=1 << 62), "finished_at is 4611686018427387904: .* 62 bits"),
        (line(arms=["\x1b[2J"]), "arms.0 is "),
        (line(arms="angular"), "arms is 'angular': must be a list"),
        (line(reason="\ud800"), "reason is "),
        (line(reason="x" * (MAX_REASON_CHARS + 1)), "reason is "),
        (line(scores=[1]), "scores.0 is 1: must be an object"),
        (line(scores=[{**GOOD_SCORE, "value": "x"}]), "scores.0.value is 'x'"),
        (line(scores=[{**GOOD_SCORE, "values": [1]}]), r"scores.0.values is \[1\]"),
        (line(scores=[{**GOOD_SCORE, "values": "bits:9:AA=="}]), "scores has wrong values: bits"),
        (line(scores=[{**GOOD_SCORE, "values": "float64:AAAAAAAA+H8="}]), "not finite"),
        (line(scores=[{**GOOD_SCORE, "values": "A" * (1 << 20) + "A"}]), "scores.0.values is "),
        (line(scores=[{**GOOD_SCORE, "values": "A" * (1 << 19)}] * 3), "characters of values"),
        (line(scores=[{**GOOD_SCORE, "leaves": [[1, 1.0]]}]), "scores.0.leaves don't fit the 0"),
        (line(scores=[{**GOOD_SCORE, "values": BITS, "leaves": [[2, 1]]}]), "don't fit the 3"),
        (line(scores=[{**GOOD_SCORE, "values": BITS, "leaves": [[3, 9]]}]), "don't fit the 3"),
        (line(scores=[{**GOOD_SCORE, "values": BITS, "leaves": [[0, 0], [3, 1]]}]), "don't fit"),
        (line(scores=[{**GOOD_SCORE, "values": BITS, "leaves": [[3]]}]), "leaves.0.1 is missing"),
        (line(scores=[{**GOOD_SCORE, "values": BITS, "leaves": [[-3, 1]]}]), "leaves.0.0 is -3"),
        (line(scores=[{**GOOD_SCORE, "chance": "x"}]), "scores.0.chance is 'x'"),
        (line(scores=[{**GOOD_SCORE, "chance": math.nan}]), "scores.0.chance is nan"),
        (line(recipe={}), "schema is None"),
        (line(recipe=7), "line 2, recipe"),
    ],
)  # fmt: skip
def test_hostile_lines(bad: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    path.write_bytes(to_line(HEADER) + bad + b"\n" + to_line(evaluation(0)))
    reader = JournalReader(path)
    assert reader.read() == [HEADER]  # good entries before it are not lost
    for _ in range(2):
        with pytest.raises(UsageError, match=message) as caught:
            reader.read()
        assert str(path) in str(caught.value)
        assert str(caught.value).isprintable()


MANY = range(200_000)


@pytest.mark.parametrize(
    "bad",
    [
        line(**{f"key {i}": 0 for i in MANY}),
        line(arms=list(MANY)),
        line(scores=[{f"key {i}": 0 for i in MANY}]),
        line(scores=[{**GOOD_SCORE, "leaves": list(MANY)}]),
        header(family={**FAMILY, "models": {str(i): 0 for i in MANY}}),
        header(family={**FAMILY, "parameters": {str(i): "x" for i in range(MAX_MODELS)}}),
        json.dumps({"begun": {"keys": list(MANY)}}).encode(),
        json.dumps({"similarity": {"angular": [list(map(str, MANY))]}}).encode(),
    ],
    ids=range(8),
)
def test_a_line_full_of_errors_does_not_fill_the_memory(bad: bytes) -> None:
    """Pydantic creates an object for each error that it finds."""
    with pytest.raises(UsageError, match=r"^j, line 2, ") as caught:
        from_line(bad, Path("j"), 2)
    assert isinstance(caught.value.__cause__, ValidationError)
    assert caught.value.__cause__.error_count() < 2 * MAX_MODELS + 20


@pytest.mark.parametrize(
    "content", [b"x\n", b"{}\n", to_line(Closed()), to_line(evaluation(0)), b'{"a":1}\n', b"\n"]
)
def test_files_that_are_not_journals(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"journal\.jsonl"):
        read_journal(path)
    with pytest.raises(UsageError, match=r"journal\.jsonl"):
        Journal(tmp_path, HEADER)
    assert path.read_bytes() == content  # foreign files are not repaired


def test_paths_that_are_not_regular_files(tmp_path: Path) -> None:
    (tmp_path / "folder" / JOURNAL).mkdir(parents=True)
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / JOURNAL)
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / JOURNAL).symlink_to("/dev/zero")
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle" / JOURNAL).symlink_to(JOURNAL)
    for name in ("folder", "fifo", "zero", "circle"):
        for use in (
            JournalReader(tmp_path / name / JOURNAL).read,
            lambda n=name: Journal(tmp_path / n, HEADER),
        ):
            with pytest.raises(UsageError, match=r"journal\.jsonl"):
                use()
    assert JournalReader(tmp_path / "folder" / JOURNAL / "x" / JOURNAL).read() == []


def test_an_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 4000)
    path = tmp_path / JOURNAL
    path.write_bytes(to_line(HEADER) + b"x" * 4001)
    reader = JournalReader(path)
    assert reader.read() == [HEADER]
    with pytest.raises(UsageError, match="line 2 has more than 4,000 bytes"):
        reader.read()
    Journal(tmp_path, HEADER, [evaluation(0)])
    assert reader.read() == [HEADER, evaluation(0)]


def test_a_journal_of_another_search_is_not_taken_over(tmp_path: Path) -> None:
    Journal(tmp_path, HEADER, [evaluation(0)])
    before = (tmp_path / JOURNAL).read_bytes()
    other = Header(1, 3, {"search": {"seed": 1}}, "f", "d", {})
    with pytest.raises(UsageError, match=r"another configuration: search\.seed was 1, but is 0"):
        Journal(tmp_path, other)
    assert (tmp_path / JOURNAL).read_bytes() == before


@pytest.mark.system
def test_a_full_disk(tmp_path: Path) -> None:
    """Entries that do not fit leave nothing behind, and later ones follow once there is room."""
    with small_disk(tmp_path / "disk", 256 << 10) as disk:
        journal = Journal(disk, HEADER)
        (disk / "filler").write_bytes(b"\1" * (free_bytes(disk) - (8 << 10)))
        written: list[Entry] = [HEADER]
        with pytest.raises(ResourceError, match="Free space, then resume"):
            for i in range(500):
                rows = [evaluation(*range(i % 9)) for _ in range(5)]
                journal.append(rows)
                written += rows
        assert read_journal(disk / JOURNAL)[1] == written
        (disk / "filler").unlink()
        journal.append([evaluation(1)])
        assert read_journal(disk / JOURNAL)[1] == [*written, evaluation(1)]
        journal.close()
