"""The archive: what was reported as recorded stays there, whatever happens afterwards."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gptailor.errors import ResourceError, UsageError
from gptailor.evaluation import document_values
from gptailor.evaluation.outcome import Cost, Evaluation, Outcome, Score
from gptailor.recipe import Merge, Recipe, Take
from gptailor.run.archive import Archive
from tests.models.tiny import free_bytes, run_python, small_disk

MODELS = {"base": "org/base", "red": "org/red"}
OK = Outcome(
    "ok",
    0.625,
    (Score("piqa", "acc,none", 0.625, 0.01, 100), Score("x", "ppl", 3.5, None, 7, 2.0)),
    "",
    Cost(1.5, 0.25, 1.0, 107, 5000),
)


def recipe(*src_layers: int, model: str = "red") -> Recipe:
    return Recipe(MODELS, "base", tuple(Take(model, i) for i in src_layers), "base", "base")


def integrity(path: Path) -> str:
    with sqlite3.connect(path) as db:
        return str(db.execute("PRAGMA integrity_check").fetchone()[0])


def test_what_is_recorded_is_found(tmp_path: Path) -> None:
    values = (("lambda", 0.3), ("normalize", 0.0))
    merge = Merge("task_arithmetic", 2, (("red", 0.1),), values)
    merged = Recipe(MODELS, "base", (Take("base", 0), merge), "base", "red", "float16")
    failed = Outcome("failed", None, (), "Traceback …\n  line\nError: é", Cost())
    with Archive(tmp_path / "run") as archive:
        one = archive.record(recipe(0, 1), "search", 1000, OK)
        two = archive.record(merged, "search", 900, failed)
        three = archive.record(recipe(0, 1), "holdout", 1000, OK)
        assert [e.number for e in (one, two, three)] == [1, 2, 3]
        assert archive.evaluations() == [one, two, three]
    with Archive(tmp_path / "run", readonly=True) as archive:
        assert archive.evaluations() == [one, two, three]
        assert archive.evaluations("holdout") == [three]
        assert archive.evaluations("nothing") == []
        assert archive.find(merged, "search") == two
        assert archive.find(merged, "holdout") is None
        assert archive.find(recipe(0, 2), "search") is None
    assert isinstance(one, Evaluation)
    assert one.finished_at == pytest.approx(time.time(), abs=60)


def test_a_recipe_is_found_by_the_model_it_builds(tmp_path: Path) -> None:
    merge = Merge("linear", 1, (("red", 0.3),), (("normalize", 1.0),))
    written = Recipe(MODELS, "base", (Take("red", 0), merge), "base", "base")
    with Archive(tmp_path) as archive:
        archive.record(written, "search", 10, OK)
        found = archive.find(recipe(0, 1), "search")
        assert found is not None
        assert found.recipe == written  # as it was written


VALUES: list[tuple[float, ...]] = [
    (),
    (0.0,),
    (1.0,),
    (0.0,) * 9 + (1.0,),
    tuple(float(i % 3 == 0) for i in range(1001)),
    (0.25, -1e300, 5e-324, 1.0),
]


@pytest.mark.parametrize("values", VALUES, ids=len)
def test_values_of_documents_are_kept(values: tuple[float, ...], tmp_path: Path) -> None:
    leaves = ((1, 0.25), (len(values) - 1, 0.75)) if len(values) > 1 else ()
    score = Score("t", "acc,none", 0.5, 0.1, len(values), 2.0, values, leaves, 0.25)
    outcome = Outcome("ok", 0.5, (score,), "", Cost())
    with Archive(tmp_path) as archive:
        archive.record(recipe(0), "search", 10, outcome)
        (found,) = archive.evaluations()
        (size,) = archive._db.execute("SELECT length(scores) FROM evaluations").fetchone()
    assert found.outcome == outcome
    sent = pickle.dumps(outcome)
    assert pickle.loads(sent) == outcome
    assert len(sent) < 500 + (11 * len(values) if len(values) < 10 else len(values) / 5)
    assert size < 250 + (11 * len(values) if len(values) < 10 else len(values) / 5)


@pytest.mark.parametrize(
    "text",
    [
        "bits",
        "bits:8",
        "bits:8:",
        "bits:0:",
        "bits:x:AA==",
        "bits:²:AA==",
        "bits:-8:AA==",
        "bits:9:AA==",
        "bits:7:gA==",
        "bits:99999999999999999999999:AA==",
        "bits:8:A",
        "bits:8:é",
        "float64:AA==",
        "float64:",
        "float64:AAAAAAAA+H8=",  # not a number
        "float64:AAAAAAAA8H8=",  # infinity
        "zip:AA==",
    ],
)
def test_corrupt_values(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        document_values.decode(text)
    with Archive(tmp_path) as archive:
        archive.record(recipe(0), "search", 10, OK)
        with archive._db:
            scores = f'[{{"task": "t", "metric": "m", "value": 1, "values": "{text}"}}]'
            archive._db.execute("UPDATE evaluations SET scores = ?", (scores,))
        with pytest.raises(UsageError, match=r"evaluation 1, can't be read: it is damaged"):
            archive.evaluations()


def test_an_archive_from_before_documents_had_values(tmp_path: Path) -> None:
    """It reads unchanged: without values, and with an unknown score for guessing."""
    old = (
        '[{"task": "piqa", "metric": "acc,none", "value": 0.625, "stderr": 0.01,'
        ' "num_documents": 100, "weight": 1.0}, {"task": "x", "metric": "ppl", "value": 3.5,'
        ' "stderr": null, "num_documents": 7, "weight": 2.0}]'
    )
    with Archive(tmp_path) as archive:
        one = archive.record(recipe(0, 1), "search", 1000, OK)
        with archive._db:
            archive._db.execute("UPDATE evaluations SET scores = ?", (old,))
    with Archive(tmp_path, readonly=True) as archive:
        assert archive.evaluations() == [one]


def test_a_second_record_is_refused(tmp_path: Path) -> None:
    with Archive(tmp_path) as archive:
        first = archive.record(recipe(0), "search", 10, OK)
        with pytest.raises(UsageError, match=r"archive\.db can't be used: UNIQUE"):
            archive.record(recipe(0), "search", 10, OK)
        assert archive.evaluations() == [first]
        assert archive.record(recipe(1), "search", 10, OK) in archive.evaluations()


def test_an_unknown_status(tmp_path: Path) -> None:
    wrong = Outcome("crashed", None, (), "", Cost())  # type: ignore[arg-type]  # no Status
    with Archive(tmp_path) as archive:
        with pytest.raises(UsageError, match="CHECK constraint"):
            archive.record(recipe(0), "search", 10, wrong)
        assert archive.evaluations() == []


def test_arms(tmp_path: Path) -> None:
    with Archive(tmp_path) as archive:
        archive.add_arm("uniform", recipe(0))
        for _ in range(2):
            archive.add_arm("angular", recipe(0))
        assert archive.record(recipe(0), "search", 10, OK).arms == ("angular", "uniform")
        assert archive.record(recipe(1), "search", 10, OK).arms == ()
        archive.add_arm("dense:red", recipe(1))
        assert [e.arms for e in archive.evaluations()] == [("angular", "uniform"), ("dense:red",)]


def test_meta(tmp_path: Path) -> None:
    with Archive(tmp_path) as archive:
        assert archive.get_meta("seed") is None
        for value in ("1", "2"):
            archive.set_meta("seed", value)
    with Archive(tmp_path) as archive:
        assert archive.get_meta("seed") == "2"
        assert archive.get_meta("schema") == "gptailor/archive/1"


# Who may open it


HOLD = """
import sys
from gptailor.run.archive import Archive
with Archive(sys.argv[1]):
    print("open", flush=True)
    input()
