"""Files that are written whole."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from gptailor.files import write_new


def test_the_first_of_several_wins(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_new(path, b"first")
    write_new(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_a_filesystem_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write_new(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_new(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []
