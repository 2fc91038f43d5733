"""Logs: whole lines in the order of events; an unwritable folder or a full disk breaks nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptailor.execution.logs import Log, log_path


def test_text_and_json(tmp_path: Path) -> None:
    log = Log(2, "n7")
    log.say("before there is a file")
    log.open(tmp_path, as_json=True)
    log.event("ready", "Ready.", seconds=1.5, where=tmp_path)
    log.event("job", job="abc")
    log.close()
    log.say("after the end")
    lines = (tmp_path / log_path(2)).read_text().splitlines()
    assert [line[20:] for line in lines] == ["before there is a file", "Ready."]
    events = [json.loads(line) for line in (tmp_path / "logs/rank-002.jsonl").open()]
    assert [event["event"] for event in events] == ["note", "ready", "job"]
    assert {(event["rank"], event["host"]) for event in events} == {(2, "n7")}
    assert events[1]["seconds"] == 1.5
    again = Log(2, "n7")
    again.open(tmp_path)
    again.say("appended")
    assert "before" in (tmp_path / log_path(2)).read_text()


def test_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    log = Log(0, "n1")
    log.open(tmp_path, as_json=True)
    log.say("lost")
    log.take_output()
    log.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_end_a_program_that_prints(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / log_path(1)).symlink_to("/dev/full")
    program = (
        "import os, sys, logging\n"
        "from gptailor.execution.logs import Log\n"
        "log = Log(1, 'n1')\n"
        f"log.open({str(tmp_path)!r})\n"
        "log.take_output()\n"
        "log.say('lost')\n"
        "print('lost, too', flush=True)\n"
        "logging.warning('and this')\n"
        "sys.stderr.write('or that\\n')\n"
        "os.system('echo whatever')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