"""


def test_two_searches_in_one_folder(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UsageError, match=rf"in use by another search \(process {other.pid}\)"):
            Archive(tmp_path)
        with Archive(tmp_path, readonly=True) as archive:
            assert archive.evaluations() == []
        other.kill()
    with Archive(tmp_path) as archive:  # the lock died with its process
        archive.record(recipe(0), "search", 10, OK)


def test_waits_for_a_lock_that_is_released_soon(tmp_path: Path) -> None:
    notes: list[str] = []
    with Archive(tmp_path), pytest.raises(UsageError, match="in use by another search"):
        Archive.check_not_in_use(tmp_path, wait_s=0.2, note=notes.append)
    fd = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    threading.Timer(0.5, os.close, [fd]).start()
    Archive.check_not_in_use(tmp_path, wait_s=30, note=notes.append)
    assert len(notes) == 2
    assert "Waiting up to 30 s" in notes[1]


def test_two_archives_in_one_process(tmp_path: Path) -> None:
    with Archive(tmp_path), pytest.raises(UsageError, match=f"process {os.getpid()}"):
        Archive(tmp_path)
    Archive(tmp_path).close()


def test_readonly_needs_a_run_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        Archive(tmp_path / "nothing", readonly=True)
    assert not (tmp_path / "nothing").exists()
    Archive(tmp_path / "run").close()
    before = (tmp_path / "run" / "archive.db").read_bytes()
    with Archive(tmp_path / "run", readonly=True) as archive:
        with pytest.raises(UsageError, match="readonly"):
            archive.record(recipe(0), "search", 10, OK)
        with pytest.raises(UsageError, match="readonly"):
            archive.set_meta("a", "b")
    assert (tmp_path / "run" / "archive.db").read_bytes() == before


def test_a_reader_while_a_writer_works(tmp_path: Path) -> None:
    total = 60
    seen: list[int] = []
    errors: list[BaseException] = []

    def read() -> None:
        try:
            while not seen or seen[-1] < total:
                with Archive(tmp_path, readonly=True) as archive:
                    numbers = [e.number for e in archive.evaluations()]
                assert numbers == list(range(1, len(numbers) + 1))
                seen.append(len(numbers))
        except BaseException as error:
            errors.append(error)
            raise

    with Archive(tmp_path) as archive:
        thread = threading.Thread(target=read)
        thread.start()
        for i in range(total):
            archive.record(recipe(i), "search", 10, OK)
            if errors:
                break
    thread.join()
    assert not errors
    assert seen == sorted(seen)


def test_another_schema(tmp_path: Path) -> None:
    with Archive(tmp_path) as archive:
        archive.set_meta("schema", "gptailor/archive/9")
    for readonly in (True, False):
        with pytest.raises(UsageError, match=r"has schema 'gptailor/archive/9', but"):
            Archive(tmp_path, readonly=readonly)


def test_a_file_that_is_not_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "archive.db"
    path.write_bytes(b"not a database at all" * 100)
    for readonly in (True, False):
        with pytest.raises(UsageError, match=r"archive\.db can't be used: file is not a database"):
            Archive(tmp_path, readonly=readonly)
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="can't be used: no such table"):
        Archive(tmp_path, readonly=True)
    Archive(tmp_path).close()  # an empty file is an empty database


# Crashes and full disks


WRITE = """
import sys
from gptailor.evaluation.outcome import Cost, Outcome, Score
from gptailor.run.archive import Archive
from gptailor.recipe import Recipe, Take
scores = tuple(Score(f"task{i}", "acc,none", 0.5, 0.1, 100) for i in range(40))
with Archive(sys.argv[1]) as archive:
    done = len(archive.evaluations())
    for i in range(done, done + 10**6):
        layers = tuple(Take("red", j) for j in range(i, i + 30))
        made = Recipe({"base": "b", "red": "r"}, "base", layers, "base", "base")
        found = archive.record(made, "search", i, Outcome("ok", 0.5, scores, "", Cost()))
        print(found.number, flush=True)
