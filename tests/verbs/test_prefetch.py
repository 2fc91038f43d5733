"""`gptailor prefetch` gets what an offline job needs and proves it by loading without a network."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from gptailor import cli, verbs
from gptailor.errors import ModelError, UsageError, size

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def config_file(folder: Path, models: dict[str, str], tasks: Path, *names: str) -> Path:
    data = {
        "models": models,
        "base": "base",
        "evaluation": {
            "tasks": list(names) or ["t_shared"],
            "include_path": str(tasks),
            "holdout": {"tasks": ["t_generate"]},
        },
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def in_hub_cache(home: Path, name: str, folder: Path) -> Path:
    """Puts a model into the hub client's cache."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_hub_model_is_found_in_the_cache_and_named(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "hf home"
    snapshot = in_hub_cache(home, "org/red", Path(models["red"]))
    refs = {"base": models["base"], "red": "org/red", "same": f"org/red@{COMMIT}"}
    path = config_file(tmp_path, refs, tasks_dir)
    command = [sys.executable, "-m", "gptailor.cli", "prefetch", str(path), "--json"]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["models"]["red"]["folder"] == found["models"]["same"]["folder"] == str(snapshot)
    assert found["models"]["red"]["from_hub"] and not found["models"]["base"]["from_hub"]
    assert found["documents"] == {"search": 24, "holdout": 24}
    assert found["variables"] == {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(home),
    }
    assert found["only_checked"]


def test_missing_models_and_data_are_reported(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {**models, "red": "nobody/nothing"}
    path = config_file(tmp_path, missing, tasks_dir)
    assert cli.main(["prefetch", str(path)]) == 3
    assert "nobody/nothing is neither a folder nor a model" in capsys.readouterr().err
    shutil.copytree(tasks_dir, tmp_path / "tasks")
    (tmp_path / "tasks" / "t_hub.yaml").write_text(
        "task: t_hub\ndataset_path: nobody/no-such-data\noutput_type: multiple_choice\n"
        "test_split: test\ndoc_to_text: a\ndoc_to_choice: [a, b]\ndoc_to_target: 0\n"
    )
    path = config_file(tmp_path, models, tmp_path / "tasks", "t_hub")
    with pytest.raises(UsageError, match="The task t_hub can't be loaded"):
        verbs.prefetch(path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves documents that are available only over HTTP."""
    (tmp_path / "served").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    serve = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def test_a_task_that_needs_the_network_each_time_is_detected(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path, server: str
) -> None:
    tasks = tmp_path / "tasks"
    shutil.copytree(tasks_dir, tasks)
    (tasks / "data.json").rename(tmp_path / "served" / "data.json")
    text = (tasks / "load.py").read_text()
    local = "(pathlib.Path(__file__).parent / 'data.json').read_text()"
    assert local in text
    remote = f"urllib.request.urlopen('{server}/data.json').read()"
    (tasks / "load.py").write_text("import urllib.request\n" + text.replace(local, remote))
    with pytest.raises(
        UsageError, match="Loading worked, but not without a network: The task t_sha"
    ):
        verbs.prefetch(config_file(tmp_path, models, tasks))


def test_a_missing_tokenizer_is_reported(
    models: dict[str, str], tasks_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(models["base"], tmp_path / "base")
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    path = config_file(tmp_path, {"base": str(tmp_path / "base")}, tasks_dir)
    with pytest.raises(ModelError, match=r"tokenizer of .* can't be loaded"):
        verbs.prefetch(path)


def test_sizes_have_three_digits() -> None:
    sizes = (7, 999, 1000, 678_432, 141_107_412_992, 5.6e14)
    assert [size(n) for n in sizes] == ["7 B", "999 B", "1 kB", "678 kB", "141 GB", "560 TB"]
