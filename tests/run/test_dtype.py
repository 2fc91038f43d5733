"""A run computes the forward pass in one type, whatever machines it continues on."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gptailor import verbs
from gptailor.config import read_config
from gptailor.errors import UsageError
from gptailor.evaluation import forward_dtype
from gptailor.evaluation.evaluator import Evaluator
from gptailor.evaluation.footprint import held_bytes
from gptailor.evaluation.forward_dtype import Ability
from gptailor.evaluation.memory_policy import ROOM
from gptailor.models.family import Family
from gptailor.run.archive import Archive
from gptailor.run.config_difference import config_difference
from gptailor.run.dtype import choose_dtype
from gptailor.run.resume import check_resumable
from tests.search.test_run import write_config

FAST = Ability("n1", "cpu", ("float16",), 1 << 40)
SLOW = Ability("n2", "cpu", ("bfloat16", "float16"), 1 << 40)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without instructions for bfloat16, also for child processes."""
    monkeypatch.setattr(forward_dtype, "cpu_flags", frozenset)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")


@pytest.fixture
def config(models: dict[str, str], tasks_dir: Path, tmp_path: Path) -> Path:
    return write_config(
        tmp_path, models, tasks_dir, tmp_path / "run", evaluations=6, arms=["angular"]
    )


def stored(place: Path, run: Path | None = None) -> tuple[str, str]:
    """The type in the archive, and in the run folder's config.yaml if there is one."""
    with Archive(place, readonly=True) as archive:
        kept = json.loads(archive.get_meta("config") or "{}")
    path = (run or place) / "config.yaml"
    written = read_config(path).evaluation.dtype if path.is_file() else ""
    return kept["evaluation"]["dtype"], written