"""


def test_kill_9_loses_nothing_that_was_reported(tmp_path: Path) -> None:
    reported: list[int] = []
    for i in range(8):
        words = [sys.executable, "-c", WRITE, str(tmp_path)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(3):
                reported.append(int(writer.stdout.readline()))
            time.sleep(0.005 * i)
            writer.send_signal(signal.SIGKILL)
            reported += [int(line) for line in writer.stdout if line.endswith("\n")]
        with Archive(tmp_path, readonly=True) as archive:
            found = [e.number for e in archive.evaluations()]
        assert found[: len(reported)] == reported
        assert len(found) <= len(reported) + 1
        reported = found
    assert integrity(tmp_path / "archive.db") == "ok"


def test_a_record_waits_for_the_disk(tmp_path: Path) -> None:
    """No test can cut the power; and write-ahead logs are unsafe on network file systems."""
    with Archive(tmp_path) as archive:
        pragmas = [
            archive._db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("synchronous", "journal_mode")
        ]
    assert pragmas == [2, "delete"]


HOT = """
import os, shutil, sys
from pathlib import Path
from gptailor.run.archive import Archive
run, copy = map(Path, sys.argv[1:])
with Archive(run) as archive:
    db = archive._db
    db.execute("PRAGMA cache_size = 1")
    db.execute("BEGIN IMMEDIATE")
    for i in range(2000):
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"k{i}", "x" * 500))
    db.execute("UPDATE evaluations SET accuracy = 0.0")
    shutil.copytree(run, copy)  # as a kill -9 leaves it
    db.rollback()
