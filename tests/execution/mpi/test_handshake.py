"""What must be the same on all ranks; a difference is reported with its nodes and values."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from pathlib import Path

import pytest

from gptailor.config import Config, parse_config
from gptailor.errors import UsageError
from gptailor.execution.mpi.handshake import (
    check_alike,
    check_clocks,
    check_models,
    clock_difference,
    code_digest,
    content_digests,
    file_digests,
    find_hello,
    first_difference,
    sees_token,
    write_token,
)
from gptailor.execution.mpi.messages import Hello
from gptailor.execution.node.placement import Place, find_place
from gptailor.models.family import Family
from tests.models.tiny import save_model


def hello(rank: int, node: str, code: str = "c0de", **versions: str) -> Hello:
    known = {"gptailor": "0.1.0", "torch": "2.8", **versions}
    return Hello(rank, 1, Place(node, ((0,),), ()), known, code, f"/{node}/gptailor")


def test_the_same_everywhere() -> None:
    check_alike(hello(0, "n1"), [hello(1, "n1"), hello(2, "n2")])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (hello(2, "n2", torch="2.7"), ("torch 2.8", "n1", "2.7", "rank 2 on n2")),
        (hello(2, "n2", gptailor="0.2.0"), ("gptailor 0.1.0", "0.2.0 for rank 2 on n2")),
        (hello(2, "n2", code="beef"), ("c0de", "/n2/gptailor of rank 2 on n2 has beef")),
    ],
)
def test_another_environment(other: Hello, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        check_alike(hello(0, "n1"), [hello(1, "n1"), other])
    assert all(word in str(caught.value) for word in words)


def test_the_digest_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "sub" / "b.py").write_text("2")
    first = code_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert code_digest(tmp_path) == first
    (tmp_path / "_C.cpython-311.so").write_bytes(b"3")
    second = code_digest(tmp_path)
    (tmp_path / "sub" / "b.py").write_text("3")
    assert len({first, second, code_digest(tmp_path)}) == 3
    assert find_hello(0, find_place()).code == find_hello(1, find_place()).code


def test_clocks() -> None:
    assert clock_difference(100.0, 100.4, 101.0) == 0.0  # explained by the message's travel time
    assert clock_difference(100.0, 107.0, 101.0) == 6.0
    assert clock_difference(100.0, 90.0, 101.0) == -10.0
    first, others = hello(0, "n1"), [hello(1, "n1"), hello(2, "n2")]
    assert check_clocks(first, {1: 0.0, 2: 4.0}, others) == []
    (note,) = check_clocks(first, {1: 0.0, 2: -20.0}, others)
    assert note == "Note: the clock of n2 is 20 s behind that of n1."
    with pytest.raises(UsageError, match="The clock of n2 is 3600 s ahead of that of n1: "):
        check_clocks(first, {1: 0.0, 2: 3600.0}, others)


def test_a_run_folder_that_is_shared(tmp_path: Path) -> None:
    token = write_token(tmp_path / "run")
    assert sees_token(token, timeout_s=0)
    assert not sees_token(token.with_name("another"), timeout_s=0.3)
    late = token.with_name(".late")
    threading.Timer(0.4, lambda: late.write_text(late.name)).start()
    assert sees_token(late, timeout_s=10)
    began = time.monotonic()
    assert not sees_token(tmp_path / "nothing" / "at all", timeout_s=60, go_on=lambda: False)
    assert time.monotonic() - began < 5


def test_models(tmp_path: Path) -> None:
    def opened(root: Path) -> tuple[Config, Family]:
        models = {name: str(root / name) for name in ("base", "red")}
        config = parse_config(
            {"models": models, "base": "base", "evaluation": {"tasks": ["t"]}}, "test"
        )
        return config, Family(models, "base")

    for root in ("here", "copied", "other"):
        for name in ("base", "red"):
            another = f"{name}2" if (root, name) == ("other", "red") else name
            save_model(tmp_path / root / name, name=another)
    for path in (tmp_path / "copied").rglob("*.safetensors"):
        os.utime(path, ns=(1, 1))
    here, copied, other = (opened(tmp_path / root) for root in ("here", "copied", "other"))
    assert first_difference(file_digests(*here), file_digests(*here)) is None
    assert first_difference(file_digests(*here), file_digests(*copied)) == "base"
    assert first_difference(content_digests(*here), content_digests(*copied)) is None
    with pytest.raises(UsageError, match=r"red .* rank 0 on n1, .* rank 2 on n2"):
        mine, theirs = content_digests(*here), content_digests(*other)
        check_models(mine, theirs, hello(0, "n1"), hello(2, "n2"), here[0])
    lacks = dataclasses.replace(hello(2, "n2"))
    with pytest.raises(UsageError, match="None for rank 2 on n2"):
        check_models(content_digests(*here), {}, hello(0, "n1"), lacks, here[0])