def test_the_type_is_chosen_once_and_kept(
    slow: None,
    config: Path,
    models: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = verbs.search(config)
    said = capsys.readouterr().err
    assert said.count("Evaluations are computed in float32, as the CPU of") == 1
    assert stored(run) == ("float32", "float32")
    # every rounding shows in what workers measured
    parsed, measured = read_config(config), {}
    for dtype in ("float32", "bfloat16"):
        evaluation = parsed.computed_in(dtype).evaluation
        evaluator = Evaluator(Family(models, "base"), evaluation)
        measured[dtype] = evaluator.similarity("red", "bfloat16").block_influence
    with Archive(run, readonly=True) as archive:
        found = json.loads(archive.get_meta("similarity") or "{}")["red"]["block_influence"]
    assert found == pytest.approx(measured["float32"], abs=1e-6)
    assert found != pytest.approx(measured["bfloat16"], abs=1e-6)
    # it continues on a machine that is good at bfloat16
    monkeypatch.setattr(forward_dtype, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    capsys.readouterr()
    verbs.search(config, resume=True, overrides=["search.evaluations=8"])
    assert (
        "Evaluations are computed in float32, as when the run started." in capsys.readouterr().err
    )
    assert stored(run) == ("float32", "float32")
    with pytest.raises(UsageError, match=r"evaluation\.dtype was 'float32', but is 'bfloat16'"):
        verbs.search(config, resume=True, overrides=["evaluation.dtype=bfloat16"])


def test_too_little_memory_for_float32(config: Path, models: dict[str, str]) -> None:
    """The recipes' type is used then, which is that of the candidates' files."""
    parsed, family = read_config(config), Family(models, "base")
    needed = held_bytes(family)("float32")
    for share, dtype in ((0.99, "bfloat16"), (1.01, "float32")):
        ability = replace(SLOW, free_bytes=int(share * 2 * needed / ROOM))
        choice = choose_dtype(parsed, family, config.parent, [ability] * 2, is_island=False)
        assert choice.dtype == dtype, choice.sentence


def test_a_run_of_an_earlier_version_continues_in_the_recipes_type(
    config: Path, models: dict[str, str]
) -> None:
    """Earlier versions stored "auto", which meant that type."""
    parsed, family, run = read_config(config), Family(models, "base"), config.parent / "run"
    with Archive(run) as archive:
        check_resumable(archive, parsed, family, "documents")
    choice = choose_dtype(parsed, family, run, [SLOW], is_island=False)
    assert "computed in bfloat16, as when the run started; the CPU of n2" in choice.sentence
    with Archive(run) as archive:
        check_resumable(archive, parsed.computed_in(choice.dtype), family, "documents")
        with pytest.raises(UsageError, match="dtype was 'bfloat16', but is 'float32'"):
            check_resumable(archive, parsed.computed_in("float32"), family, "documents")
    assert stored(run)[0] == "bfloat16"


def test_islands_take_the_type_of_the_first(
    slow: None, config: Path, models: dict[str, str]
) -> None:
    run = verbs.search(config, island=(0, 2))
    assert stored(run / "islands" / "0", run) == ("float32", "float32")
    parsed, family = read_config(config), Family(models, "base")
    for name in ("islands/dtype.json", "config.yaml"):  # either is enough
        (run / name).rename(run / "aside")
        place = run / "islands" / "1"
        choice = choose_dtype(parsed, family, place, [FAST], is_island=True)
        assert choice.sentence == "Evaluations are computed in float32, as when the run started."
        (run / "aside").rename(run / name)
    with pytest.raises(UsageError, match=r"dtype was 'float32', but is 'bfloat16'"):
        verbs.search(config, island=(1, 2), overrides=["evaluation.dtype=bfloat16"])


def test_islands_that_start_together_agree(config: Path, models: dict[str, str]) -> None:
    """Even on machines that would choose differently."""
    parsed, family = read_config(config), Family(models, "base")
    islands = Path(parsed.output) / "islands"
    barrier = threading.Barrier(8)
    for _ in range(20):
        found: list[str] = []

        def island(number: int, into: list[str]) -> None:
            barrier.wait()
            place = islands / str(number)
            abilities = [SLOW if number % 2 else FAST]
            into.append(choose_dtype(parsed, family, place, abilities, is_island=True).dtype)

        threads = [threading.Thread(target=island, args=(n, found)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        assert len(set(found)) == 1
        assert [path.name for path in islands.iterdir()] == ["dtype.json"]
        (islands / "dtype.json").unlink()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"dtype": "float32"}', '{"dtype": 7}'])
def test_an_invalid_choice_is_replaced(text: str, config: Path, models: dict[str, str]) -> None:
    """A torn file, or one from a run that never began, with other recipes or another device."""
    parsed, family = read_config(config), Family(models, "base")
    path = Path(parsed.output) / "islands" / "dtype.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    choice = choose_dtype(parsed, family, path.parent / "0", [FAST], is_island=True)
    assert choice.dtype == "bfloat16"
    assert json.loads(path.read_text()) == {
        "recipes": "bfloat16",
        "device": "cpu",
        "dtype": "bfloat16",
    }
    assert choose_dtype(parsed, family, path.parent / "1", [SLOW], is_island=True).dtype == (
        "bfloat16"
    )


def test_new_keys_make_no_difference_between_runs(config: Path) -> None:
    new = json.loads(read_config(config).model_dump_json())
    old = json.loads(json.dumps(new))
    for task in old["evaluation"]["tasks"]:
        del task["limit"]
    assert config_difference(old, new) == ""
    old["evaluation"]["tasks"][0]["weight"] = 3.0
    assert config_difference(old, new) == "evaluation.tasks.0.weight was 3.0, but is 1.0"


def test_auto_matches_the_type_of_the_run(config: Path) -> None:
    new = yaml.safe_load(config.read_text())
    old = {**new, "evaluation": {**new["evaluation"], "dtype": "float32"}}
    assert config_difference(old, new) == ""
    assert "evaluation.dtype was 'float32'" in config_difference(
        old, {**new, "evaluation": {**new["evaluation"], "dtype": "float16"}}
    )
    assert (
        config_difference(new, {**new, "evaluation": {**new["evaluation"], "dtype": "auto"}}) == ""
    )