"""


@pytest.mark.parametrize("readonly", [True, False])
def test_kill_9_in_the_middle_of_a_transaction(readonly: bool, tmp_path: Path) -> None:
    """Readers must be able to roll back the dead writer's transaction."""
    with Archive(tmp_path / "run") as archive:
        one = archive.record(recipe(0), "search", 10, OK)
    done = run_python(HOT, tmp_path / "run", tmp_path / "dead")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dead" / "archive.db-journal").stat().st_size > 0
    with Archive(tmp_path / "dead", readonly=readonly) as archive:
        assert archive.evaluations() == [one]
        assert archive.get_meta("k0") is None
    assert integrity(tmp_path / "dead" / "archive.db") == "ok"


def test_kill_9_during_creation(tmp_path: Path) -> None:
    """After any number of steps, the archive can be opened again."""
    code = (
        "import os, sqlite3, sys; from gptailor.run import archive\n"
        "n = [int(sys.argv[2])]\n"
        "class Db(sqlite3.Connection):\n"
        "    def step(self):\n"
        "        n[0] -= 1\n"
        "        if n[0] < 0: os.kill(os.getpid(), 9)\n"
        "    def execute(self, *a): self.step(); return super().execute(*a)\n"
        "    def executescript(self, *a): self.step(); return super().executescript(*a)\n"
        "real = sqlite3.connect\n"
        "archive.sqlite3.connect = lambda *a, **k: real(*a, factory=Db, **k)\n"
        "archive.Archive(sys.argv[1]).close()\n"
    )
    codes = []
    for steps in range(6):
        done = run_python(code, tmp_path / f"run{steps}", steps)
        codes.append(done.returncode)
        with Archive(tmp_path / f"run{steps}") as archive:
            archive.record(recipe(0), "search", 10, OK)
    assert codes[0] == -signal.SIGKILL


@pytest.mark.system
def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400 << 10) as disk:
        recorded: list[Evaluation] = []
        with Archive(disk / "run") as archive:
            recorded.append(archive.record(recipe(0), "search", 10, OK))
            (disk / "filler").write_bytes(b"\1" * (free_bytes(disk) - (24 << 10)))
            with pytest.raises(ResourceError) as caught:
                for i in range(1, 2000):
                    recorded.append(archive.record(recipe(i), "search", 10, OK))
            assert caught.value.exit_code == 4
            assert "can't be written" in str(caught.value)
            assert archive.evaluations() == recorded
            (disk / "filler").unlink()
            recorded.append(archive.record(recipe(5000), "search", 10, OK))
            assert archive.evaluations() == recorded
        shutil.copytree(disk / "run", tmp_path / "copy")
        assert integrity(tmp_path / "copy" / "archive.db") == "ok"


@pytest.mark.system
def test_a_disk_without_room_for_an_archive(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        (disk / "filler").write_bytes(b"\1" * free_bytes(disk))
        with pytest.raises(ResourceError, match="Free space, then resume"):
            Archive(disk / "run")
        (disk / "filler").unlink()
        Archive(disk / "run").close()
